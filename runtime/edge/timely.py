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

from .controller import Controller
from .generate import StepReport, Token, total
from .unsent_text import UnsentText

if TYPE_CHECKING:  # gRPC loads only where a server is used
    from .link import RemoteBack

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
        text: that is to be continued.
        back: its session is open, and it `verifies`: several steps may be on their way.
        threshold: probability that the draft must give its token.
        controller: has the deadline, and learns from each answer.
        split: layers of the front.
        layers: of the whole model.
    """

    def __init__(
        self, text: UnsentText, back: RemoteBack, *, threshold: float, controller: Controller, split: int, layers: int
    ) -> None:
        self._text, self._back = text, back
        self._threshold, self._controller = threshold, controller
        self._exit_layers, self._layers = split + 1, layers
        self._due: deque[_Question] = deque()

    def __iter__(self) -> Iterator[Token]:
        """Prefill the prompt, then yield tokens."""
        return self._text.until_end(self._next)

    def _next(self) -> Token:
        text = self._text
        started, busy = perf_counter(), text.front.onnxruntime_seconds
        reports = [StepReport()]
        while text.behind:
            if text.waiting == text.chunk:  # of the prompt: later rows are sent before they are so many
                reports.append(self._back.step(*text.take(), sample=False))
            text.run(text.chunk)
        front_s, onnxruntime_s = perf_counter() - started, text.front.onnxruntime_seconds - busy
        guess, share = text.draft.guesses(text.ids, 1)[0]
        prompt = text.is_prompt
        may_exit = not prompt and share >= self._threshold and text.waiting < text.chunk
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
        waiting, level = self._text.waiting, self._controller.level
        self._back.submit(*self._text.take())
        self._due.append(_Question(waiting, level, perf_counter() - started, prompt))

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
