"""Opened segments: embedding rows, stacks of layers over a KV cache, the head.

Memory is bound once. A stack keeps input and output buffers for each chunk length it has met, the KV cache is
preallocated and updated in place, and rolling back is a smaller length.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..devices.backend import Graph, require_onnxruntime
from ..devices.row_rule import filled_up, row_rule
from ..errors import RequestError
from ..quant.nbits import PACKED_BITS, PackedWeight, dequantize
from ..quant.stored_rows import StoredRows
from .bundle import FFN_NONE, FFN_SIMILARITY, Bundle, KVSpec, precisions
from .skipping import NO_BYPASS, Bypass, running_blocks, stretches

SIDES = ("key", "value")
MAX_LANES = 8  # chunk lengths whose buffers are kept: one token, the prefill chunk, its remainder, drafts


class Embedding:
    """Rows of the embedding table, read and dequantized one by one."""

    _zero_points: StoredRows | None = None

    def __init__(self, bundle: Bundle) -> None:
        segment = bundle.segments("embed")[0]
        arch = bundle.manifest.architecture
        self._vocab_size, self._d_model = arch.vocab_size, arch.d_model
        self._bits, self._block_size = segment.bits, segment.block_size
        path = bundle.path(segment.data_file)

        def stored(dtype: Any, offset: int, columns: int) -> StoredRows:
            return StoredRows(path, dtype, offset, (arch.vocab_size, columns))

        if segment.bits in PACKED_BITS:
            blocks = -(-arch.d_model // segment.block_size)
            self._rows = stored(np.uint8, segment.codes_offset, blocks * segment.block_size * segment.bits // 8)
            self._scales = stored(np.float32, segment.scales_offset, blocks)
            if not segment.tensors["embedding"].symmetric:
                self._zero_points = stored(np.uint8, segment.zero_points_offset, -(-blocks * segment.bits // 8))
        else:
            dtype = np.float16 if segment.bits == 16 else np.float32
            self._rows = stored(dtype, segment.codes_offset, arch.d_model)

    def rows(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Hidden states ``[tokens, d_model]`` float32 before the first layer.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        _check_ids(token_ids, self._vocab_size)
        stored = self._rows[token_ids]
        if self._bits not in PACKED_BITS:
            return stored.astype(np.float32)
        scales = self._scales[token_ids]
        zero_points = None if self._zero_points is None else self._zero_points[token_ids]
        codes = stored.reshape(*scales.shape, -1)
        return dequantize(PackedWeight(codes, scales, self._d_model, self._bits, self._block_size, zero_points))


class AbsentEmbedding:
    """Stands for the embedding on a device whose server holds it: checks ids, and gives rows that nothing reads."""

    def __init__(self, bundle: Bundle) -> None:
        arch = bundle.manifest.architecture
        self._vocab_size, self._d_model = arch.vocab_size, arch.d_model

    def rows(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Zeros ``[tokens, d_model]``; raises `RequestError` on an id outside the vocabulary."""
        _check_ids(token_ids, self._vocab_size)
        return np.zeros((len(token_ids), self._d_model), np.float32)


def _check_ids(token_ids: list[int], vocab_size: int) -> None:
    for token in (min(token_ids), max(token_ids)):
        if not 0 <= token < vocab_size:
            raise RequestError(f"token id {token}: must lie between 0 and {vocab_size - 1}")


class KVCache:
    """Keys and values of consecutive layers for one session.

    Attributes:
        length: valid positions; the rows beyond are ignored, so that lowering it rolls back.
        capacity: positions that fit.
        arrays: each layer's keys and values.
        bypass: what positions leave out; what the arrays hold of these in left-out blocks is never read.
    """

    def __init__(self, layers: range, spec: KVSpec, capacity: int) -> None:
        # calloc: pages that no position has reached yet take no memory.
        arrays = {(side, layer): np.zeros(spec.shape(capacity), spec.dtype) for layer in layers for side in SIDES}
        self._hold(arrays, capacity)

    @classmethod
    def over(cls, arrays: dict[tuple[str, int], NDArray[Any]], capacity: int) -> KVCache:
        """An empty cache in memory that is there already: of each layer's sides, ``[1, kv_heads, rows, row_width]``."""
        cache = cls.__new__(cls)
        cache._hold(arrays, capacity)
        return cache

    def _hold(self, arrays: dict[tuple[str, int], NDArray[Any]], capacity: int) -> None:
        self.length = 0
        self.bypass: Bypass = NO_BYPASS
        self.capacity = capacity
        self.arrays = arrays

    @cached_property
    def values(self) -> dict[tuple[str, int], ort.OrtValue]:
        """The arrays, as onnxruntime binds them."""
        return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}

    def move(self, arrays: dict[tuple[str, int], NDArray[Any]]) -> None:
        """Copy the valid positions to other memory, and live there from now on."""
        for name, array in arrays.items():
            array[:, :, : self.length] = self.arrays[name][:, :, : self.length]
        self.arrays = arrays

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """A copy of the keys and values of positions ``[first, last)``, as stored.

        Returns:
            ``[layers, 2, kv_heads, positions, row_width]``, keys before values.

        Raises:
            RequestError: the cache holds no such positions.
        """
        if not 0 <= first <= last <= self.length:
            raise RequestError(f"keys and values of positions {first} to {last}: must lie between 0 and {self.length}")
        if not self.arrays:
            return np.empty((0, 2, 0, last - first, 0), np.float32)
        parts = np.stack([array[0, :, first:last] for array in self.arrays.values()])
        return parts.reshape(len(self.arrays) // 2, 2, *parts.shape[1:])

    def append(self, rows: NDArray[Any]) -> None:
        """Append the keys and values of further positions, shaped and stored like `rows`.

        Raises:
            RequestError: they do not fit into the cache.
        """
        last = self.length + rows.shape[3]
        if last > self.capacity:
            raise RequestError(f"{last} positions: this session was opened for {self.capacity}")
        parts = rows.reshape(len(self.arrays), *rows.shape[2:])
        for array, part in zip(self.arrays.values(), parts, strict=True):
            array[0, :, self.length : last] = part
        self.length = last

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise RequestError(f"roll back to {length}: must lie between 0 and {self.length}")
        self.length = length


@dataclass(frozen=True)
class _Lane:
    """Buffers and bindings for one chunk length and the blocks that it runs through.

    Buffers may have a row more than the chunk (`RowRule`), which is filled in and never read. A binding does not keep
    its memory alive: every buffer that one names must be held here.
    """

    buffers: list[NDArray[np.float32]]
    runs: list[tuple[Graph, ort.IOBinding]]
    ffn_similarity: NDArray[np.float32] | None  # of each row, where the graphs take it

    @property
    def hidden_in(self) -> NDArray[np.float32]:
        """What the first block reads, ``[1, rows, d_model]``."""
        return self.buffers[0]

    @property
    def hidden_out(self) -> NDArray[np.float32]:
        """What the last block writes; the blocks alternate between two buffers."""
        return self.buffers[len(self.runs) % 2]


class LayerStack:
    """The blocks of one bundle half, opened once and shared by its sessions.

    Attributes:
        rows: how many the blocks must be run with.
        onnxruntime_seconds: time spent in onnxruntime so far, by all sessions.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        require_onnxruntime(bundle.manifest.minimum_onnxruntime)
        self.manifest = bundle.manifest
        self.kv = bundle.kv
        self.blocks = [(segment, Graph(bundle.graph_path(segment), threads)) for segment in bundle.segments("block")]
        segments = [segment for segment, _ in self.blocks]
        self.starts = [segment.first_layer for segment in segments]
        self.layers = range(segments[0].first_layer, segments[-1].last_layer) if segments else range(0)
        self.rows = row_rule(precisions(segments))
        self.onnxruntime_seconds = 0.0

    def session(self, capacity: int, bypass: Bypass = NO_BYPASS) -> StackSession:
        """A session of at most ``capacity`` positions, some of which leave something out; its KV cache is allocated."""
        cache = KVCache(self.layers, self.kv, capacity)
        cache.bypass = bypass
        return StackSession(self, cache)

    def kv_bytes(self, capacity: int) -> int:
        """Bytes of KV cache that a session of that capacity takes."""
        return self.kv.cache_bytes(len(self.layers), capacity)


class StackSession:
    """One session's run through a stack of layers."""

    def __init__(self, stack: LayerStack, cache: KVCache) -> None:
        self.cache = cache
        self._stack = stack
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._seqlens_value = ort.OrtValue.ortvalue_from_numpy(self._seqlens)
        self._total_value = ort.OrtValue.ortvalue_from_numpy(self._total)
        self._lanes: OrderedDict[tuple[int, tuple[int, ...]], _Lane] = OrderedDict()

    @property
    def d_model(self) -> int:
        """Width of the hidden states."""
        return self._stack.manifest.architecture.d_model

    @property
    def onnxruntime_seconds(self) -> float:
        """Time that the stack spent in onnxruntime so far, by all sessions."""
        return self._stack.onnxruntime_seconds

    def forward(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run hidden states ``[tokens, d_model]`` through the layers and append them to the KV cache.

        Returns:
            Hidden states ``[tokens, d_model]``: a buffer that the next call of the same length overwrites.

        Raises:
            RequestError: they do not fit into the cache.
        """
        tokens = hidden.shape[0]
        cache = self.cache
        if cache.length + tokens > cache.capacity:
            raise RequestError(
                f"{cache.length} positions and {tokens} more: this session was opened for {cache.capacity}"
            )
        if not cache.bypass.blocks:
            return self._run(hidden)
        parts = list(stretches(cache.bypass, cache.length, tokens))
        return np.concatenate([self._run(hidden[rows]).copy() for rows in parts])

    def _run(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run rows that go through the same blocks."""
        cache, tokens = self.cache, len(hidden)
        lane = self._lane(tokens, running_blocks(cache.bypass, self._stack.starts, cache.length))
        rows = lane.hidden_in.shape[1]
        lane.hidden_in[0, :tokens] = hidden
        if rows > tokens:
            lane.hidden_in[0, tokens:] = 0
        if lane.ffn_similarity is not None:
            lane.ffn_similarity[0, :tokens, 0] = cache.bypass.ffn_thresholds(cache.length, tokens)
        # Both count the graph's dummy row.
        self._seqlens[0] = cache.length + rows
        self._total[...] = cache.length + rows + 1
        if lane.runs:  # a stack without layers spends nothing, not next to nothing
            started = perf_counter()
            for graph, binding in lane.runs:
                graph.run_bound(binding)
            self._stack.onnxruntime_seconds += perf_counter() - started
        cache.length += tokens
        return lane.hidden_out[0, :tokens]

    def append(self, rows: NDArray[Any]) -> None:
        """Append keys and values, see `KVCache.append`."""
        self.cache.append(rows)

    def close(self) -> None:
        """Free the KV cache; the session is of no use afterwards."""
        self._lanes.clear()
        del self.cache

    def _lane(self, tokens: int, blocks: tuple[int, ...]) -> _Lane:
        lane = self._lanes.get((tokens, blocks))
        if lane is None:
            lane = self._lanes[tokens, blocks] = self._bind(tokens, blocks)
            if len(self._lanes) > MAX_LANES:
                self._lanes.popitem(last=False)
        self._lanes.move_to_end((tokens, blocks))
        return lane

    def _bind(self, tokens: int, blocks: tuple[int, ...]) -> _Lane:
        shape = (1, self._stack.rows.fill(tokens), self._stack.manifest.architecture.d_model)
        buffers = [np.zeros(shape, np.float32) for _ in range(2)]
        values = [ort.OrtValue.ortvalue_from_numpy(buffer) for buffer in buffers]
        similarity = np.full((*shape[:2], 1), FFN_NONE, np.float32) if self._stack.manifest.skips_ffn else None
        runs = []
        for index, (segment, graph) in enumerate(self._stack.blocks[block] for block in blocks):
            binding = graph.binding()
            binding.bind_ortvalue_input("hidden", values[index % 2])
            binding.bind_ortvalue_output("hidden_out", values[(index + 1) % 2])
            binding.bind_ortvalue_input("seqlens_k", self._seqlens_value)
            binding.bind_ortvalue_input("total_sequence_length", self._total_value)
            if segment.skips_ffn:
                binding.bind_ortvalue_input(FFN_SIMILARITY, ort.OrtValue.ortvalue_from_numpy(similarity))
            for layer in range(segment.first_layer, segment.last_layer):
                for side in SIDES:
                    value = self.cache.values[side, layer]
                    binding.bind_ortvalue_input(f"past_{side}.{layer}", value)
                    binding.bind_ortvalue_output(f"present_{side}.{layer}", value)
            runs.append((graph, binding))
        return _Lane(buffers, runs, similarity)


class Head:
    """Final norm and vocabulary: hidden states to logits.

    Attributes:
        onnxruntime_seconds: time that `logits` spent in onnxruntime so far.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        arch = bundle.manifest.architecture
        segment = bundle.segments("head")[0]
        self._graph = Graph(bundle.graph_path(segment), threads)
        self._rows = row_rule(precisions([segment]))
        self.onnxruntime_seconds = 0.0
        rows = self._rows.fill(1)
        self._hidden = np.zeros((1, rows, arch.d_model), np.float32)
        self._logits = np.zeros((1, rows, arch.vocab_size), np.float32)
        self._binding = self._graph.binding()
        self._binding.bind_ortvalue_input("hidden", ort.OrtValue.ortvalue_from_numpy(self._hidden))
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits ``[vocab_size]`` of one hidden state ``[d_model]``: a buffer that the next call overwrites."""
        self._hidden[0, 0] = hidden
        started = perf_counter()
        self._graph.run_bound(self._binding)
        self.onnxruntime_seconds += perf_counter() - started
        return self._logits[0, 0]

    def logits_many(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits ``[tokens, vocab_size]`` of hidden states ``[tokens, d_model]``, for scoring text."""
        return self._graph.run({"hidden": filled_up(hidden, self._rows)}, "logits")[0, : len(hidden)]
