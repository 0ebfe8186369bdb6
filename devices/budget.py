"""The memory ceiling: what a process will take at its peak, part by part, and whether that fits.

The estimate is of resident memory: the process's own pages and the mapped files that it needs for every token. Its
constants were measured on x86-64 Linux with CPython 3.11 and onnxruntime 1.32; ``benchmarks/predictions.py`` holds
them against measurements. 1 MB is 10^6 bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from tabulate import tabulate

from ..errors import MemoryLimitError, RequestError

INTERPRETER_MB = 95.0  # Python, NumPy, onnxruntime and gRPC: 40 of its own, the rest mapped libraries
TOKENIZER_BYTES = 590  # per entry of the vocabulary, in the tokenizer's tables
GRAPH_MB = 1.5  # of one opened graph beside its weights
ARENA_MB = 4.0  # of onnxruntime's arena beside the activations that are counted
JOURNAL_BYTES = 64 << 20  # of a session's sent steps, that are kept; see `isthmus.runtime.edge.journal`
STEP_BYTES = 400  # of one of them beside its payload: framing and Python's objects
SCORE_ROWS = 3  # rows of attention scores per token of a chunk, over all positions, that are alive at once

_UNITS = {"kb": 1e-3, "mb": 1.0, "gb": 1e3, "kib": 1.024e-3, "mib": 1.048576, "gib": 1073.741824}


@dataclass(frozen=True)
class StoredWeight:
    """One weight as a bundle stores it.

    Attributes:
        bits: 2, 4 or 8 packed, 16 or 32 as floats.
        block_size: weights that share a scale, if packed.
        bytes: codes, scales and zero points, or floats.
        symmetric: whether there are no zero points.
    """

    bits: int
    block_size: int
    bytes: int
    symmetric: bool = True

    @cached_property
    def prepacked_bytes(self) -> int:
        """What onnxruntime makes of it: packed, one float more a block (its sum); floats as float32."""
        if self.bits > 8:
            return self.bytes * 32 // self.bits
        block_bytes = self.block_size * self.bits / 8 + 4 + (0 if self.symmetric else self.bits / 8)
        return round(self.bytes * (1 + 4 / block_bytes))


@dataclass(frozen=True)
class MemoryNeeds:
    """What one process's memory depends on.

    Attributes:
        graphs: the weights of each graph that it opens.
        kv_bytes: of all KV caches at full length.
        positions: most of one session.
        chunk: most tokens of one step.
        d_model: width of the hidden states.
        d_ff: width of the MLP.
        qkv_width: of queries, keys and values together.
        vocab_size: of the logits, where the head runs here; else 0.
        tokenizer_size: entries of its vocabulary, where it is loaded; else 0.
        tables_bytes: files of codec tables, mapped or loaded.
        journal_bytes: of sent steps that are kept to make the session again, at most `JOURNAL_BYTES`.
        installed: whether the prepacked weights are mapped from files, see `isthmus.runtime.install`.
    """

    graphs: tuple[tuple[StoredWeight, ...], ...]
    kv_bytes: int
    positions: int
    chunk: int
    d_model: int
    d_ff: int
    qkv_width: int
    vocab_size: int = 0
    tokenizer_size: int = 0
    tables_bytes: int = 0
    journal_bytes: int = 0
    installed: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak resident memory of a process in MB.

    Attributes:
        parts: by what they hold.
        evictable_mb: of the sum, mapped from files: the system may drop and read it again.
    """

    parts: dict[str, float]
    evictable_mb: float

    @property
    def total_mb(self) -> float:
        """Sum of the parts."""
        return sum(self.parts.values())

    def table(self) -> str:
        """The parts and their sum, for people."""
        return tabulate([*self.parts.items(), ("together", self.total_mb)], headers=["memory", "MB"], floatfmt=".1f")

    def check(self, limit_mb: float, remedy: str) -> None:
        """Raise `MemoryLimitError` with the table if the sum is above a limit."""
        if self.total_mb > limit_mb:
            raise MemoryLimitError(
                f"memory limit {limit_mb:.0f} MB: this needs {self.total_mb:.0f} MB; {remedy}\n{self.table()}"
            )


def estimate_memory(needs: MemoryNeeds, *, process_mb: float = INTERPRETER_MB) -> MemoryEstimate:
    """Estimate the peak of a process that loads and runs what ``needs`` names.

    Args:
        needs: what it loads.
        process_mb: resident before anything is loaded, libraries included.
    """
    weights = [weight for graph in needs.graphs for weight in graph]
    prepacked = sum(weight.prepacked_bytes for weight in weights)
    # Chunk rows of the residual stream, of gate, up and their product, and of queries, keys and values. Without graphs
    # there is the residual stream alone, in its two buffers.
    row = 6 * needs.d_model + 4 * needs.d_ff + 2 * needs.qkv_width + SCORE_ROWS * needs.positions
    arena_mb, row = (ARENA_MB, row) if needs.graphs else (0.0, 2 * needs.d_model)
    logits = 4 * 4 * needs.vocab_size  # float32 of one token, and what the choice among them computes
    running = {
        f"KV cache, {needs.positions} positions": needs.kv_bytes / 1e6,
        f"activations, chunks of {needs.chunk}": arena_mb + (4 * needs.chunk * row + logits) / 1e6,
    }
    # A weight is mapped while it is packed; by the time that the caches fill it is dropped.
    loading = 0.0 if needs.installed else max((weight.bytes for weight in weights), default=0) / 1e6
    parts = {"interpreter and libraries": max(process_mb, INTERPRETER_MB)}
    if needs.tokenizer_size:
        parts["tokenizer"] = TOKENIZER_BYTES * needs.tokenizer_size / 1e6
    parts["weights, mapped" if needs.installed else "weights, packed"] = prepacked / 1e6
    parts["graphs"] = GRAPH_MB * len(needs.graphs)
    if needs.tables_bytes:
        parts["codec tables"] = needs.tables_bytes / 1e6
    parts |= running
    if needs.journal_bytes:
        parts["sent steps, to make the session again"] = min(needs.journal_bytes, JOURNAL_BYTES) / 1e6
    if loading > sum(running.values()):
        parts["largest weight while loading"] = loading - sum(running.values())
    evictable = needs.tables_bytes / 1e6 + (prepacked / 1e6 if needs.installed else 0.0)
    return MemoryEstimate(parts, evictable)


def parse_megabytes(text: str) -> float:
    """MB of a size with its unit, such as ``300MB``, ``1.5GB`` or ``512MiB``.

    Raises:
        RequestError: no number, no known unit, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or float(match.group(1)) <= 0:
        raise RequestError(f"size {text!r}: must be a positive number with its unit, kB, MB, GB or MiB: 300MB")
    return float(match.group(1)) * unit
