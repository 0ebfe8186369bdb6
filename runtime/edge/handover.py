"""A session that moves: begun on a device that holds the whole model, handed over to the server, and taken back.

Source: arXiv 2511.04002, whose split is a point (w, l) in tokens and layers (B_kv and B_io there, of which we have seen
reviews only): the device generates alone up to token w, runs that token through the layers below l and passes the rest
on, either with the KV cache (I_kv = 1) or with the hidden states of all w tokens, from which the server makes its KV
cache itself (I_kv = 0). Ours: the layers below l stay on the device, so that of the cache only the server's layers
are sent, and from then on one hidden state a token; and a session comes back when the server is lost, and moves there
again once it, or another one, grants sessions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...errors import LinkError, RequestError
from ..back import BackEngine, BackSession
from ..bundle import Manifest
from ..sampling import Sampling
from ..skipping import NO_BYPASS, Bypass
from .generate import PREFILL_CHUNK, Move, Replay, StepReport, Token, total

if TYPE_CHECKING:  # gRPC loads only where a server is used
    from .link import RemoteBack
    from .server_watch import ServerWatch

logger = logging.getLogger(__name__)

Send = Literal["kv", "hidden"]

LATE_TOKENS = 2  # in a row, until a deadline counts as missed: one may be a hiccup


@dataclass(frozen=True)
class HandOver:
    """When a session moves to the server, and what it takes along. Whichever comes first of the two times counts.

    Attributes:
        at: number of the token in the middle of which it moves, counted from 1 over prompt and generated ones.
        send: ``kv``, keys and values of the server's layers, or ``hidden``, the hidden states at the split.
        deadline_s: it moves once the device has taken longer for `LATE_TOKENS` tokens in a row, the first aside.

    Raises:
        RequestError: a value out of its bounds, or neither time.
    """

    at: int | None = None
    send: Send = "hidden"
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.at is None and self.deadline_s is None:
            raise RequestError("a hand-over at no time: give the token or a deadline")
        if self.at is not None and self.at < 1:
            raise RequestError(f"hand-over at token {self.at}: must be at least 1, the first token of the prompt")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise RequestError(f"hand-over by a deadline of {self.deadline_s} s: must be positive")
        if self.send not in get_args(Send):
            raise RequestError(f"hand-over of {self.send!r}: must be one of {', '.join(get_args(Send))}")

    @classmethod
    def within(cls, manifest: Manifest, kv_bytes: int, send: Send = "hidden") -> HandOver:
        """At the first token at which the device's KV cache would pass ``kv_bytes``."""
        token_bytes = sum(spec.token_bytes(manifest.half_layers(half)) for half, spec in manifest.kv.items())
        return cls(max(0, kv_bytes) // token_bytes + 1, send)


class OwnBack:
    """The layers behind the split and the head on the device itself.

    Args:
        engine: opens them, when the first step needs them, and gives the same ones afterwards.
    """

    source = "local"
    round_trips = 0
    moves: Sequence[Move] = ()
    replays: Sequence[Replay] = ()

    def __init__(self, engine: Callable[[], BackEngine]) -> None:
        self._engine = engine
        self._session: BackSession | None = None

    def open(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int], bypass: Bypass = NO_BYPASS) -> None:
        """Begin a session; it takes memory from its first step on."""
        self._opening = max_tokens, sampling, list(context_ids), bypass
        self._session = None

    @property
    def length(self) -> int:
        """Positions that these layers have seen."""
        return self._session.length if self._session is not None else 0

    @property
    def history(self) -> list[int]:
        """What the repetition penalty counts, see `BackSession.history`."""
        return self._session.history if self._session is not None else self._opening[2]

    def chunk_limit(self) -> int:
        """Most tokens in one step."""
        return PREFILL_CHUNK

    def step(
        self, hidden: NDArray[np.float32], position: int, token_ids: Sequence[int] = (), *, sample: bool
    ) -> StepReport:
        """Run hidden states through the layers; choose the token after the last, if asked for."""
        session, engine = self._opened(), self._engine()
        started, busy = perf_counter(), engine.onnxruntime_seconds
        self.truncate(position)
        session.advance(hidden)
        token = session.sample() if sample else None
        onnxruntime_s = engine.onnxruntime_seconds - busy
        return StepReport(token=token, wait_s=perf_counter() - started, onnxruntime_s=onnxruntime_s)

    def accept(self, token: int, length: int) -> None:
        """Take note of a token that was chosen elsewhere after ``length`` positions."""
        self._opened().accept(token, length)

    def rows(self, first: int, last: int) -> NDArray[np.generic]:
        """Keys and values of positions that these layers have seen, see `isthmus.runtime.segments.KVCache.rows`."""
        return self._opened().rows(first, last)

    def truncate(self, length: int) -> None:
        """Roll back to ``length`` positions, if there are more."""
        if length < self.length:
            self._opened().truncate(length)

    def close(self, *, cancel: bool = False) -> None:
        """Free the KV cache."""
        self._session = None

    def _opened(self) -> BackSession:
        if self._session is None:
            self._session = self._engine().new_session(*self._opening)
        return self._session


class MovingBack:
    """The back half of a model that the device holds, too: here or on the server, and on the other side after a move.

    It keeps the hidden states at the split of all positions, ``4 * d_model`` bytes each: whichever side goes on runs
    its layers over what they have not seen of them. With the codec ``raw32`` no move changes a bit. A session whose
    server is lost, or does not take it at its hand-over, moves there with its hidden states when there is one again; it
    waits twice as long each time, for on a link that comes and goes it would do nothing else.

    Args:
        own: the device's copy of the back.
        remote: the server's back, opened with ``on_server_loss="local"``: a device that can go on alone need not wait.
        manifest: of both.
        plan: when the session moves to the server; None begins there.
    """

    replays: Sequence[Replay] = ()

    def __init__(self, own: OwnBack, remote: RemoteBack, manifest: Manifest, plan: HandOver | None = None) -> None:
        self.source = "local" if plan else "server"
        self.moves: list[Move] = []
        self._own, self._remote = own, remote
        self._d_model, self._split = manifest.architecture.d_model, manifest.split
        self._row_bytes = manifest.kv["server"].token_bytes(manifest.half_layers("server"))
        self._plan = plan

    @property
    def round_trips(self) -> int:
        """Times that the device waited for a token of the server."""
        return self._remote.round_trips

    def open(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int], bypass: Bypass = NO_BYPASS) -> None:
        """Begin a session: on the server, with the errors of `RemoteBack.open`, unless it is to move there later."""
        self._max_tokens, self._sampling, self._penalised = max_tokens, sampling, bool(context_ids)
        self._bypass = bypass
        self._hidden = np.empty((max_tokens, self._d_model), np.float32)
        self._ids: list[int] = []  # of the same positions
        # Lengths, and tokens after them, that the own sampler does not know of yet.
        self._chosen_there: list[tuple[int, int]] = []
        self._there = self._plan is None
        self._watch: ServerWatch | None = None
        self._own.open(max_tokens, sampling, context_ids, bypass)
        if self._there:
            self._remote.open(max_tokens, sampling, context_ids, bypass)

    def chunk_limit(self) -> int:
        """Most tokens in one step."""
        return self._remote.chunk_limit() if self._there else self._own.chunk_limit()

    def step(
        self, hidden: NDArray[np.float32], position: int, token_ids: Sequence[int] = (), *, sample: bool
    ) -> StepReport:
        """Take hidden states ``[tokens, d_model]`` and run them wherever the session is; move it if that is due.

        Raises:
            CodecError: the hidden states are not finite.
        """
        self._keep(hidden, position, token_ids)
        end = position + len(hidden)
        if self._there:
            reports = self._run_there(position, end, sample=sample)
        elif self._watch is not None and self._watch.found:
            reports = self._hand_over("hidden", position, end, sample=sample)
        elif self._plan is not None and self._plan.at is not None and self._plan.at <= end:
            reports = self._hand_over(self._plan.send, max(position, self._plan.at - 1), end, sample=sample)
        else:
            reports = self._run_here(end, sample=sample)
        report = total(reports)
        self.source = "server" if self._there else "local"
        if self._there and report.token is not None:
            self._chosen_there.append((end, report.token))
        return report

    def watched(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """The tokens of this session; where the plan has a deadline, they tell when it is missed."""
        late = 0
        for index, token in enumerate(tokens):
            plan = self._plan
            if plan is not None and plan.deadline_s is not None:
                late = late + 1 if index and token.total_s > plan.deadline_s else 0
                if late == LATE_TOKENS:
                    logger.info("%.3f s a token on the device, the deadline is %g s", token.total_s, plan.deadline_s)
                    self._plan = HandOver(len(self._ids) + 1, plan.send)
            yield token

    def close(self, *, cancel: bool = False) -> None:
        """End the session on both sides."""
        if self._watch is not None:
            self._watch.stop()
        self._remote.close(cancel=cancel)
        self._own.close()

    def _keep(self, hidden: NDArray[np.float32], position: int, token_ids: Sequence[int]) -> None:
        """Remember a step; one that begins before the end rolls back."""
        if position < len(self._ids):
            del self._ids[position:]
            self._chosen_there = [(length, token) for length, token in self._chosen_there if length <= position]
            self._own.truncate(position)
        self._hidden[position : position + len(hidden)] = hidden
        self._ids += token_ids

    def _run_here(self, end: int, *, sample: bool) -> list[StepReport]:
        """Run the own layers over what they have not seen up to a position, and choose the token after it."""
        for length, token in self._chosen_there:
            self._own.accept(token, length)
        self._chosen_there = []
        return [
            self._own.step(self._hidden[first:last], first, sample=sample and last == end)
            for first, last in _chunks(self._own.length, end, PREFILL_CHUNK)
        ]

    def _run_there(self, first: int, end: int, *, sample: bool) -> list[StepReport]:
        """Have the server run its layers over positions; if it is lost, come back and do that here."""
        started, sent_before = perf_counter(), self._remote.bytes_up
        try:
            return self._send_hidden(first, end, sample=sample)
        except LinkError as error:
            logger.warning("%s; from token %d on the device goes on alone", error, first + 1)
            lost = self._left(error, sent_before, started)
        unseen = end - self._own.length
        reports = self._run_here(end, sample=sample)
        self.moves.append(Move("local", first + 1, "", unseen, lost.bytes_up, perf_counter() - started))
        return [lost, *reports]

    def _hand_over(self, send: Send, first: int, end: int, *, sample: bool) -> list[StepReport]:
        """Move to the server, which goes on at position ``first``; stay here if that fails."""
        self._plan = self._watch = None
        before = self._run_here(first, sample=False)
        started = perf_counter()
        history = self._own.history if self._penalised else ()
        try:
            self._remote.open(self._max_tokens, self._sampling, history, self._bypass)
            rows = self._send_rows(first) if send == "kv" else []
            reports = self._send_hidden(first if send == "kv" else 0, end, sample=sample)
        except LinkError as error:
            logger.warning("%s; the hand-over at token %d failed, the device goes on alone", error, first + 1)
            lost = self._left(error, 0, started)
            return [*before, lost, *self._run_here(end, sample=sample)]
        self._there = True
        seconds = perf_counter() - started
        self.moves.append(Move("server", first + 1, send, first, self._remote.bytes_up, seconds))
        return [*before, *rows, *reports]

    def _send_rows(self, end: int) -> list[StepReport]:
        """Send keys and values of the positions before one."""
        limit = self._remote.kv_chunk_limit(self._row_bytes)
        return [
            self._remote.send_rows(self._own.rows(first, last), first, self._split)
            for first, last in _chunks(0, end, limit)
        ]

    def _send_hidden(self, first: int, end: int, *, sample: bool) -> list[StepReport]:
        """Send hidden states of positions as ordinary steps, of which the last may ask for a token."""
        limit = min(self._remote.chunk_limit(), PREFILL_CHUNK)
        return [
            self._remote.step(self._hidden[at:last], at, self._ids[at:last], sample=sample and last == end)
            for at, last in _chunks(first, end, limit)
        ]

    def _left(self, error: LinkError, sent_before: int, started: float) -> StepReport:
        """Give the server up until there is one again, and tell what a step cost that was lost there."""
        self._there = False
        self._watch = self._remote.watch(error)
        bytes_up = self._remote.bytes_up - sent_before
        self._remote.close(cancel=True)
        return StepReport(bytes_up=bytes_up, wait_s=perf_counter() - started)


def _chunks(first: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most ``size`` that cover ``[first, end)``."""
    return ((at, min(at + size, end)) for at in range(first, end, size))
