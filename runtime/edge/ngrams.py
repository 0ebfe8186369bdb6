"""Drafting without a model: what followed the last tokens where they stood before.

Source: prompt look-up decoding (Saxena 2023) and the n-gram matching of LLMA (arXiv 2304.04487). Ours: the text's index
grows with every token, so that a look-up takes microseconds, and the length of the match counts as its confidence.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 6, 1  # tokens of a match


class NGramIndex:
    """Where each run of `SHORTEST` to `LONGEST` tokens of a text last stood."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST + 1)]

    def extend(self, ids: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in ids:
            # A run is known from the moment on that something follows it.
            at = len(self._ids)
            for length in range(SHORTEST, min(LONGEST, at) + 1):
                self._after[length][tuple(self._ids[at - length :])] = at
            self._ids.append(token)

    def follow(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """What the longest match says comes after some ids.

        Args:
            ids: the text, and tokens that may come after it.

        Returns:
            The token, and the length of the match; None if even the shortest run is new.
        """
        for length in range(min(LONGEST, len(ids)), SHORTEST - 1, -1):
            at = self._after[length].get(tuple(ids[len(ids) - length :]))
            if at is not None:
                return self._ids[at], length
        return None
