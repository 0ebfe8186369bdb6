"""The block runtime against one ONNX graph of the whole model, driven by the barest loop.

Both run in one process and alternate, so that noise hits both; each thread count has a
process of its own. Decoding is timed token by token and compared by medians. The single graph has the same
weights, at the same precisions, and must choose the same tokens.

A second single graph, without the dummy attention row that makes a token's bits independent of its chunk
(`isthmus.export.decoder`), tells what that row costs; its tokens may differ.

    python benchmarks/single_graph.py [--model MODEL] [--bundle OUT/device] [--threads 1,2]

The bundle must be device-only and made from that model; without one it is exported first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto
from tabulate import tabulate

from isthmus.devices.backend import Graph
from isthmus.export.checkpoint import Checkpoint, open_checkpoint
from isthmus.export.decoder import SegmentBuilder, _layer
from isthmus.export.export import export_bundle
from isthmus.export.families import family_of
from isthmus.export.families.common import EMBEDDING, FINAL_NORM, HEAD
from isthmus.export.graph import GraphWriter
from isthmus.export.rope import rope_tables
from isthmus.export.sources import resolve_model
from isthmus.export.weights import Weights
from isthmus.quant.opsc import Precision
from isthmus.runtime.bundle import SPARE_ROWS, Manifest, open_bundle
from isthmus.runtime.edge.generate import LocalBack, generate_tokens
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.segments import Embedding, Head, LayerStack

BLOCKS, SINGLE, NO_DUMMY = "blocks", "single graph", "single graph, no dummy row"


class NoDummyRowBuilder(SegmentBuilder):
    """Leaves the dummy attention row out."""

    def rows_to_attend(self, qkv: str) -> str:
        """Append nothing."""
        return qkv

    def rows_attended(self, attended: str) -> str:
        """Drop nothing."""
        return attended


def build_single_graph(
    folder: Path, name: str, checkpoint: Checkpoint, manifest: Manifest, builder_class: type[SegmentBuilder]
) -> None:
    """Write layers and head as one graph: ``hidden`` to the last row's ``logits``, with ``build_block``'s inputs."""
    arch, family = manifest.architecture, family_of(checkpoint.config)
    writer = GraphWriter(folder, name)

    def precision(name: str) -> Precision:
        return Precision(manifest.head_bits if name == "head" else manifest.front_bits, manifest.block_size)

    builder = builder_class(writer, arch, Weights(checkpoint, precision))
    residual = writer.input("hidden", [1, "tokens", arch.d_model])
    writer.input("seqlens_k", [1], TensorProto.INT32)
    writer.input("total_sequence_length", [], TensorProto.INT32)
    for table, values in zip(("cos", "sin"), rope_tables(arch, manifest.max_length + SPARE_ROWS), strict=True):
        writer.weight(table, values)
    branch = builder.zero_like(residual)
    for layer in range(arch.layers):
        for side in ("key", "value"):
            shape: list[int | str] = [1, arch.kv_heads, "capacity", arch.head_dim]
            writer.input(f"past_{side}.{layer}", shape)
            writer.output(f"present_{side}.{layer}", shape)
        branch, residual = _layer(builder, layer, family.tensors(arch, layer), residual, branch)
    normed, _ = builder.add_and_norm(residual, branch, "final_norm", checkpoint.tensor(FINAL_NORM))
    bounds = [writer.constant(n, np.array([v], np.int64)) for n, v in (("last", -1), ("end", 2**31 - 1), ("axis", 1))]
    last = writer.node("Slice", [normed, *bounds])
    builder.linear(last, "head", [EMBEDDING if arch.tied_embeddings else HEAD], output="logits")
    writer.output("logits", [1, 1, arch.vocab_size])
    writer.save()


@dataclass(frozen=True)
class Run:
    """One prefill and the decoding after it: seconds, and the tokens chosen."""

    prefill_s: float
    decode_s: list[float]
    ids: list[int]


class BlockRunner:
    """The runtime as an app uses it."""

    def __init__(self, bundle_folder: str, threads: int) -> None:
        bundle = open_bundle(bundle_folder, "device", verify=False)
        self.manifest = bundle.manifest
        self._embedding, self._stack, self._head = Embedding(bundle), LayerStack(bundle, threads), Head(bundle, threads)

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        """Generate through `generate_tokens`."""
        back = LocalBack(self._head)
        capacity = len(prompt) + new_tokens
        back.open(capacity, Sampling(), ())
        tokens = generate_tokens(
            self._embedding,
            self._stack.session(capacity),
            back,
            prompt,
            layers=self.manifest.architecture.layers,
            max_new_tokens=new_tokens,
            end_tokens=(),
        )
        times, ids = [perf_counter()], []
        for token in tokens:
            times.append(perf_counter())
            ids.append(token.id)
        seconds = np.diff(times).tolist()
        return Run(seconds[0], seconds[1:], ids)


class SingleRunner:
    """The barest loop over one graph: bound buffers, embedding rows, argmax."""

    def __init__(self, graph_path: Path, bundle_folder: str, threads: int, dummy_rows: int) -> None:
        bundle = open_bundle(bundle_folder, "device", verify=False)
        self._manifest = bundle.manifest
        self._embedding = Embedding(bundle)
        self._session = Graph(graph_path, threads).session
        self._dummy_rows = dummy_rows

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        """Prefill in one step, then decode."""
        self._bind_session(len(prompt) + new_tokens)
        ids, seconds, rows = [], [], prompt
        prefill, decode = self._bind_step(len(prompt)), self._bind_step(1)
        length = 0
        for step in range(new_tokens):
            hidden, binding = decode if step else prefill
            started = perf_counter()
            hidden[0] = self._embedding.rows(rows)
            length += len(rows)
            self._seqlens[0] = length + self._dummy_rows - 1
            self._total[...] = length + self._dummy_rows
            self._session.run_with_iobinding(binding)
            token = int(self._logits.argmax())
            seconds.append(perf_counter() - started)
            ids.append(token)
            rows = [token]
        return Run(seconds[0], seconds[1:], ids)

    def _bind_session(self, capacity: int) -> None:
        arch = self._manifest.architecture
        self._seqlens, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._logits = np.zeros((1, 1, arch.vocab_size), np.float32)
        shape = (1, arch.kv_heads, capacity + 1, arch.head_dim)
        keys = [(side, layer) for side in ("key", "value") for layer in range(arch.layers)]
        caches = {key: np.zeros(shape, np.float32) for key in keys}
        self._caches = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in caches.items()}

    def _bind_step(self, tokens: int) -> tuple[np.ndarray[Any, Any], ort.IOBinding]:
        hidden = np.zeros((1, tokens, self._manifest.architecture.d_model), np.float32)
        binding = self._session.io_binding()
        for name, array in (
            ("hidden", hidden),
            ("seqlens_k", self._seqlens),
            ("total_sequence_length", self._total),
        ):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for (side, layer), value in self._caches.items():
            binding.bind_ortvalue_input(f"past_{side}.{layer}", value)
            binding.bind_ortvalue_output(f"present_{side}.{layer}", value)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))
        return hidden, binding


def measure(args: argparse.Namespace, graphs: Path, threads: int) -> dict[str, dict[str, float]]:
    """Run all three in turn, in this process; medians in seconds."""
    blocks = BlockRunner(args.bundle, threads)
    runners: dict[str, BlockRunner | SingleRunner] = {
        BLOCKS: blocks,
        SINGLE: SingleRunner(graphs / "single.onnx", args.bundle, threads, 1),
        NO_DUMMY: SingleRunner(graphs / "no_dummy.onnx", args.bundle, threads, 0),
    }
    vocabulary = blocks.manifest.architecture.vocab_size
    prompt = np.random.default_rng(0).integers(vocabulary, size=args.prompt_tokens).tolist()
    runs: dict[str, list[Run]] = {name: [] for name in runners}
    for repetition in range(-1, args.repetitions):
        for name, runner in runners.items():
            run = runner.run(prompt, args.new_tokens)
            if repetition >= 0:
                runs[name].append(run)
    if runs[BLOCKS][0].ids != runs[SINGLE][0].ids:
        raise SystemExit("the single graph chose other tokens than the blocks: they are not the same model")
    return {
        name: {
            "prefill_s": float(np.median([run.prefill_s for run in some])),
            "decode_s": float(np.median([second for run in some for second in run.decode_s])),
        }
        for name, some in runs.items()
    }


def main() -> None:
    """Build the graphs, measure each thread count in a process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what the bundle was exported from")
    parser.add_argument("--bundle", metavar="DIR", help="OUT/device, exported with --split all")
    parser.add_argument("--threads", default="1,2", metavar="N[,N]")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--graphs", type=Path, help=argparse.SUPPRESS)  # set for the processes that measure
    args = parser.parse_args()
    if args.graphs:
        print(json.dumps(measure(args, args.graphs, int(args.threads))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if not args.bundle:
            export_bundle(args.model, Path(scratch, "bundle"), split=None)
            args.bundle = str(Path(scratch, "bundle", "device"))
        manifest = open_bundle(args.bundle, "device", verify=False).manifest
        checkpoint = open_checkpoint(resolve_model(args.model))
        build_single_graph(Path(scratch), "single", checkpoint, manifest, SegmentBuilder)
        build_single_graph(Path(scratch), "no_dummy", checkpoint, manifest, NoDummyRowBuilder)
        for threads in args.threads.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--bundle", args.bundle]
            command += ["--threads", threads, "--graphs", scratch]
            medians = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            single = medians[SINGLE]
            for name, row in medians.items():
                prefill, decode = args.prompt_tokens / row["prefill_s"], 1 / row["decode_s"]
                ratios = single["prefill_s"] / row["prefill_s"], single["decode_s"] / row["decode_s"]
                rows.append([threads, name, prefill, ratios[0], decode, ratios[1]])
    headers = ["threads", "", f"pp{args.prompt_tokens} tokens/s", "ratio", f"tg{args.new_tokens} tokens/s", "ratio"]
    print(tabulate(rows, headers, floatfmt=("", "", ".1f", ".3f", ".1f", ".3f")))


if __name__ == "__main__":
    main()
