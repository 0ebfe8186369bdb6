"""The validation report: how far a bundle's segments are from the float model, on a text that ships with us."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..devices.backend import Graph, default_threads
from ..devices.row_rule import RowRule, filled_up, row_rule
from ..errors import ExportError
from ..quant.kv import KVScales
from ..quant.opsc import Recipe
from ..runtime.bundle import FFN_ALL, FFN_NONE, FFN_SIMILARITY, Architecture, Half, KVSpec, Segment, precisions
from .checkpoint import Checkpoint, open_checkpoint
from .decoder import SegmentBuilder, build_block, build_head
from .families import family_of
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .graph import GraphWriter
from .progress import Progress
from .weights import Weights

PROBE_TOKENS = 6  # enough for odd and even counts: kernels compute rows in pairs
FFN_PROBE = 0.9  # a threshold at which the probed rows leave out networks, and not all the same ones
SIDES = ("key", "value")
HEAD_ROWS = 64  # logits of that many tokens are in memory at a time
INFLUENCE_TOKENS = 128  # each block leaves a copy of them that runs through all later ones
FLOAT_TOLERANCE = 0.05  # a float bundle's logits may differ from the float reference's by this much

Hidden = NDArray[np.float32]

logger = logging.getLogger(__name__)


def validation_text() -> str:
    """The English text that validation reads, about 580 tokens; written for Isthmus, in no training set."""
    return (Path(__file__).parent / "validation.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class FloatModel:
    """The unsplit model in float32, run layer by layer; one layer's graph is on disk at a time.

    Args:
        scratch: folder for that graph.
        threads: of onnxruntime.
        weights: others than the checkpoint's in float32, to see what they change.
        kv_scales: of every layer that is run, if its KV cache has fewer than 32 bits.
        kv_bits: of the KV cache.
    """

    checkpoint: Checkpoint
    family: ModuleType
    arch: Architecture
    scratch: Path
    threads: int = field(default_factory=default_threads)
    weights: Weights | None = None
    kv_scales: Mapping[int, KVScales] = field(default_factory=dict)
    kv_bits: int = 32

    def embed(self, ids: Sequence[int]) -> Hidden:
        """Hidden states ``[tokens, d_model]`` before the first layer."""
        return (self.weights or Weights.floats(self.checkpoint)).embedding(list(ids))

    def layer(self, index: int, hidden: Hidden) -> Hidden:
        """One layer over a whole text."""
        return self.layer_of_texts(index, [hidden])[0]

    def layer_of_texts(self, index: int, texts: Sequence[Hidden]) -> list[Hidden]:
        """One layer over several whole texts, its weights read once."""
        return [hidden for hidden, _, _ in self.layer_with_cache(index, texts)]

    def layer_with_cache(self, index: int, texts: Sequence[Hidden]) -> Iterator[tuple[Hidden, Hidden, Hidden]]:
        """One layer over several texts: hidden states, and keys and values ``[tokens, kv_heads, head_dim]``.

        Keys are as the cache holds them, rotated to their positions.
        """
        kv = KVSpec(self.kv_bits, self.arch.kv_heads, self.arch.head_dim)
        span = range(index, index + 1)
        with self._builder() as builder:
            names = {index: self.family.tensors(self.arch, index)}
            build_block(builder, names, max(map(len, texts)), kv, self.kv_scales)
            graph = Graph(builder.writer.graph_path, self.threads)
            for hidden in texts:
                out, cache = run_block_and_cache(graph, span, kv, hidden)
                keys, values = (cache[f"{side}.{index}"][0, :, : len(hidden)].swapaxes(0, 1) for side in SIDES)
                yield out, keys, values

    def logits(self, hidden: Hidden) -> Iterator[tuple[slice, Hidden]]:
        """Logits of a few tokens at a time, with the rows that they belong to."""
        with self.head() as head:
            for first in range(0, len(hidden), HEAD_ROWS):
                rows = slice(first, first + HEAD_ROWS)
                yield rows, head(hidden[rows])

    @contextmanager
    def head(self) -> Iterator[Callable[[Hidden], Hidden]]:
        """The head, opened: hidden states ``[tokens, d_model]`` to logits ``[tokens, vocab_size]``."""
        with self._builder() as builder:
            build_head(builder, FINAL_NORM, EMBEDDING if self.arch.tied_embeddings else HEAD)
            yield partial(run_head, Graph(builder.writer.graph_path, self.threads))

    @contextmanager
    def _builder(self) -> Iterator[SegmentBuilder]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            writer = GraphWriter(Path(folder), "reference")
            yield SegmentBuilder(writer, self.arch, self.weights or Weights.floats(self.checkpoint))


def float_logits(model: str | Path, ids: Sequence[int]) -> Hidden:
    """Logits ``[tokens, vocab_size]`` of the unsplit, unquantized model over a text.

    Args:
        model: a checkpoint folder or a ``.gguf`` file.
        ids: the text; its logits all lie in memory.

    Raises:
        ModelError: the checkpoint cannot be read or has no builder.
    """
    checkpoint = open_checkpoint(Path(model))
    family = family_of(checkpoint.config)
    with tempfile.TemporaryDirectory() as scratch:
        reference = FloatModel(checkpoint, family, family.architecture(checkpoint.config), Path(scratch))
        hidden = reference.embed(ids)
        for layer in range(reference.arch.layers):
            hidden = reference.layer(layer, hidden)
        return np.concatenate([logits for _, logits in reference.logits(hidden)])


@dataclass(frozen=True)
class Validator:
    """Runs a staged bundle below ``root`` beside the float model."""

    root: Path
    reference: FloatModel
    recipe: Recipe
    weights: Weights

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
            ``tokens``; ``chunking_exact``: whether a token's bits are the same in chunks of other lengths;
            ``influence``: of each block but the first and the last, KL (nats) of the tokens predicted without it
            from those predicted with it, both by the bundle;
            ``kv``: each half's ``bits`` of KV cache and its ``bytes_per_token`` of context;
            ``segments``: each segment's ``max_abs`` and ``relative`` (median over tokens of the error's
            norm by the output's) difference when both get the float reference's input; ``logits_max_abs``,
            ``top1_agreement``, ``kl`` (mean, nats), ``perplexity`` and ``reference_perplexity`` of the whole chain;
            ``transformers``, the same against its logits, if given.

        Raises:
            ExportError: the outputs are not finite, or a float bundle is not the float model.
        """
        arch = self.reference.arch
        steps = arch.layers + 1
        reference = self.reference.embed(ids)
        chained = self.weights.embedding(ids)
        differences = {"embed": _difference(reference, chained)}
        exact = []
        influence = _Influence()
        blocks = [segment for segment in segments if segment.kind == "block"]
        for segment in blocks:
            graph = Graph(self.root / segment.half / segment.graph_file, default_threads())
            span = range(segment.first_layer, segment.last_layer)
            kv = self._kv(segment.half)
            rule = row_rule(precisions([segment]))
            for similarity in (FFN_ALL, FFN_PROBE)[: 1 + segment.skips_ffn]:
                run = partial(run_block, graph, span, kv, rule=rule, ffn_similarity=similarity)
                exact.append(_chunking_exact(run, reference))
            influence.pass_block(
                segment.name, partial(run_block, graph, span, kv), chained, inner=segment not in (blocks[0], blocks[-1])
            )
            isolated, chained = (run_block(graph, span, kv, hidden) for hidden in (reference, chained))
            for layer in span:
                progress(f"validating layer {layer}", layer, steps)
                reference = self.reference.layer(layer, reference)
            differences[segment.name] = _difference(reference, isolated)
        progress("validating head", arch.layers, steps)
        head = next(segment for segment in segments if segment.kind == "head")
        graph = Graph(self.root / head.half / head.graph_file, default_threads())
        exact.append(_chunking_exact(partial(run_head_in_chunks, graph, row_rule(precisions([head]))), reference))
        totals, outside = _Totals(ids), _Totals(ids)
        drifts = []
        for rows, expected in self.reference.logits(reference):
            drifts.append(_difference(expected, run_head(graph, reference[rows])))
            actual = run_head(graph, chained[rows])
            totals.add(expected, actual)
            if transformers_logits is not None:
                outside.add(transformers_logits[rows], actual)
        differences["head"] = {key: max(drift[key] for drift in drifts) for key in drifts[0]}
        weighed = influence.kl(partial(run_head, graph), chained)
        progress("validated", steps, steps)
        report = {"tokens": len(ids), "reference": "the float32 model", "segments": differences}
        report["chunking_exact"] = all(exact)
        report["influence"] = weighed
        report["kv"] = self._kv_report()
        report |= totals.summary()
        if transformers_logits is not None:
            report["transformers"] = outside.summary()
        self._judge(report)
        return report

    def _judge(self, report: dict[str, Any]) -> None:
        numbers = [
            report["logits_max_abs"],
            report["kl"],
            *(d["max_abs"] for d in report["segments"].values()),
        ]
        if not np.isfinite(numbers).all():
            raise ExportError("validation: the exported segments give NaN or infinity; the checkpoint may be damaged")
        if not report["chunking_exact"]:
            logger.warning(
                "this onnxruntime (%s) computes a token differently in chunks of other lengths: a text may then depend "
                "on how it was drafted, batched or resumed",
                onnxruntime.__version__,
            )
        recipe = self.recipe
        all_bits = [getattr(recipe, field.name) for field in fields(recipe) if field.name.endswith("_bits")]
        if min(all_bits) == 32 and report["logits_max_abs"] > FLOAT_TOLERANCE:
            raise ExportError(
                f"validation: float logits differ by {report['logits_max_abs']:.3g}, more than {FLOAT_TOLERANCE}; "
                "this onnxruntime computes a segment wrongly"
            )

    def _kv(self, half: Half) -> KVSpec:
        bits = self.recipe.front_kv_bits if half == "device" else self.recipe.back_kv_bits
        return KVSpec(bits, self.reference.arch.kv_heads, self.reference.arch.head_dim)

    def _kv_report(self) -> dict[str, dict[str, int]]:
        split, layers = self.recipe.split, self.recipe.layers
        halves: list[tuple[Half, int]] = [("device", split), ("server", layers - split)]
        return {
            half: {"bits": self._kv(half).bits, "bytes_per_token": self._kv(half).token_bytes(count)}
            for half, count in halves
            if count
        }


def _chunking_exact(run: Callable[[Hidden, Sequence[int]], Hidden], hidden: Hidden) -> bool:
    """Whether a segment gives tokens the same bits in chunks of any length, one by one included."""
    hidden = hidden[:PROBE_TOKENS]
    tokens = len(hidden)
    whole = run(hidden, [tokens])
    chunkings = [[1] * tokens, *([first, tokens - first] for first in range(1, tokens))]
    return all(np.array_equal(run(hidden, chunks), whole) for chunks in chunkings)


def _difference(expected: Hidden, actual: Hidden) -> dict[str, float]:
    error = expected - actual
    relative = np.linalg.norm(error, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return {"max_abs": float(np.abs(error).max()), "relative": float(np.median(relative))}


class _Influence:
    """Runs a text through a bundle's blocks as it is, and once without each of the inner ones.

    Block influence as ShortGPT has it (arXiv 2403.03853: one minus the cosine of a block's input and output) was tried
    and orders the blocks of SmolLM2 worse.
    """

    def __init__(self) -> None:
        self._without: dict[str, Hidden] = {}

    def pass_block(self, name: str, run: Callable[[Hidden], Hidden], before: Hidden, *, inner: bool) -> None:
        """Take in the next block; ``before`` is what it gets where none is left out."""
        self._without = {left_out: run(hidden) for left_out, hidden in self._without.items()}
        if inner:
            self._without[name] = before[:INFLUENCE_TOKENS]

    def kl(self, head: Callable[[Hidden], Hidden], hidden: Hidden) -> dict[str, float]:
        """Mean KL divergence by each inner block; ``hidden`` is behind the last block where none was left out."""
        tokens = min(INFLUENCE_TOKENS, len(hidden))
        sums = dict.fromkeys(self._without, 0.0)
        for first in range(0, tokens, HEAD_ROWS):
            rows = slice(first, min(first + HEAD_ROWS, tokens))
            expected = log_softmax(head(hidden[rows]))
            for name, without in self._without.items():
                sums[name] += float((np.exp(expected) * (expected - log_softmax(head(without[rows])))).sum())
        return {name: total / tokens for name, total in sums.items()}


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


def run_block(
    graph: Graph,
    layers: range,
    kv: KVSpec,
    hidden: Hidden,
    chunks: Sequence[int] | None = None,
    *,
    rule: RowRule = RowRule.EVEN,
    ffn_similarity: float = FFN_ALL,
) -> Hidden:
    """Run a block over a text ``[tokens, d_model]`` from an empty cache, at once or in chunks.

    Args:
        graph: of the block.
        layers: in it.
        kv: layout of its cache.
        hidden: the text's hidden states.
        chunks: tokens in each.
        rule: rows that the graph is run with.
        ffn_similarity: at which a network is left out, if the graph can do that.
    """
    return run_block_and_cache(graph, layers, kv, hidden, chunks, rule=rule, ffn_similarity=ffn_similarity)[0]


def run_block_and_cache(
    graph: Graph,
    layers: range,
    kv: KVSpec,
    hidden: Hidden,
    chunks: Sequence[int] | None = None,
    *,
    rule: RowRule = RowRule.EVEN,
    ffn_similarity: float = FFN_ALL,
) -> tuple[Hidden, dict[str, NDArray[Any]]]:
    """Do what `run_block` does.

    Returns:
        Hidden states like ``hidden``, and the cache of each layer, ``key.i`` and ``value.i``.
    """
    names = [f"{side}.{layer}" for layer in layers for side in SIDES]
    cache: dict[str, NDArray[Any]] = dict.fromkeys(names, np.zeros(kv.shape(len(hidden)), kv.dtype))
    outputs = ["hidden_out", *(f"present_{name}" for name in names)]
    skips = any(each.name == FFN_SIMILARITY for each in graph.session.get_inputs())
    parts = []
    last = 0
    for tokens in chunks or [len(hidden)]:
        first, last = last, last + tokens
        rows = filled_up(hidden[first:last], rule)
        end = first + rows.shape[1]
        inputs = {f"past_{name}": array for name, array in cache.items()} | {
            "hidden": rows,
            "seqlens_k": np.array([end], np.int32),
            "total_sequence_length": np.array(end + 1, np.int32),
        }
        if skips:
            thresholds = inputs[FFN_SIMILARITY] = np.full((*rows.shape[:2], 1), FFN_NONE, np.float32)
            thresholds[:, :tokens] = ffn_similarity
        part, *arrays = graph.session.run(outputs, inputs)
        parts.append(part[0, :tokens])
        cache = dict(zip(names, arrays, strict=True))
    return np.concatenate(parts), cache


def run_head(graph: Graph, hidden: Hidden, rule: RowRule = RowRule.EVEN) -> Hidden:
    """Logits ``[tokens, vocab_size]`` of hidden states ``[tokens, d_model]``."""
    return graph.run({"hidden": filled_up(hidden, rule)}, "logits")[0, : len(hidden)]


def run_head_in_chunks(graph: Graph, rule: RowRule, hidden: Hidden, chunks: Sequence[int]) -> Hidden:
    """Logits like `run_head`'s, computed chunk by chunk."""
    return np.concatenate([run_head(graph, rows, rule) for rows in np.split(hidden, np.cumsum(chunks)[:-1])])
