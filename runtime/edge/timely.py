"""The token loop with a deadline that the draft keeps: where the server's answer is late, its token is the draft's.

Every token is asked for. The device waits until shortly before the deadline; if the answer is not there, it takes the
draft's token, provided that the draft is sure enough, and goes on. What the server chose comes later and counts for
nothing: the next frame holds the hidden state of the token that was taken, so that the server's layers see every
position once and in order, and the next answer is that of the full model after the same tokens. As in
`isthmus.runtime.edge.exiting` a frame is an ordinary step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..segments import AbsentEmbedding, Embedding, StackSession
from .controller import Controller
from .generate import PREFILL_CHUNK, StepReport, Token, total

if TYPE_CHECKING:  # gRPC loads only where a server is used
    from .link import RemoteBack
    from .trained_draft import DraftSession

RESERVE_S = 0.002  # before the deadline, in which the draft's token is handed on
_MOST_DUE = 8  # answers; while so many are due, nothing more is asked for


class _Question(NamedTuple):
    """A frame that asks for a token and was not answered yet."""

    rows: int
    level: int
    device_s: float
    prompt: bool


class TimelyTokens:
    """One generation; greedy, as there is no other calibration.

    Args:
        embedding: of the tokens.
        front: a fresh session, of at least the prompt's and ``max_new_tokens`` positions.
        back: its session is open, and it `verifies`: several steps may be on their way.
        prompt_ids: at least one.
        draft: a fresh session.
        threshold: probability that the draft must give its token.
        controller: has the deadline, and learns from each answer.
        split: layers of the front.
        layers: of the whole model.
        max_new_tokens: that are generated at most.
        end_tokens: that end the text.
    """

    def __init__(
        self,
        embedding: Embedding | AbsentEmbedding,
        front: StackSession,
        back: RemoteBack,
        prompt_ids: Sequence[int],
        *,
        draft: DraftSession,
        threshold: float,
        controller: Controller,
        split: int,
        layers: int,
        max_new_tokens: int,
        end_tokens: Sequence[int],
    ) -> None:
        self._embedding, self._front, self._back, self._draft = embedding, front, back, draft
        self._threshold, self._controller = threshold, controller
        self._exit_layers, self._layers = split + 1, layers
        self._ids = list(prompt_ids)
        self._prompt = len(self._ids)
        self._max_new_tokens, self._end_tokens = max_new_tokens, frozenset(end_tokens)
        self._chunk = min(back.chunk_limit(), PREFILL_CHUNK)  # most rows of a frame
        self._unsent: list[NDArray[np.float32]] = []  # of the last positions
        self._waiting = 0  # their number
        self._due: deque[_Question] = deque()

    def __iter__(self) -> Iterator[Token]:
        """Prefill the prompt, then yield tokens until an end token (yielded too) or ``max_new_tokens``."""
        for _ in range(self._max_new_tokens):
            token = self._next()
            self._ids.append(token.id)
            yield token
            if token.id in self._end_tokens:
                return

    def _next(self) -> Token:
        started, busy = perf_counter(), self._front.onnxruntime_seconds
        reports = [StepReport()]
        while (first := self._front.cache.length) < len(self._ids):
            if self._waiting == self._chunk:  # of the prompt: later rows are sent before they are so many
                rows, position, ids = self._take_unsent()
                reports.append(self._back.step(rows, position, ids, sample=False))
            hidden = self._front.forward(self._embedding.rows(self._ids[first : first + self._chunk])).copy()
            self._draft.observe(hidden)
            self._unsent.append(hidden)
            self._waiting += len(hidden)
        front_s, onnxruntime_s = perf_counter() - started, self._front.onnxruntime_seconds - busy
        guess, share = self._draft.guesses(self._ids, 1)[0]
        prompt = len(self._ids) == self._prompt
        may_exit = not prompt and share >= self._threshold and self._waiting < self._chunk
        level = self._controller.level
        token, asked = None, False
        while token is None:
            if not asked and len(self._due) < _MOST_DUE:
                self._ask(started, prompt)
                asked = True
            if may_exit:
                left_s = started + self._controller.deadline_s - RESERVE_S - perf_counter()
                if not self._back.answered(within_s=max(0.0, left_s)):
                    break
            answer, report = self._take_answer(reports)
            reports.append(report)
            if asked and not self._due:
                token = answer
        report = total(reports)
        return Token(
            id=guess if token is None else token,
            source="exit" if token is None else "server",
            layers=self._exit_layers if token is None else self._layers,
            bytes_up=report.bytes_up,
            bytes_down=report.bytes_down,
            front_s=front_s,
            front_onnxruntime_s=onnxruntime_s,
            total_s=perf_counter() - started,
            report=report,
            level=None if token is None else level,
        )

    def _ask(self, started: float, prompt: bool) -> None:
        """Send what was not sent yet, and ask for the token after it."""
        waiting, level = self._waiting, self._controller.level
        self._back.submit(*self._take_unsent())
        self._due.append(_Question(waiting, level, perf_counter() - started, prompt))

    def _take_unsent(self) -> tuple[NDArray[np.float32], int, list[int]]:
        """The hidden states that were not sent yet, the first one's position, and their tokens."""
        rows, waiting = np.concatenate(self._unsent), self._waiting
        self._unsent, self._waiting = [], 0
        position = self._front.cache.length - waiting
        return rows, position, self._ids[position : position + waiting]

    def _take_answer(self, reports: Sequence[StepReport]) -> tuple[int, StepReport]:
        """Wait for the token that was asked for first, and tell the controller what it took."""
        question = self._due.popleft()
        (token,), report, bytes_up = self._back.collect()
        self._controller.observe(
            bytes_up=total([*reports, report]).bytes_up if question.prompt else bytes_up,
            device_s=question.device_s,
            server_s=report.server_s,
            link_s=report.wait_s - report.server_s,
            prompt=question.prompt,
            alone=question.rows == 1 and question.level == self._controller.level,
        )
        return token, report
