"""The token loop with drafts: the device guesses tokens, and the server's answer to one frame may confirm several.

A guess is run through the front like a token, and its hidden state is sent; the server chooses the token at every
position and stops at the first that was guessed wrong (speculative decoding, Leviathan et al., arXiv 2211.17192; by
section 8 of the design both sides choose with the same noise, so that equal tokens are all there is to compare). The
tokens are those of the loop without drafts, bit for bit.

With overlap the device does not wait: it guesses on while its steps are on their way and sends what it has, each frame
in the hope that those before it hold. At the first wrong guess it rolls back and starts again; the server skips what is
still on its way. So a text that is guessed well streams at the front's speed, whatever the link's delay is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import ProtocolError
from ..segments import AbsentEmbedding, Embedding, StackSession
from .draft_pace import DraftPace, DraftSource, Guess
from .generate import PREFILL_CHUNK, StepReport, Token, total
from .ngrams import NGramIndex

if TYPE_CHECKING:  # gRPC loads only where a server is used
    from .link import RemoteBack
    from .trained_draft import DraftSession

MAX_DRAFTS = 24  # unanswered ones
_MAX_STEPS = 24  # on their way; the server keeps the results of a few more
_FRAME_DRAFTS = 8  # n-grams' guesses at once: few rows take the front and the server little longer than one
_SURE_MATCH = 0.7  # an n-gram's chance from which the trained draft need not be asked


@dataclass
class DraftCounts:
    """What came of the drafts of one generation.

    Attributes:
        drafted: guesses that were run through the front, whether or not their turn came.
        accepted: those that were right.
        tried: by place after the last confirmed token, from 1: guesses whose turn came.
        right: of them, those that were right.
    """

    drafted: int = 0
    accepted: int = 0
    tried: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)

    def note(self, place: int, right: bool) -> None:
        """Count a guess whose turn came."""
        while len(self.tried) < place:
            self.tried.append(0)
            self.right.append(0)
        self.accepted += right
        self.tried[place - 1] += 1
        self.right[place - 1] += right


@dataclass
class _Step:
    """A step on its way: whether no other one of use was when it was sent, and whether a guess before it was wrong."""

    alone: bool
    stale: bool = False


class DraftedTokens:
    """One generation with drafts.

    Args:
        embedding: of the tokens.
        front: a fresh session, of at least the prompt's and ``max_new_tokens`` positions.
        back: its session is open, and it `verifies`.
        prompt_ids: at least one.
        trained: the trained draft's session, if there is one.
        ngrams: whether n-grams are looked up.
        pace: decides how far to draft.
        length: most unanswered drafts, at most `MAX_DRAFTS`.
        overlap: whether to draft while steps are on their way.
        layers: of the whole model.
        max_new_tokens: that are generated at most.
        end_tokens: that end the text.

    Attributes:
        counts: of the drafts so far.
    """

    def __init__(
        self,
        embedding: Embedding | AbsentEmbedding,
        front: StackSession,
        back: RemoteBack,
        prompt_ids: Sequence[int],
        *,
        trained: DraftSession | None,
        ngrams: bool,
        pace: DraftPace,
        length: int,
        overlap: bool,
        layers: int,
        max_new_tokens: int,
        end_tokens: Sequence[int],
    ) -> None:
        self.counts = DraftCounts()
        self._embedding, self._front, self._back = embedding, front, back
        self._trained = trained
        self._ngrams = NGramIndex() if ngrams else None
        self._pace = pace
        self._length, self._overlap = length, overlap
        self._layers = layers
        self._end_tokens = frozenset(end_tokens)
        self._ids = list(prompt_ids)  # the prompt and the tokens after it: the sure ones, then guesses
        self._sure = len(self._ids)
        self._end = self._sure + max_new_tokens
        self._prompt = self._sure
        self._guesses: deque[tuple[Guess, int]] = deque()  # of the ids from `_sure` on, with their places
        self._next: Guess | None = None  # after all ids, as far as it was asked for
        self._rows: list[NDArray[np.float32]] = []  # hidden states that were not sent yet
        self._sent = 0  # positions that were
        self._sent_at = 0.0
        self._steps: deque[_Step] = deque()
        self._front_s = self._front_onnxruntime_s = 0.0

    def __iter__(self) -> Iterator[Token]:
        """Prefill the prompt, then yield tokens until an end token (yielded too) or ``max_new_tokens``."""
        started = perf_counter()
        reports = self._prefill()
        while self._sure < self._end:
            if self._work():
                continue
            tokens, report = self._take_answer()
            reports.append(report)
            for token, source in tokens:
                yield self._token(token, source, total(reports), perf_counter() - started)
                if token in self._end_tokens:
                    return
                started, reports = perf_counter(), [StepReport()]

    def _prefill(self) -> list[StepReport]:
        """Send the prompt; its last chunk asks for the first token."""
        chunk = min(self._back.chunk_limit(), PREFILL_CHUNK)
        reports = [StepReport()]
        for first in range(0, self._sure - chunk, chunk):
            self._run_front(chunk)
            reports.append(self._back.step(self._rows.pop(), first, self._ids[first : first + chunk], sample=False))
            self._sent += chunk
        self._run_front(self._sure - self._sent)
        self._send()
        if self._ngrams is not None:
            self._ngrams.extend(self._ids)
        return reports

    def _work(self) -> bool:
        """Do the next thing that need not wait for an answer; whether there was one."""
        if self._front.cache.length < self._sure:
            self._run_front(self._sure - self._front.cache.length)
            if self._overlap:
                self._send()
            return True
        if self._steps and (not self._overlap or self._back.answered() or len(self._steps) >= _MAX_STEPS):
            return False
        if self._draft():
            # No faster than the server takes them: more rows in a frame cost it less.
            if self._overlap and perf_counter() - self._sent_at >= self._pace.server_s:
                self._send()
            return True
        if self._rows:
            self._send()
            return True
        return False

    def _run_front(self, tokens: int) -> None:
        """Run the next ids through the front."""
        begun, busy = perf_counter(), self._front.onnxruntime_seconds
        at = self._front.cache.length
        hidden = self._front.forward(self._embedding.rows(self._ids[at : at + tokens])).copy()
        self._front_s += perf_counter() - begun
        self._front_onnxruntime_s += self._front.onnxruntime_seconds - busy
        self._rows.append(hidden)
        if self._trained is not None:
            self._trained.observe(hidden)

    def _send(self) -> None:
        """Submit the hidden states that were not sent yet."""
        hidden = np.concatenate(self._rows)
        end = self._sent + len(hidden)
        drafted = min(len(hidden), max(0, end - self._sure))
        self._steps.append(_Step(alone=all(step.stale for step in self._steps)))
        self._back.submit(hidden, self._sent, self._ids[self._sent : end], drafted=drafted)
        self._rows, self._sent, self._sent_at = [], end, perf_counter()

    def _draft(self) -> bool:
        """Guess the next tokens and run them through the front; whether it was worth it."""
        begun, before = perf_counter(), len(self._ids)
        room = min(self._sure + self._length, self._end - 1) - before
        most = min(room, _FRAME_DRAFTS, self._back.chunk_limit() - sum(map(len, self._rows)))
        source: DraftSource = "ngram"
        while len(self._ids) - before < most and source == "ngram":  # the trained draft needs each one's hidden state
            guess = self._guess()
            if guess is None or guess.token in self._end_tokens or not self._pays(guess):
                break
            self._guesses.append((guess, len(self._ids) - self._sure + 1))
            self._ids.append(guess.token)
            self._next, source = None, guess.source
        drafts = len(self._ids) - before
        if not drafts:
            return False
        self._run_front(drafts)
        self.counts.drafted += drafts
        self._pace.drafted(source, (perf_counter() - begun) / drafts)
        return True

    def _guess(self) -> Guess | None:
        """The likeliest token after all ids; None if there is none, or the front must run first."""
        if self._next is not None:
            return self._next
        found = self._ngrams.follow(self._ids) if self._ngrams is not None else None
        best = self._pace.ngram(*found) if found is not None else None
        if self._trained is not None and (best is None or best.chance < _SURE_MATCH):
            if self._front.cache.length < len(self._ids):
                return None
            trained = self._pace.trained(*self._trained.guess(self._ids))
            best = trained if best is None or trained.chance >= best.chance else best
        self._next = best
        return best

    def _pays(self, guess: Guess) -> bool:
        return self._pace.pays(guess, [before for before, _ in self._guesses], overlap=self._overlap)

    def _take_answer(self) -> tuple[list[tuple[int, str]], StepReport]:
        """Wait for the oldest step's tokens, and roll back what was guessed wrong.

        Returns:
            The new tokens with their sources, and what the step cost.
        """
        step = self._steps.popleft()
        prompt = self._sure == self._prompt
        tokens, report = self._back.collect()
        if step.stale != (not tokens):
            raise ProtocolError(
                "BAD_RESULT",
                "the server went on from a wrong guess, or did not from a right one; it breaks the protocol",
            )
        if step.alone and tokens and not prompt:
            self._pace.answered(report.wait_s, report.server_decode_s + report.server_compute_s)
        return [(token, self._confirm(token)) for token in tokens], report

    def _confirm(self, token: int) -> str:
        """Take the next sure token; its source."""
        if self._ngrams is not None:
            self._ngrams.extend([token])
        guess, place = self._guesses.popleft() if self._guesses else (self._next, 0)
        right = guess is not None and guess.token == token
        if guess is not None:
            self._pace.learn(guess, right)
        if place:
            self.counts.note(place, right)
        at = self._sure
        self._sure += 1
        if guess is not None and place and right:
            return guess.source
        self._ids[at:] = [token]
        self._guesses.clear()
        self._next = None
        self._front.cache.truncate(min(self._front.cache.length, at))
        if self._trained is not None:
            self._trained.truncate(at)
        self._rows, self._sent = [], min(self._sent, at)
        for step in self._steps:
            step.stale = True
        return "server"

    def _token(self, token: int, source: str, report: StepReport, seconds: float) -> Token:
        front_s, self._front_s = self._front_s, 0.0
        front_onnxruntime_s, self._front_onnxruntime_s = self._front_onnxruntime_s, 0.0
        return Token(
            id=token,
            source=source,
            layers=self._layers,
            bytes_up=report.bytes_up,
            bytes_down=report.bytes_down,
            front_s=front_s,
            front_onnxruntime_s=front_onnxruntime_s,
            total_s=seconds,
            report=report,
        )
