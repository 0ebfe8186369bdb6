"""Keys and values that earlier sessions computed, for later ones that begin with the same hidden states.

As in vLLM's automatic prefix caching, blocks of positions are kept, each by a hash of all that leads up to its end, and
the one that was used least recently goes first. Here its inner positions are found, too, so that a beginning is shared
to its last token, and frames of one token are not computed when a session is made again. What is hashed here are not
token ids, which the server does not see, but the hidden states as they were decoded: they, and nothing else, make a
position's keys and values, the same bits in whatever chunks they come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..skipping import NO_BYPASS, Bypass
from .compute import ComputeSession

BLOCK = 16  # positions that are kept and forgotten together
ENTRY_BYTES = 4096  # of a block beside its rows, at most: hashes of its positions, their places in dictionaries


class PrefixCache:
    """Blocks of keys and values, found by the hash of what led to any of their positions. It is used from one thread.

    Args:
        max_bytes: that they may take.

    Attributes:
        bytes: that they take.
        asked: rows of steps so far that it might have had.
        reused: of these, those that it had.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # By the hash at its end: of each position the hash, and the rows.
        self._blocks: OrderedDict[bytes, tuple[Sequence[bytes], NDArray[Any]]] = OrderedDict()
        self._block_with: dict[bytes, bytes] = {}  # a block's key, by the hash at any of its positions
        self.bytes = self.asked = self.reused = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, position: bytes) -> tuple[bytes, NDArray[Any]] | None:
        """Key and rows, see `isthmus.runtime.segments.KVCache.rows`, of a block that has a position of this hash."""
        key = self._block_with.get(position)
        return None if key is None else (key, self._blocks[key][1])

    def touch(self, chain: Sequence[bytes]) -> None:
        """Note that a session has used these blocks, the first of which lead to the last: they are to outlive it."""
        for key in reversed(chain):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def add(self, leading: Sequence[bytes], positions: Sequence[bytes], rows: Callable[[], NDArray[Any]]) -> None:
        """Keep a block, unless it is there, or one that leads to it is not, or only these could make room for it.

        Args:
            leading: keys of the blocks before it, from the session's beginning.
            positions: hashes of its own; the last is its key.
            rows: makes a copy of its keys and values.
        """
        key = positions[-1]
        if key not in self._blocks and (not leading or leading[-1] in self._blocks):
            self.touch(leading)
            block, own = rows(), set(leading)
            size = block.nbytes + ENTRY_BYTES
            while self.bytes + size > self._max_bytes:
                oldest = next(iter(self._blocks), None)
                if oldest is None or oldest in own:
                    return
                self._forget(oldest)
            self._blocks[key] = tuple(positions), block
            self._block_with.update(dict.fromkeys(positions, key))
            self.bytes += size
        self.touch([*leading, key])

    def _forget(self, key: bytes) -> None:
        positions, block = self._blocks.pop(key)
        self.bytes -= block.nbytes + ENTRY_BYTES
        for position in positions:
            if self._block_with.get(position) == key:  # else another block begins alike, or did
                del self._block_with[position]


class Prefix:
    """What made the positions of one session, and by that its way to the blocks of others. Used from one thread.

    Args:
        cache: shared with other sessions.
        compute: the session.
        scope: sessions find each other's blocks only if theirs are equal.
        bypass: of the session. What its positions leave out is a part of what made them.
    """

    def __init__(self, cache: PrefixCache, compute: ComputeSession, scope: str, bypass: Bypass = NO_BYPASS) -> None:
        self._cache = cache
        self._compute = compute
        self._bypass = bypass
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
        thresholds = self._bypass.ffn_thresholds(first, len(rows))
        for position, (row, threshold) in enumerate(zip(rows, thresholds, strict=True), first):
            digest = sha256(self._hashes[-1])
            for layer, start in sorted(self._bypass.blocks.items()):
                if start <= position:
                    digest.update(layer.to_bytes(4, "little"))
            digest.update(threshold.tobytes())
            digest.update(row)
            self._hashes.append(digest.digest())
        end = first + len(rows) - last
        used = self._chain(first)
        while (found := self._longest(at, end)) is not None:
            upto, key, block = found
            start = at - at % BLOCK
            self._compute.append_rows(block[:, :, :, at - start : upto - start])
            used.append(key)
            at = upto
        if at > first:
            self._offered = at - at % BLOCK
            self._cache.touch(used)
        self._cache.asked += end - first
        self._cache.reused += at - first
        return at - first

    def offer(self) -> None:
        """Give the cache the blocks that have come to their end in the meantime."""
        self.truncate(self._compute.length)
        for end in range(self._offered + BLOCK, len(self._hashes), BLOCK):
            start = end - BLOCK
            rows = partial(self._compute.rows, start, end)
            self._cache.add(self._chain(start), self._hashes[start + 1 : end + 1], rows)
            self._offered = end

    def _longest(self, at: int, end: int) -> tuple[int, bytes, NDArray[Any]] | None:
        """How far a block goes that has the next positions of this session's, its key, and its rows."""
        for upto in range(min(at - at % BLOCK + BLOCK, end), at, -1):
            if (found := self._cache.find(self._hashes[upto])) is not None:
                return upto, *found
        return None

    def _chain(self, end: int) -> list[bytes]:
        """Keys of the whole blocks up to a position."""
        return self._hashes[BLOCK : end + 1 : BLOCK]
