"""The validation report: how far a bundle's segments are from the float model, on a text that ships with us."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..devices.backend import Graph
from ..errors import ExportError
from ..quant.nbits import PACKED_BITS, dequantize, quantize_rtn
from ..quant.opsc import Recipe
from ..runtime.bundle import Architecture, Segment
from .checkpoint import Checkpoint
from .decoder import SegmentBuilder, build_block, build_head
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .graph import GraphWriter
from .segments import Progress

HEAD_ROWS = 64  # logits of that many tokens are in memory at a time
FLOAT_TOLERANCE = 0.05  # a float bundle's logits may differ from the float reference's by this much

Hidden = NDArray[np.float32]


def validation_text() -> str:
    """The English text that validation reads, about 580 tokens; written for Isthmus, in no training set."""
    return (Path(__file__).parent / "validation.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Validator:
    """Runs a staged bundle beside the float model, layer by layer; one float layer is on disk at a time."""

    root: Path
    checkpoint: Checkpoint
    family: ModuleType
    arch: Architecture
    recipe: Recipe

    def report(
        self,
        segments: Sequence[Segment],
        ids: Sequence[int],
        progress: Progress,
        transformers_logits: NDArray[np.float32] | None = None,
    ) -> dict[str, Any]:
        """Compare on token ids.

        Args:
            segments: what was written below ``root``.
            ids: the text.
            progress: called as layers are done.
            transformers_logits: ``[tokens, vocab_size]`` of transformers' own model, to be compared as well.

        Returns:
            ``tokens``; ``segments``: each segment's largest absolute output difference when both get the float
            reference's input; ``logits_max_abs``, ``top1_agreement``, ``kl`` (mean, nats), ``perplexity`` and
            ``reference_perplexity`` of the whole chain; ``transformers``, the same against its logits, if given.

        Raises:
            ExportError: the outputs are not finite, or a float bundle is not the float model.
        """
        table = self.checkpoint.tensor(EMBEDDING)[list(ids)]
        reference, chained = table, self._embedding(table)
        differences = {"embed": float(np.abs(reference - chained).max())}
        blocks = [segment for segment in segments if segment.kind == "block"]
        for segment in blocks:
            graph = Graph(self.root / segment.half / segment.graph_file)
            span = range(segment.first_layer, segment.last_layer)
            isolated = run_block(graph, span, self.arch, reference)
            chained = run_block(graph, span, self.arch, chained)
            for layer in span:
                progress(f"validating layer {layer}", layer, self.arch.layers + 1)
                reference = self._float_layer(layer, reference)
            differences[segment.name] = float(np.abs(reference - isolated).max())
        progress("validating head", self.arch.layers, self.arch.layers + 1)
        head = next(segment for segment in segments if segment.kind == "head")
        totals, outside = _Totals(ids), _Totals(ids)
        isolated_max = 0.0
        for rows, expected, isolated, actual in self._logits(head, reference, chained):
            totals.add(expected, actual)
            isolated_max = max(isolated_max, float(np.abs(expected - isolated).max()))
            if transformers_logits is not None:
                outside.add(transformers_logits[rows], actual)
        differences["head"] = isolated_max
        progress("validated", self.arch.layers + 1, self.arch.layers + 1)
        report = {"tokens": len(ids), "reference": "float32 graphs of the same checkpoint", "segments": differences}
        report |= totals.summary()
        if transformers_logits is not None:
            report["transformers"] = outside.summary()
        self._judge(report)
        return report

    def _judge(self, report: dict[str, Any]) -> None:
        numbers = [report["logits_max_abs"], report["kl"], *report["segments"].values()]
        if not np.isfinite(numbers).all():
            raise ExportError("validation: the exported segments give NaN or infinity; the checkpoint may be damaged")
        recipe = self.recipe
        all_float = min(recipe.front_bits, recipe.back_bits, recipe.embed_bits, recipe.head_bits) == 32
        if all_float and report["logits_max_abs"] > FLOAT_TOLERANCE:
            raise ExportError(
                f"validation: float logits differ by {report['logits_max_abs']:.3g}, more than {FLOAT_TOLERANCE}; "
                "this onnxruntime computes a segment wrongly"
            )

    def _embedding(self, rows: Hidden) -> Hidden:
        bits = self.recipe.embed_bits
        if bits in PACKED_BITS:
            return dequantize(quantize_rtn(rows, bits, self.recipe.block_size))
        return rows.astype(np.float16).astype(np.float32) if bits == 16 else rows

    def _float_layer(self, layer: int, hidden: Hidden) -> Hidden:
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            builder = SegmentBuilder(GraphWriter(Path(folder), "reference"), self.arch, 32, 0)
            names = {layer: self.family.tensors(self.arch, layer)}
            build_block(builder, self.checkpoint.tensor, names, len(hidden))
            return run_block(Graph(builder.writer.graph_path), range(layer, layer + 1), self.arch, hidden)

    def _logits(
        self, head: Segment, reference: Hidden, chained: Hidden
    ) -> Iterator[tuple[slice, Hidden, Hidden, Hidden]]:
        """Logits of a few tokens at a time: which, float, the segment on the float's input, the whole chain."""
        quantized = Graph(self.root / head.half / head.graph_file)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            builder = SegmentBuilder(GraphWriter(Path(folder), "reference"), self.arch, 32, 0)
            weight = self.checkpoint.tensor(EMBEDDING if self.arch.tied_embeddings else HEAD)
            build_head(builder, self.checkpoint.tensor(FINAL_NORM), weight)
            del weight
            graph = Graph(builder.writer.graph_path)
            for first in range(0, len(reference), HEAD_ROWS):
                rows = slice(first, first + HEAD_ROWS)
                yield (
                    rows,
                    graph.run({"hidden": reference[None, rows]}, "logits")[0],
                    quantized.run({"hidden": reference[None, rows]}, "logits")[0],
                    quantized.run({"hidden": chained[None, rows]}, "logits")[0],
                )


class _Totals:
    """Running sums over tokens, so that the logits of a whole text never lie in memory at once."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._targets = np.asarray(ids)[1:]
        self._tokens = 0
        self._agreeing = 0
        self._kl = 0.0
        self._losses = np.zeros(2)
        self.logits_max = 0.0

    def add(self, expected: Hidden, actual: Hidden) -> None:
        """Count the next tokens' logits ``[tokens, vocab_size]``."""
        self.logits_max = max(self.logits_max, float(np.abs(expected - actual).max()))
        self._agreeing += int((expected.argmax(1) == actual.argmax(1)).sum())
        log_p, log_q = log_softmax(expected), log_softmax(actual)
        self._kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        targets = self._targets[self._tokens : self._tokens + len(expected)]
        rows = np.arange(len(targets))
        self._losses -= (log_p[rows, targets].sum(), log_q[rows, targets].sum())
        self._tokens += len(expected)

    def summary(self) -> dict[str, float]:
        """Means over all tokens seen."""
        reference, perplexity = np.exp(self._losses / max(len(self._targets), 1))
        return {
            "logits_max_abs": self.logits_max,
            "top1_agreement": self._agreeing / self._tokens,
            "kl": self._kl / self._tokens,
            "perplexity": float(perplexity),
            "reference_perplexity": float(reference),
        }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def run_block(graph: Graph, layers: range, arch: Architecture, hidden: Hidden) -> Hidden:
    """Run a block over a whole text ``[tokens, d_model]`` from an empty cache."""
    tokens = len(hidden)
    cache = np.zeros((1, arch.kv_heads, tokens + 1, arch.head_dim), np.float32)
    inputs: dict[str, NDArray[Any]] = {
        f"past_{side}.{layer}": cache for layer in layers for side in ("key", "value")
    }
    inputs |= {
        "hidden": np.ascontiguousarray(hidden[None]),
        "seqlens_k": np.array([tokens], np.int32),
        "total_sequence_length": np.array(tokens + 1, np.int32),
    }
    return graph.run(inputs, "hidden_out")[0]
