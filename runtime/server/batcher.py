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

# A step of at most so many rows is short: a token, or a few drafts to verify. The attention pads all sequences of a run
# to the longest, so that a longer one would cost the others more than a run of its own costs.
SHORT_ROWS = 8

# Rows of short steps in one run, and of long ones: what may come between a session and its next token. Products are as
# fast per row from about 16 rows on (measured on SmolLM2, 8 bits: 1.5 to 2 ms a row at 16, 32, 64 and 128 on two cores
# that were shared), so that smaller pieces of a prompt cost nothing but their number.
SHORT_RUN_ROWS = 64
LONG_RUN_ROWS = 32

Part = tuple[ComputeSession, NDArray[np.float32], int]
Run = tuple[Work, int]  # a step, and how many of its rows run next


class Batcher:
    """The steps in hand, at most one of each session. It is used from one thread.

    Short steps run together in the order of arrival, at most ``max_batch`` of them. Between two such runs long steps
    run a piece, the first of their line or as many as fit, and go to the end of the line. So whatever waits has its
    turn, and the time to it is bounded.

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
        self.runs = self.steps_run = 0  # so far; a long step counts for each of its pieces

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def add(self, work: Work) -> None:
        """Take a step in hand."""
        (self._short if work.remaining <= SHORT_ROWS else self._long).append(work)

    def run(self) -> list[tuple[Work, pb.ServerMessage | Exception]]:
        """Run once, if there is a step; of those that came to their end, the answer or why there is none."""
        chosen = self._choose()
        if not chosen:
            return []
        self.runs += 1
        self.steps_run += len(chosen)
        works = [work for work, _ in chosen]
        failures = self._advance(chosen)
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

    def _choose(self) -> list[Run]:
        if self._long and (self._long_next or not self._short):
            self._long_next = False
            return self._fill(self._long, LONG_RUN_ROWS)
        self._long_next = True
        return self._fill(self._short, SHORT_RUN_ROWS)

    def _fill(self, line: list[Work], room: int) -> list[Run]:
        """Steps from the beginning of a line, each with the rows of it that fit; the first one has its turn anyway."""
        chosen: list[Run] = []
        while line and room > 0 and len(chosen) < self._max_batch:
            count = line[0].rows(room)
            if chosen and count > room:
                break
            chosen.append((line.pop(0), count))
            room -= count
        return chosen

    def _advance(self, chosen: Sequence[Run]) -> list[Exception | None]:
        """Run the next rows of some steps; of each, why that failed."""
        parts: list[Part] = [
            (work.compute, work.hidden[work.done : work.done + count], work.wanted if count == work.remaining else 0)
            for work, count in chosen
        ]
        busy = self._engine.onnxruntime_seconds
        try:
            self._engine.advance(parts)
        except Exception as error:
            if len(chosen) == 1:
                return [error]
            # Whoever it was, the others must not notice.
            logger.exception("a run of %d sessions failed; each runs alone", len(chosen))
            return [failure for run in chosen for failure in self._advance([run])]
        seconds = self._engine.onnxruntime_seconds - busy
        for work, count in chosen:
            work.done += count
            work.onnxruntime_seconds += seconds
        return [None] * len(chosen)
