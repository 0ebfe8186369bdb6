"""Keys and values that earlier sessions computed, for later ones that begin with the same hidden states.

As in vLLM's automatic prefix caching, whole blocks of positions are kept, each by a hash of all that leads up to its
end, and the one that was used least recently goes first. What is hashed here are not token ids, which the server does
not see, but the hidden states as they were decoded: they, and nothing else, make a position's keys and values, the same
bits in whatever chunks they come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compute import ComputeSession

BLOCK = 16  # positions; a shared beginning is reused up to a multiple of it
_ENTRY_BYTES = 512  # of a block beside its rows: key, array object, place in the order


class PrefixCache:
    """Blocks of keys and values by the hash of what made them. It is used from one thread.

    Args:
        max_bytes: that they may take.

    Attributes:
        bytes: that they take.
        asked: rows of steps so far that it might have had.
        reused: of these, those that it had.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, NDArray[Any]] = OrderedDict()
        self.bytes = self.asked = self.reused = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> NDArray[Any] | None:
        """A block's rows, see `isthmus.runtime.segments.KVCache.rows`."""
        return self._blocks.get(key)

    def touch(self, chain: Sequence[bytes]) -> None:
        """Note that a session has used these blocks, the first of which lead to the last: they are to outlive it."""
        for key in reversed(chain):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def add(self, chain: Sequence[bytes], rows: Callable[[], NDArray[Any]]) -> None:
        """Keep a block, unless it is there, or one that leads to it is not, or only these could make room for it.

        Args:
            chain: keys of the blocks of a session up to this one.
            rows: makes a copy of its keys and values.
        """
        *leading, key = chain
        if key not in self._blocks and (not leading or leading[-1] in self._blocks):
            self.touch(leading)
            block, own = rows(), set(leading)
            size = block.nbytes + _ENTRY_BYTES
            while self.bytes + size > self._max_bytes:
                oldest = next(iter(self._blocks), None)
                if oldest is None or oldest in own:
                    return
                self.bytes -= self._blocks.pop(oldest).nbytes + _ENTRY_BYTES
            self._blocks[key] = block
            self.bytes += size
        self.touch(chain)


class Prefix:
    """What made the positions of one session, and by that its way to the blocks of others. Used from one thread.

    Args:
        cache: shared with other sessions.
        compute: the session.
        scope: sessions find each other's blocks only if theirs are equal.
    """

    def __init__(self, cache: PrefixCache, compute: ComputeSession, scope: str) -> None:
        self._cache = cache
        self._compute = compute
        self._hashes = [sha256(scope.encode()).digest()]  # by a number of positions: of the hidden states up to there
        self._offered = 0  # positions whose blocks the cache has, or did not want

    def truncate(self, length: int) -> None:
        """Forget what was behind so many positions."""
        del self._hashes[length + 1 :]
        self._offered = min(self._offered, length - length % BLOCK)

    def reuse(self, hidden: NDArray[np.float32], last: int) -> int:
        """Append to the session what the cache has of the next positions.

        Args:
            hidden: their hidden states, ``[tokens, d_model]``.
            last: how many of the last rows must be computed anyway.

        Returns:
            How many of the first rows need not run any more.
        """
        first = at = self._compute.length
        self.truncate(first)
        if len(self._hashes) <= first:
            return 0  # keys and values that a device has sent: nobody knows what made them
        rows = np.ascontiguousarray(hidden)
        for row in rows:
            digest = sha256(self._hashes[-1])
            digest.update(row)
            self._hashes.append(digest.digest())
        end = first + len(rows) - last
        for block_end in range(first - first % BLOCK + BLOCK, end + 1, BLOCK):
            block = self._cache.get(self._hashes[block_end])
            if block is None:
                break
            self._compute.append_rows(block[:, :, :, at - block_end + BLOCK :])
            at = block_end
        if at > first:
            self._offered = at
            self._cache.touch(self._chain(at))
        self._cache.asked += end - first
        self._cache.reused += at - first
        return at - first

    def offer(self) -> None:
        """Give the cache the blocks that have come to their end in the meantime."""
        self.truncate(self._compute.length)
        for end in range(self._offered + BLOCK, len(self._hashes), BLOCK):
            self._cache.add(self._chain(end), partial(self._compute.rows, end - BLOCK, end))
            self._offered = end

    def _chain(self, end: int) -> list[bytes]:
        """Keys of the blocks up to a position."""
        return self._hashes[BLOCK : end + 1 : BLOCK]
