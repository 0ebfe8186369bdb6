"""The token loop with early exit: where the draft is sure enough, the device takes its token and asks nobody.

The draft (one layer over the front's hidden states, and a head) is the exit; how sure it must be is calibrated, see
`isthmus.runtime.exits`. The hidden states of positions whose tokens were exited wait, and ride with the next frame that
asks for a token: the server's layers see every position once and in order, so that its KV cache is that of a run which
was given the exited tokens as a prompt. What waits at the text's end is not sent. A frame is an ordinary step, so that
sessions are journalled and made again as without exits.

A device that may go on without its server keeps all hidden states: when one grants a session again, it gets them all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING

from ...errors import LinkError, ProtocolError
from .generate import Move, StepReport, Token, total
from .unsent_text import UnsentText

if TYPE_CHECKING:  # gRPC loads only where a server is used
    from .link import RemoteBack
    from .server_watch import ServerWatch

logger = logging.getLogger(__name__)


class ExitTokens:
    """One generation with exits; greedy, as the calibration is.

    Args:
        text: that is to be continued.
        back: its session is open.
        threshold: probability that the draft must give its token.
        alone: whether the device goes on with the draft when the server is lost, until there is one again; the text
            keeps what was sent then.
        split: layers of the front.
        layers: of the whole model.
    """

    def __init__(
        self, text: UnsentText, back: RemoteBack, *, threshold: float, alone: bool, split: int, layers: int
    ) -> None:
        self._text, self._back = text, back
        self._threshold, self._may_go_on = threshold, alone
        self._exit_layers, self._layers = split + 1, layers
        self._lost = False
        self._watch: ServerWatch | None = None

    def __iter__(self) -> Iterator[Token]:
        """Prefill the prompt, then yield tokens."""
        try:
            yield from self._text.until_end(self._next)
        finally:
            if self._watch is not None:
                self._watch.stop()

    def _next(self) -> Token:
        text = self._text
        started, busy = perf_counter(), text.front.onnxruntime_seconds
        reports: list[StepReport] = []
        if self._watch is not None and self._watch.found:
            reports.append(self._rejoin())
        while text.behind:
            while text.waiting >= text.chunk:  # more than that after a session could not be begun anew
                reports.append(self._send(sample=False))
            text.run(text.chunk - text.waiting)
        front_s, onnxruntime_s = perf_counter() - started, text.front.onnxruntime_seconds - busy
        guess, share = text.draft.guesses(text.ids, 1)[0]
        sure = share >= self._threshold
        source, chosen = ("exit" if sure else "local"), guess
        if not self._lost and (not sure or text.is_prompt):  # the prompt need not wait for company
            report = self._send(sample=not sure)
            reports.append(report)
            if not sure and not self._lost:
                if report.token is None:
                    raise ProtocolError("BAD_RESULT", "the step asked for a token and its result holds none")
                source, chosen = "server", report.token
        report = total(reports) if reports else StepReport()
        return Token(
            id=chosen,
            source=source,
            layers=self._layers if source == "server" else self._exit_layers,
            bytes_up=report.bytes_up,
            bytes_down=report.bytes_down,
            front_s=front_s,
            front_onnxruntime_s=onnxruntime_s,
            total_s=perf_counter() - started,
            report=report,
        )

    def _send(self, *, sample: bool) -> StepReport:
        """Send the hidden states that wait; where the server is lost and the device may, go on without it."""
        step = self._text.take()
        if self._lost:
            return StepReport()
        started, sent_before = perf_counter(), self._back.bytes_up
        try:
            return self._back.step(*step, sample=sample)
        except LinkError as error:
            if not self._may_go_on:
                raise
            number = len(self._text.ids) + 1
            logger.warning("%s; from token %d on the device goes on with its draft", error, number)
            report = self._left(error, sent_before, started)
        self._back.moves = (*self._back.moves, Move("local", number, "", 0, report.bytes_up, report.wait_s))
        return report

    def _rejoin(self) -> StepReport:
        """Begin the session anew on a server and send it all hidden states; stay alone if that fails."""
        started, text = perf_counter(), self._text
        self._watch = None
        text.unsend()
        sent = text.waiting
        try:
            self._back.reopen()
            reports = []
            while text.waiting:
                reports.append(self._back.step(*text.take(), sample=False))
        except LinkError as error:
            logger.warning("%s; the device still goes on with its draft", error)
            return self._left(error, 0, started)
        self._lost = False
        report, seconds = total(reports), perf_counter() - started
        move = Move("server", len(text.ids) + 1, "hidden", sent, report.bytes_up, seconds)
        self._back.moves = (*self._back.moves, move)
        return report

    def _left(self, error: LinkError, sent_before: int, started: float) -> StepReport:
        """Give the server up until there is one again; what was sent to it in vain."""
        self._lost = True
        self._watch = self._back.watch(error)
        bytes_up = self._back.bytes_up - sent_before
        self._back.close(cancel=True)
        return StepReport(bytes_up=bytes_up, wait_s=perf_counter() - started)
