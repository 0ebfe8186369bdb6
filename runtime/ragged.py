"""Sessions that advance together: one run of the back's layers over the rows of many."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..devices.backend import Graph, require_onnxruntime
from ..devices.row_rule import row_rule
from ..errors import BundleError, RequestError
from .bundle import FFN_NONE, FFN_SIMILARITY, Bundle, precisions
from .pool import KVPool
from .segments import KVCache
from .skipping import NO_BYPASS, Bypass, running_blocks, stretches

logger = logging.getLogger(__name__)

RAGGED_ONNXRUNTIME = "1.32.0"  # the first whose attention takes chunks of several sequences

MAX_LANES = 64  # shapes of batches whose buffers are kept; a server that is busy meets the same few again and again


def advance_together(bundle: Bundle) -> bool:
    """Whether a server half can advance many sessions in one run; a log line says why if it cannot."""
    if not all(segment.ragged_graph_file for segment in bundle.segments("block")):
        logger.warning("%s: exported before sessions could advance together; they take turns", bundle.folder)
        return False
    try:
        require_onnxruntime(RAGGED_ONNXRUNTIME)
    except BundleError:
        logger.warning(
            "onnxruntime %s: sessions advance together from %s on; they take turns", ort.__version__, RAGGED_ONNXRUNTIME
        )
        return False
    return True


Part = tuple[KVCache, NDArray[np.float32]]  # the next rows of a cache of the pool

_Shape = tuple[int, int, int, int, tuple[int, ...]]  # slots [first, last), rows, the most of a sequence, blocks


@dataclass
class _Lane:
    """Buffers and bindings for one shape of batch; a binding does not keep its memory alive."""

    hidden: list[NDArray[np.float32]]  # the blocks alternate between two
    seqlens_k: NDArray[np.int32]
    query_seqlens: NDArray[np.int32]
    total_sequence_length: NDArray[np.int32]
    packed_rows: NDArray[np.int64]
    padded_rows: NDArray[np.int64]
    runs: list[tuple[Graph, ort.IOBinding]]
    ffn_similarity: NDArray[np.float32] | None = None  # of each row, where the graphs take it
    layout: tuple[list[int], list[int]] = ([], [])  # slots and rows that what follows from them was written for

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """All but the hidden states and the caches, by the graph's names."""
        return {
            name: getattr(self, name)
            for name in ("seqlens_k", "query_seqlens", "total_sequence_length", "packed_rows", "padded_rows")
        }

    def arrange(self, slots: list[int], counts: list[int]) -> None:
        """Write which rows belong to which slot; each sequence has a dummy row. Rows beyond take what lies anywhere."""
        self.query_seqlens[:] = 0
        self.packed_rows[:] = 0
        queries, end = self.packed_rows.shape[1], 0
        for slot, count in zip(slots, counts, strict=True):
            at, start, end = slot - min(slots), end, end + count
            self.query_seqlens[at] = count + 1
            self.packed_rows[at, :count] = np.arange(start, end)
            self.padded_rows[0, start:end] = np.arange(at * queries, at * queries + count)
        self.layout = (slots, counts)


class RaggedStack:
    """The blocks of a server half in their ragged variant, over a pool of KV caches.

    Args:
        bundle: of the server; every block must have the variant.
        threads: of onnxruntime.
        capacity: most positions of a session.
        slots: most sessions.

    Attributes:
        onnxruntime_seconds: time spent in onnxruntime so far.

    Raises:
        OSError: the system does not grant the caches' address space; no weights were read.
    """

    def __init__(self, bundle: Bundle, threads: int, *, capacity: int, slots: int) -> None:
        segments = bundle.segments("block")
        self._d_model = bundle.manifest.architecture.d_model
        self._skips_ffn = bundle.manifest.skips_ffn
        layers = range(segments[0].first_layer, segments[-1].last_layer)
        self.pool = KVPool(layers, bundle.kv, capacity, slots)
        self._blocks = [(segment, Graph(bundle.path(segment.ragged_graph_file), threads)) for segment in segments]
        self._rows = row_rule(precisions(segments))
        self._starts = [segment.first_layer for segment in segments]
        self._all_blocks = tuple(range(len(segments)))
        self._lanes: OrderedDict[_Shape, _Lane] = OrderedDict()
        self.onnxruntime_seconds = 0.0

    def session(self, capacity: int, bypass: Bypass = NO_BYPASS) -> RaggedSession:
        """A session of at most ``capacity`` positions, some of which leave something out."""
        cache = self.pool.take(capacity)
        cache.bypass = bypass
        return RaggedSession(self, cache, self._d_model)

    def kv_bytes(self, capacity: int) -> int:
        """Bytes of KV cache that a session of that capacity comes to."""
        return self.pool.session_bytes(capacity)

    def forward(self, parts: Sequence[Part]) -> list[NDArray[np.float32]]:
        """Run hidden states through the layers and append them to their caches.

        A row's bits do not depend on the other parts.

        Args:
            parts: of each cache of the pool, once at most, the next positions' ``[tokens, d_model]``.

        Returns:
            Of each part ``[tokens, d_model]``, in buffers that the next call overwrites.

        Raises:
            RequestError: a part does not fit into its cache; nothing was done.
        """
        for cache, hidden in parts:
            if cache.length + len(hidden) > cache.capacity:
                raise RequestError(
                    f"{cache.length} positions and {len(hidden)} more: this session was opened for {cache.capacity}"
                )
        if any(cache.bypass.blocks for cache, _ in parts):
            return self._in_stretches(parts)
        outputs = self._run(parts, self._all_blocks)
        for cache, hidden in parts:
            cache.length += len(hidden)
        return outputs

    def _in_stretches(self, parts: Sequence[Part]) -> list[NDArray[np.float32]]:
        """Advance parts that are cut where blocks begin to be left out."""
        cuts = [list(stretches(cache.bypass, cache.length, len(hidden))) for cache, hidden in parts]
        if max(map(len, cuts)) == 1:
            return self._advance(parts)
        outputs: list[list[NDArray[np.float32]]] = [[] for _ in parts]
        before = [cache.length for cache, _ in parts]
        try:
            for turn in range(max(map(len, cuts))):
                due = [at for at, rows in enumerate(cuts) if turn < len(rows)]
                rows = self._advance([(parts[at][0], parts[at][1][cuts[at][turn]]) for at in due])
                for at, part in zip(due, rows, strict=True):
                    outputs[at].append(part.copy())
        except BaseException:
            for (cache, _), length in zip(parts, before, strict=True):
                cache.truncate(length)
            raise
        return [np.concatenate(several) for several in outputs]

    def _advance(self, parts: Sequence[Part]) -> list[NDArray[np.float32]]:
        """Run rows each of which goes through the same blocks as the others of its part."""
        runs = [set(running_blocks(cache.bypass, self._starts, cache.length)) for cache, _ in parts]
        rows = [hidden for _, hidden in parts]
        runners = [[at for at, own in enumerate(runs) if block in own] for block in self._all_blocks]
        for together, blocks in groupby(self._all_blocks, runners.__getitem__):
            if together:
                outputs = self._run([(parts[at][0], rows[at]) for at in together], tuple(blocks))
                for at, output in zip(together, outputs, strict=True):
                    rows[at] = output
        for cache, hidden in parts:
            cache.length += len(hidden)
        return rows

    def _run(self, parts: Sequence[Part], blocks: tuple[int, ...]) -> list[NDArray[np.float32]]:
        """Run blocks over the next rows of some caches, whose lengths stay."""
        slots = [self.pool.slot(cache) for cache, _ in parts]
        counts = [len(hidden) for _, hidden in parts]
        ends = list(accumulate(counts))
        first, last = min(slots), max(slots) + 1
        rows = self._rows.fill(ends[-1])
        lane = self._lane((first, last, rows, max(counts) + 1, blocks))
        if lane.layout != (slots, counts):
            lane.arrange(slots, counts)
        # A sequence that rests keeps what it has.
        seqlens = [max(0, self.pool.length(slot) - 1) for slot in range(first, last)]
        for (cache, hidden), slot, count, end in zip(parts, slots, counts, ends, strict=True):
            lane.hidden[0][0, end - count : end] = hidden
            seqlens[slot - first] = cache.length + count
            if lane.ffn_similarity is not None:
                lane.ffn_similarity[0, end - count : end, 0] = cache.bypass.ffn_thresholds(cache.length, count)
        if rows > ends[-1]:
            lane.hidden[0][0, ends[-1] :] = 0
            if lane.ffn_similarity is not None:
                lane.ffn_similarity[0, ends[-1] :] = FFN_NONE
        lane.seqlens_k[:] = seqlens
        lane.total_sequence_length[...] = max(seqlens) + 1
        started = perf_counter()
        for graph, binding in lane.runs:
            graph.run_bound(binding)
        self.onnxruntime_seconds += perf_counter() - started
        output = lane.hidden[len(lane.runs) % 2][0]
        return [output[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def _lane(self, shape: _Shape) -> _Lane:
        lane = self._lanes.get(shape)
        if lane is None:
            lane = self._lanes[shape] = self._bind(*shape)
            if len(self._lanes) > MAX_LANES:
                self._lanes.popitem(last=False)
        self._lanes.move_to_end(shape)
        return lane

    def _bind(self, first: int, last: int, rows: int, queries: int, blocks: tuple[int, ...]) -> _Lane:
        sequences = last - first
        lane = _Lane(
            hidden=[np.zeros((1, rows, self._d_model), np.float32) for _ in range(2)],
            seqlens_k=np.zeros(sequences, np.int32),
            query_seqlens=np.zeros(sequences, np.int32),
            total_sequence_length=np.zeros((), np.int32),
            packed_rows=np.zeros((sequences, queries), np.int64),
            padded_rows=np.zeros((1, rows), np.int64),
            runs=[],
            ffn_similarity=np.zeros((1, rows, 1), np.float32) if self._skips_ffn else None,
        )
        hidden = [ort.OrtValue.ortvalue_from_numpy(buffer) for buffer in lane.hidden]
        inputs = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in lane.inputs.items()}
        caches = self.pool.view(first, last)
        for index, (segment, graph) in enumerate(self._blocks[block] for block in blocks):
            binding = graph.binding()
            binding.bind_ortvalue_input("hidden", hidden[index % 2])
            binding.bind_ortvalue_output("hidden_out", hidden[(index + 1) % 2])
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            if segment.skips_ffn:
                binding.bind_ortvalue_input(FFN_SIMILARITY, ort.OrtValue.ortvalue_from_numpy(lane.ffn_similarity))
            for (side, layer), array in caches.items():
                if segment.first_layer <= layer < segment.last_layer:
                    value = ort.OrtValue.ortvalue_from_numpy(array)
                    binding.bind_ortvalue_input(f"past_{side}.{layer}", value)
                    binding.bind_ortvalue_output(f"present_{side}.{layer}", value)
            lane.runs.append((graph, binding))
        return lane


class RaggedSession:
    """One session's run through a stack whose sessions advance together."""

    def __init__(self, stack: RaggedStack, cache: KVCache, d_model: int) -> None:
        self.cache = cache
        self.d_model = d_model
        self._stack = stack

    @property
    def onnxruntime_seconds(self) -> float:
        """Time that the stack spent in onnxruntime so far, by all sessions."""
        return self._stack.onnxruntime_seconds

    def forward(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Advance alone, see `RaggedStack.forward`."""
        return self._stack.forward([(self.cache, hidden)])[0].copy()

    def append(self, rows: NDArray[Any]) -> None:
        """Append keys and values, see `isthmus.runtime.segments.KVCache.append`."""
        self.cache.append(rows)

    def close(self) -> None:
        """Give the slot back; the session is of no use afterwards."""
        self._stack.pool.give_back(self.cache)
