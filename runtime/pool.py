"""The KV caches of all sessions of a server, side by side, so that onnxruntime can advance them together."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .bundle import KVSpec
from .segments import SIDES, KVCache

Planes = dict[tuple[str, int], NDArray[Any]]


class KVPool:
    """Slots for sessions: of each layer's keys and of its values ``[slots, kv_heads, rows, row_width]``.

    The attention wants one number of rows for all sequences of a batch, so every slot has as many as the longest
    session may need. That costs address space, not memory: a page is there once a position on it was written, and gone
    again when its session ends. The slots in use are the first ones: a freed slot is filled by moving the last session.

    Args:
        layers: whose keys and values these are.
        spec: their layout.
        capacity: most positions of a session.
        slots: most sessions.

    Raises:
        OSError: the system does not grant so much address space.
    """

    def __init__(self, layers: range, spec: KVSpec, capacity: int, slots: int) -> None:
        self.capacity = capacity
        self._layers, self._spec, self._slots = layers, spec, slots
        row_bytes = spec.row_width * np.dtype(spec.dtype).itemsize
        self._row_bytes = row_bytes
        # Whole pages for each head, so that those of a freed slot can be given back.
        step = math.lcm(row_bytes, mmap.PAGESIZE) // row_bytes
        rows = -(-(capacity + spec.spare_rows) // step) * step
        self._shape = (slots, spec.kv_heads, rows, spec.row_width)
        self._slot_bytes = spec.kv_heads * rows * row_bytes
        self._maps = {(side, layer): _reserve(slots * self._slot_bytes) for layer in layers for side in SIDES}
        self._arrays: Planes = {
            name: np.frombuffer(memory, spec.dtype).reshape(self._shape) for name, memory in self._maps.items()
        }
        self._taken: list[KVCache] = []

    def __len__(self) -> int:
        return len(self._taken)

    def session_bytes(self, capacity: int) -> int:
        """Memory that a session of so many positions comes to, in whole pages."""
        pages = -(-(capacity + self._spec.spare_rows) * self._row_bytes // mmap.PAGESIZE)
        return 2 * len(self._layers) * self._spec.kv_heads * pages * mmap.PAGESIZE

    def take(self, capacity: int) -> KVCache:
        """An empty cache for at most so many positions.

        Raises:
            RequestError: more positions than a slot has, or no slot is free.
        """
        if capacity > self.capacity:
            raise RequestError(f"a session of {capacity} positions: at most {self.capacity} fit")
        if len(self._taken) == self._slots:
            raise RequestError(f"all {self._slots} sessions are taken; end one first")
        cache = KVCache.over(self.view(len(self._taken), len(self._taken) + 1), capacity)
        self._taken.append(cache)
        return cache

    def give_back(self, cache: KVCache) -> None:
        """End a cache's use; the last one moves into its slot."""
        slot = self.slot(cache)
        last = self._taken.pop()
        if last is not cache:
            last.move(self.view(slot, slot + 1))
            self._taken[slot] = last
        self._release(len(self._taken))

    def slot(self, cache: KVCache) -> int:
        """Where a cache lies now."""
        return next(slot for slot, taken in enumerate(self._taken) if taken is cache)

    def length(self, slot: int) -> int:
        """Valid positions of the cache in a slot."""
        return self._taken[slot].length

    def view(self, first: int, last: int) -> Planes:
        """The memory of consecutive slots, without a copy."""
        return {name: array[first:last] for name, array in self._arrays.items()}

    def _release(self, slot: int) -> None:
        for name, memory in self._maps.items():
            if hasattr(memory, "madvise"):
                memory.madvise(mmap.MADV_DONTNEED, slot * self._slot_bytes, self._slot_bytes)
            else:
                self._arrays[name][slot] = 0


def _reserve(size: int) -> mmap.mmap:
    """Zeroed memory whose pages come when they are written to, small ones, so that it is what was asked for."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
