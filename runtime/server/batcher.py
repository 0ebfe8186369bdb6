"""Which steps advance together: short ones all at once, long ones a bounded piece at a time between them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..wire import isthmus_pb2 as pb
from .compute import ComputeEngine, ComputeSession
from .sessions import Work

logger = logging.getLogger(__name__)

# A step of at most so many rows is short: a token, or a draft to verify. The attention pads all sequences of a run to
# the longest, so that longer ones would cost the others more than a run of their own costs.
SHORT_ROWS = 16

# Rows of a long step in one run: what it may delay the others' next token by. Products of that many rows are as
# fast per row as products of more (measured on SmolLM2: 1.9 ms a row at 32 and at 64, 1.5 at 128, on two busy cores).
PIECE_ROWS = 32

Part = tuple[ComputeSession, NDArray[np.float32], int]


class Batcher:
    """The steps in hand, at most one of each session. It is used from one thread.

    Short steps run together in the order of arrival, at most ``max_batch`` of them. Between two such runs one long step
    runs one piece, and goes to the end of the line. So whatever waits has its turn, and the time to it is bounded.

    Args:
        engine: what runs them.
        max_batch: most steps in one run.
    """

    def __init__(self, engine: ComputeEngine, max_batch: int) -> None:
        self._engine = engine
        self._max_batch = max_batch
        self._short: list[Work] = []
        self._long: list[Work] = []
        self._long_next = False

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def add(self, work: Work) -> None:
        """Take a step in hand."""
        (self._short if work.remaining <= SHORT_ROWS else self._long).append(work)

    def run(self) -> list[tuple[Work, pb.ServerMessage | Exception]]:
        """Run once, if there is a step; of those that came to their end, the answer or why there is none."""
        works = self._choose()
        if not works:
            return []
        failures = self._advance(works)
        ended: list[tuple[Work, pb.ServerMessage | Exception]] = []
        for work, failure in zip(works, failures, strict=True):
            if failure is None and work.remaining:
                self.add(work)
                continue
            if failure is None:
                try:
                    ended.append((work, work.session.finish(work)))
                    continue
                except Exception as error:  # this session's alone
                    failure = error
            ended.append((work, failure))
        return ended

    def _choose(self) -> list[Work]:
        if self._long and (self._long_next or not self._short):
            self._long_next = False
            return [self._long.pop(0)]
        self._long_next = True
        works, self._short = self._short[: self._max_batch], self._short[self._max_batch :]
        return works

    def _advance(self, works: Sequence[Work]) -> list[Exception | None]:
        """Run the next rows of some steps; of each, why that failed."""
        counts = [work.rows(PIECE_ROWS) for work in works]
        parts: list[Part] = [
            (work.compute, work.hidden[work.done : work.done + count], work.wanted if count == work.remaining else 0)
            for work, count in zip(works, counts, strict=True)
        ]
        busy = self._engine.onnxruntime_seconds
        try:
            self._engine.advance(parts)
        except Exception as error:
            if len(works) == 1:
                return [error]
            # Whoever it was, the others must not notice.
            logger.exception("a run of %d sessions failed; each runs alone", len(works))
            return [failure for work in works for failure in self._advance([work])]
        seconds = self._engine.onnxruntime_seconds - busy
        for work, count in zip(works, counts, strict=True):
            work.done += count
            work.onnxruntime_seconds += seconds
        return [None] * len(works)
