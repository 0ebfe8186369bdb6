"""The validation report: how far a bundle's segments are from the float model, on a text that ships with us."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..devices.backend import Graph, default_threads
from ..errors import ExportError
from ..quant.nbits import PACKED_BITS, dequantize, quantize_rtn
from ..quant.opsc import Recipe
from ..runtime.bundle import Architecture, Segment
from .checkpoint import Checkpoint, open_checkpoint
from .decoder import SegmentBuilder, build_block, build_head
from .families import family_of
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .graph import GraphWriter
from .progress import Progress

PROBE_TOKENS = 6  # enough for odd and even counts: kernels compute rows in pairs
HEAD_ROWS = 64  # logits of that many tokens are in memory at a time
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
    """

    checkpoint: Checkpoint
    family: ModuleType
    arch: Architecture
    scratch: Path

    def embed(self, ids: Sequence[int]) -> Hidden:
        """Hidden states ``[tokens, d_model]`` before the first layer."""
        return self.checkpoint.tensor(EMBEDDING)[list(ids)]

    def layer(self, index: int, hidden: Hidden) -> Hidden:
        """One layer over a whole text."""
        with self._builder() as builder:
            names = {index: self.family.tensors(self.arch, index)}
            build_block(builder, self.checkpoint.tensor, names, len(hidden))
            return run_block(
                Graph(builder.writer.graph_path, default_threads()), range(index, index + 1), self.arch, hidden
            )

    def logits(self, hidden: Hidden) -> Iterator[tuple[slice, Hidden]]:
        """Logits of a few tokens at a time, with the rows that they belong to."""
        with self._builder() as builder:
            weight = EMBEDDING if self.arch.tied_embeddings else HEAD
            build_head(builder, self.checkpoint.tensor(FINAL_NORM), self.checkpoint.tensor(weight))
            graph = Graph(builder.writer.graph_path, default_threads())
            for first in range(0, len(hidden), HEAD_ROWS):
                rows = slice(first, first + HEAD_ROWS)
                yield rows, run_head(graph, hidden[rows])

    @contextmanager
    def _builder(self) -> Iterator[SegmentBuilder]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            yield SegmentBuilder(GraphWriter(Path(folder), "reference"), self.arch, 32, 0)


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
        chained = self._embedding(reference)
        differences = {"embed": _difference(reference, chained)}
        exact = []
        for segment in (segment for segment in segments if segment.kind == "block"):
            graph = Graph(self.root / segment.half / segment.graph_file, default_threads())
            span = range(segment.first_layer, segment.last_layer)
            exact.append(_chunking_exact(partial(run_block, graph, span, arch), reference))
            isolated = run_block(graph, span, arch, reference)
            chained = run_block(graph, span, arch, chained)
            for layer in span:
                progress(f"validating layer {layer}", layer, steps)
                reference = self.reference.layer(layer, reference)
            differences[segment.name] = _difference(reference, isolated)
        progress("validating head", arch.layers, steps)
        head = next(segment for segment in segments if segment.kind == "head")
        graph = Graph(self.root / head.half / head.graph_file, default_threads())
        exact.append(_chunking_exact(partial(run_head, graph), reference))
        totals, outside = _Totals(ids), _Totals(ids)
        drifts = []
        for rows, expected in self.reference.logits(reference):
            drifts.append(_difference(expected, run_head(graph, reference[rows])))
            actual = run_head(graph, chained[rows])
            totals.add(expected, actual)
            if transformers_logits is not None:
                outside.add(transformers_logits[rows], actual)
        differences["head"] = {key: max(drift[key] for drift in drifts) for key in drifts[0]}
        progress("validated", steps, steps)
        report = {"tokens": len(ids), "reference": "the float32 model", "segments": differences}
        report["chunking_exact"] = all(exact)
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


def _chunking_exact(run: Callable[[Hidden], Hidden], hidden: Hidden) -> bool:
    """Whether a segment gives the first tokens of a text the same bits however few of them it runs."""
    whole = run(hidden[:PROBE_TOKENS])
    return all(np.array_equal(run(hidden[:tokens]), whole[:tokens]) for tokens in range(1, len(whole)))


def _difference(expected: Hidden, actual: Hidden) -> dict[str, float]:
    error = expected - actual
    relative = np.linalg.norm(error, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return {"max_abs": float(np.abs(error).max()), "relative": float(np.median(relative))}


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
    inputs: dict[str, NDArray[Any]] = {f"past_{side}.{layer}": cache for layer in layers for side in ("key", "value")}
    inputs |= {
        "hidden": np.ascontiguousarray(hidden[None]),
        "seqlens_k": np.array([tokens], np.int32),
        "total_sequence_length": np.array(tokens + 1, np.int32),
    }
    return graph.run(inputs, "hidden_out")[0]


def run_head(graph: Graph, hidden: Hidden) -> Hidden:
    """Logits ``[tokens, vocab_size]`` of hidden states ``[tokens, d_model]``."""
    return graph.run({"hidden": np.ascontiguousarray(hidden[None])}, "logits")[0]
