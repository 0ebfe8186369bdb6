"""The token loop with early exit: where the draft is sure enough, the device takes its token and asks nobody.

The draft (one layer over the front's hidden states, and a head) is the exit; how sure it must be is calibrated, see
`isthmus.runtime.exits`. The hidden states of positions whose tokens were exited wait, and ride with the next frame that
asks for a token: the server's layers see every position once and in order, so that its KV cache is that of a run which
was given the exited tokens as a prompt. What waits at the text's end is not sent. A frame is an ordinary step, so that
sessions are journalled and made again as without exits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import LinkError, ProtocolError
from ..segments import AbsentEmbedding, Embedding, StackSession
from .generate import PREFILL_CHUNK, Move, StepReport, Token, total

if TYPE_CHECKING:  # gRPC loads only where a server is used
    from .link import RemoteBack
    from .trained_draft import DraftSession

logger = logging.getLogger(__name__)


class ExitTokens:
    """One generation with exits; greedy, as the calibration is.

    Args:
        embedding: of the tokens.
        front: a fresh session, of at least the prompt's and ``max_new_tokens`` positions.
        back: its session is open.
        prompt_ids: at least one.
        draft: a fresh session.
        threshold: probability that the draft must give its token.
        alone: whether the device goes on with the draft when the server is lost.
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
        alone: bool,
        split: int,
        layers: int,
        max_new_tokens: int,
        end_tokens: Sequence[int],
    ) -> None:
        self._embedding, self._front, self._back, self._draft = embedding, front, back, draft
        self._threshold, self._may_go_on = threshold, alone
        self._exit_layers, self._layers = split + 1, layers
        self._ids = list(prompt_ids)
        self._prompt = len(self._ids)
        self._max_new_tokens, self._end_tokens = max_new_tokens, frozenset(end_tokens)
        self._chunk = min(back.chunk_limit(), PREFILL_CHUNK)  # most rows of a frame
        self._unsent: list[NDArray[np.float32]] = []  # of the last positions
        self._waiting = 0  # their number
        self._lost = False

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
        reports: list[StepReport] = []
        while (first := self._front.cache.length) < len(self._ids):
            if self._waiting == self._chunk:
                reports.append(self._send(sample=False))
            ids = self._ids[first : first + self._chunk - self._waiting]
            hidden = self._front.forward(self._embedding.rows(ids)).copy()
            self._draft.observe(hidden)
            self._unsent.append(hidden)
            self._waiting += len(ids)
        front_s, onnxruntime_s = perf_counter() - started, self._front.onnxruntime_seconds - busy
        guess, share = self._draft.guesses(self._ids, 1)[0]
        sure = share >= self._threshold
        source, chosen = ("exit" if sure else "local"), guess
        if not self._lost and (not sure or len(self._ids) == self._prompt):  # the prompt need not wait for company
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
        rows, waiting = np.concatenate(self._unsent), self._waiting
        self._unsent, self._waiting = [], 0
        if self._lost:
            return StepReport()
        position = self._front.cache.length - waiting
        started, sent_before = perf_counter(), self._back.bytes_up
        try:
            return self._back.step(rows, position, self._ids[position : position + waiting], sample=sample)
        except LinkError as error:
            if not self._may_go_on:
                raise
            logger.warning("%s; from token %d on the device goes on with its draft", error, len(self._ids) + 1)
        self._lost = True
        seconds, bytes_up = perf_counter() - started, self._back.bytes_up - sent_before
        self._back.moves = (*self._back.moves, Move("local", len(self._ids) + 1, "", 0, bytes_up, seconds))
        self._back.close(cancel=True)
        return StepReport(bytes_up=bytes_up, wait_s=seconds)
