"""Sessions: one generation's steps, done in order and once, and the table that admits and forgets them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CodecError, NonFiniteError
from ...quant.codec import Codec
from ..wire import isthmus_pb2 as pb
from ..wire.framing import Refusal, crc_matches, read_bypass, read_sampling
from ..wire.kv import decode_rows
from ..wire.transport import MAX_PATH, RESULTS_KEPT
from .compute import ComputeEngine, ComputeSession
from .limits import ServerLimits
from .prefix_cache import Prefix, PrefixCache

if TYPE_CHECKING:
    from .compute_thread import ComputeThread

logger = logging.getLogger(__name__)

_SESSION_ID_BYTES = 16


@dataclass
class Work:
    """A step that was checked and decoded, and what of it has run through the layers.

    Attributes:
        session: whose step it is.
        compute: its state in the engine.
        hidden: ``[tokens, d_model]``.
        wanted: after how many of the last rows tokens are to be chosen.
        drafted: the guesses at them, if there are any.
        continues: whether the step goes on from guesses at what earlier steps chose.
        result: the answer, as far as it is known.
        started: `time.perf_counter` when it was ready to run.
        done: rows that have run.
        onnxruntime_seconds: that its runs took, which others shared.
    """

    session: Session
    compute: ComputeSession
    hidden: NDArray[np.float32]
    wanted: int
    drafted: list[int] | None
    continues: bool
    result: pb.Result
    started: float
    done: int = 0
    onnxruntime_seconds: float = 0.0

    @property
    def remaining(self) -> int:
        """Rows that have not run."""
        return len(self.hidden) - self.done

    def rows(self, most: int) -> int:
        """How many of them to run next: ``most`` at most, unless more are wanted, which run together at last."""
        remaining = self.remaining
        if remaining <= most:
            return remaining
        return min(most, remaining - self.wanted) or remaining


class Session:
    """The step machine of one generation. Its methods run on the compute thread only.

    A step is prepared, run and finished. It is done or refused as a whole: after a `Refusal` the session is as it was.
    """

    def __init__(
        self,
        engine: ComputeEngine,
        compute: ComputeSession,
        max_tokens: int,
        limits: ServerLimits,
        prefix: Prefix | None = None,
    ) -> None:
        self.id = secrets.token_bytes(_SESSION_ID_BYTES)
        self.max_tokens = max_tokens
        self._engine = engine
        self._compute = compute
        self._prefix = prefix  # where there is a cache for it
        self._limits = limits
        self._d_model = engine.manifest.architecture.d_model
        self._results: deque[pb.Result] = deque(maxlen=RESULTS_KEPT)  # of the last steps done, in order
        self._chosen: list[int] = []  # the tokens since the last step that began with no guess

    def resume(self, acknowledged: int) -> list[pb.ServerMessage]:
        """The answers to an `Attach`: the last step done, and those results that the client does not have."""
        new = [pb.ServerMessage(result=result) for result in self._results if result.step > acknowledged]
        return [pb.ServerMessage(attached=pb.Attached(last_step=self.last_step)), *new]

    def prepare(self, step: pb.Step, codec: Codec, arrived: float) -> Work | pb.ServerMessage:
        """Check and decode one step, up to what the back's layers have to do; see `finish`.

        Args:
            step: as received; its size is within ``max_frame_bytes``.
            codec: of the stream that it came on.
            arrived: `time.perf_counter` when it was handed to the compute thread.

        Returns:
            The work, or the answer where there is none: to a repeated step, from the cache; to keys and values; to a
            guess that was wrong; to a piece of a prompt that an earlier session computed.

        Raises:
            Refusal: the step breaks a rule; nothing was done.
        """
        started = perf_counter()
        expected = self.last_step + 1
        if not crc_matches(step):
            raise Refusal("BAD_CRC", "a step was damaged on its way; send it again", expected_step=expected)
        if 0 < step.step < expected:
            # One that is older than what is kept was answered long ago: the client has it.
            return pb.ServerMessage(result=self._results[max(step.step - expected, -len(self._results))])
        if step.step != expected:
            raise Refusal(
                "OUT_OF_ORDER",
                f"step {step.step} where {expected} is next; send that",
                expected_step=expected,
            )
        content = step.kv if step.HasField("kv") else step.frame
        drafted = list(step.frame.drafted)
        self._check_drafts(step, drafted)
        continues = bool(drafted) and len(drafted) >= step.frame.tokens
        if continues:
            assumed = drafted[: len(drafted) - step.frame.tokens + 1]
            if step.position != self._compute.length or self._chosen[-len(assumed) :] != assumed:
                # A wrong guess: there is nothing to do.
                return self._done(pb.Result(step=step.step, length=self._compute.length))
            drafted = drafted[len(assumed) :]
        self._check_place(step.position, content.tokens)
        if step.sample and step.HasField("kv"):
            raise Refusal("BAD_REQUEST", "keys and values give no token; send the next position's frame for that")
        arrays = self._decode(content, codec)
        decoded = perf_counter()
        if step.position < self._compute.length:
            self._compute.truncate(step.position)
        if self._prefix is not None:
            self._prefix.truncate(step.position)
        result = pb.Result(
            step=step.step,
            decode_us=_microseconds(decoded - started),
            queue_us=_microseconds(started - arrived),
        )
        if not step.HasField("kv"):
            wanted = len(drafted) + 1 if step.sample else 0
            guesses = drafted if step.frame.drafted else None
            if self._prefix is not None:
                arrays = arrays[self._prefix.reuse(arrays, wanted) :]
            work = Work(self, self._compute, arrays, wanted, guesses, continues, result, decoded)
            return work if work.remaining else self.finish(work)
        self._compute.append_rows(arrays)
        self._chosen.clear()
        result.length = self._compute.length
        result.compute_us = _microseconds(perf_counter() - decoded)
        return self._done(result)

    def finish(self, work: Work) -> pb.ServerMessage:
        """Choose the tokens of a step whose rows have all run through the layers."""
        result = work.result
        busy = self._engine.onnxruntime_seconds  # where sessions take turns, the head runs when a token is asked for
        if not work.continues:
            self._chosen.clear()
        if work.drafted is not None:
            result.tokens.extend(self._compute.verify(work.drafted))
            self._chosen += result.tokens
        elif work.wanted:
            result.token = self._compute.sample()
            self._chosen.append(result.token)
        if self._prefix is not None:
            self._prefix.offer()
        result.length = self._compute.length
        result.compute_us = _microseconds(perf_counter() - work.started)
        result.onnxruntime_us = _microseconds(work.onnxruntime_seconds + self._engine.onnxruntime_seconds - busy)
        return self._done(result)

    def step(self, step: pb.Step, codec: Codec, arrived: float) -> pb.ServerMessage:
        """Do one step alone, see `prepare`."""
        work = self.prepare(step, codec, arrived)
        if isinstance(work, pb.ServerMessage):
            return work
        self._engine.advance([(self._compute, work.hidden, work.wanted)])
        return self.finish(work)

    def close(self) -> None:
        """Free the KV cache."""
        self._compute.close()

    @property
    def last_step(self) -> int:
        """Number of the last step done; 0 before the first."""
        return self._results[-1].step if self._results else 0

    def _done(self, result: pb.Result) -> pb.ServerMessage:
        self._results.append(result)
        return pb.ServerMessage(result=result)

    def _check_place(self, position: int, tokens: int) -> None:
        if not 1 <= tokens <= self._limits.max_frame_tokens:
            raise Refusal("BAD_FRAME", f"a frame of {tokens} tokens: must hold 1 to {self._limits.max_frame_tokens}")
        if position > self._compute.length:
            raise Refusal(
                "BAD_REQUEST",
                f"position {position} in a session of {self._compute.length}: a frame goes on where the last "
                "ended, or rolls back; it cannot leave a gap",
            )
        if position + tokens > self.max_tokens:
            raise Refusal(
                "SESSION_FULL",
                f"positions {position} to {position + tokens - 1} in a session opened for {self.max_tokens}; "
                "open one with larger max_tokens",
            )

    def _check_drafts(self, step: pb.Step, drafted: list[int]) -> None:
        if not drafted:
            return
        if not step.sample:
            raise Refusal("BAD_REQUEST", "drafts in a step that asks for no token; only a sampled step verifies them")
        if len(drafted) > step.frame.tokens + MAX_PATH:
            raise Refusal(
                "BAD_FRAME",
                f"{len(drafted)} drafts in a frame of {step.frame.tokens} tokens: at most one for each, and {MAX_PATH} "
                "before them",
            )
        vocabulary = self._engine.manifest.architecture.vocab_size
        if max(drafted) >= vocabulary:
            raise Refusal("BAD_FRAME", f"drafted token {max(drafted)}: must lie below the vocabulary's {vocabulary}")

    def _decode(self, content: pb.Frame | pb.KVChunk, codec: Codec) -> NDArray[Any]:
        try:
            if isinstance(content, pb.KVChunk):
                manifest = self._engine.manifest
                return decode_rows(content, manifest.kv["server"], range(manifest.split, manifest.architecture.layers))
            return codec.decode(content.payload, content.tokens, self._d_model)
        except NonFiniteError as error:
            raise Refusal("NON_FINITE", str(error)) from error
        except CodecError as error:
            raise Refusal("BAD_FRAME", str(error)) from error


@dataclass
class _Seat:
    """A session's place in the table. Exactly one of ``evict`` and ``lease`` is set."""

    session: Session
    kv_bytes: int
    owner: str
    evict: Callable[[], None] | None = None
    lease: asyncio.TimerHandle | None = None


class SessionTable:
    """Admits sessions, knows which stream owns each, and forgets those whose lease has ended.

    Its methods run on the event loop; whatever touches the engine is handed to the compute thread.
    """

    def __init__(self, engine: ComputeEngine, limits: ServerLimits, compute: ComputeThread) -> None:
        self._engine = engine
        self._limits = limits
        self._compute = compute
        self._seats: dict[bytes, _Seat] = {}
        self.prefixes = PrefixCache(limits.prefix_cache_bytes)
        self._sessions = 0  # admitted, those being opened or closed included
        self._kv_bytes = 0
        self._owned: Counter[str] = Counter()  # sessions of each peer
        self._owned_bytes: Counter[str] = Counter()  # and their KV
        self._expiries: set[asyncio.Task[None]] = set()
        self.draining = self.moving = False  # no session begins; none goes on
        self.max_session_tokens = min(limits.max_session_tokens, engine.manifest.max_length)

    def __len__(self) -> int:
        return self._sessions

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that are reserved."""
        return self._kv_bytes

    @property
    def carried(self) -> int:
        """Sessions that a stream carries."""
        return sum(seat.evict is not None for seat in self._seats.values())

    def check_draining(self, *, new: bool) -> None:
        """Raise `Refusal` if the server is about to end: for new sessions from the start, then for all.

        Args:
            new: whether a session is to begin.
        """
        if self.moving or (self.draining and new):
            retry_after_ms = round(1000 * self._limits.retry_after_s)
            raise Refusal("DRAINING", "this server is about to end; go to another one", retry_after_ms=retry_after_ms)

    async def open(self, request: pb.Open, owner: str = "") -> Session:
        """Reserve KV and make a session. No stream carries it yet: its lease runs.

        Args:
            request: as received.
            owner: identity of the peer; no other one may attach to the session.

        Raises:
            Refusal: the request is out of range, or the server is full.
        """
        sampling = read_sampling(request.sampling)
        max_tokens, vocabulary = request.max_tokens, self._engine.manifest.architecture.vocab_size
        if not 1 <= max_tokens <= self.max_session_tokens:
            raise Refusal("BAD_REQUEST", f"max_tokens={max_tokens}: must be 1 to {self.max_session_tokens}")
        if len(request.context_ids) > max_tokens or any(id >= vocabulary for id in request.context_ids):
            raise Refusal(
                "BAD_REQUEST",
                f"{len(request.context_ids)} context ids: must be at most max_tokens={max_tokens}, each below the "
                f"vocabulary's {vocabulary}",
            )
        bypass = read_bypass(request, self._engine.manifest)
        kv_bytes = self._engine.kv_bytes(max_tokens)
        self._admit(kv_bytes, owner)
        try:
            compute = await self._compute.run(
                self._engine.new_session, max_tokens, sampling, list(request.context_ids), bypass
            )
        except BaseException:
            self._release(kv_bytes, owner)
            raise
        prefix = None
        if self._limits.prefix_cache_bytes:
            prefix = Prefix(self.prefixes, compute, "" if self._limits.prefixes_shared else owner, bypass)
        session = Session(self._engine, compute, max_tokens, self._limits, prefix)
        self._seats[session.id] = _Seat(session, kv_bytes, owner, lease=self._start_lease(session.id))
        return session

    def attach(self, session_id: bytes, evict: Callable[[], None], owner: str = "") -> Session:
        """Have a stream carry a session; the stream that carried it is evicted.

        Raises:
            Refusal: there is no such session, or it is another peer's: the answer does not tell which.
        """
        seat = self._seats.get(session_id)
        if seat is not None and seat.owner != owner:
            name = session_id.hex()[:8]
            logger.warning("session %s: of %r, asked for by %r", name, seat.owner, owner, extra={"session": name})
            seat = None
        if seat is None:
            raise Refusal(
                "SESSION_UNKNOWN",
                f"no such session: it was closed, its lease of {self._limits.lease_s:g} s has ended, or the server "
                "restarted; start the generation again",
            )
        if seat.lease is not None:
            seat.lease.cancel()
        if seat.evict is not None:
            seat.evict()
        seat.lease, seat.evict = None, evict
        return seat.session

    def detach(self, session_id: bytes, evict: Callable[[], None]) -> None:
        """Start the lease of a session, unless another stream owns it by now."""
        seat = self._seats.get(session_id)
        if seat is not None and seat.evict == evict:
            seat.lease, seat.evict = self._start_lease(session_id), None

    async def free(self, session_id: bytes) -> None:
        """End a session and give its KV back; nothing happens if it is gone already."""
        seat = self._seats.pop(session_id, None)
        if seat is None:
            return
        if seat.lease is not None:
            seat.lease.cancel()
        try:
            await self._compute.run(seat.session.close, of=seat.session)
        finally:
            self._release(seat.kv_bytes, seat.owner)

    async def free_all(self) -> None:
        """End every session."""
        for session_id in list(self._seats):
            await self.free(session_id)
        await asyncio.gather(*self._expiries)

    def _admit(self, kv_bytes: int, owner: str) -> None:
        budget, retry_after_ms = self._limits.kv_bytes, round(1000 * self._limits.retry_after_s)
        if kv_bytes > budget:
            raise Refusal(
                "BAD_REQUEST",
                f"the session needs {kv_bytes} bytes of KV cache, the server has {budget}; ask for fewer tokens",
            )
        share = self._limits.kv_bytes_per_device
        if owner and kv_bytes > share:
            raise Refusal(
                "BAD_REQUEST",
                f"the session needs {kv_bytes} bytes of KV cache, a device may have {share}; ask for fewer tokens",
            )
        if self._sessions >= self._limits.max_sessions:
            message = f"all {self._limits.max_sessions} sessions of the server are taken; wait for one to end"
            raise Refusal("SERVER_FULL", message, retry_after_ms=retry_after_ms)
        if self._kv_bytes + kv_bytes > budget:
            message = f"{budget - self._kv_bytes} bytes of KV cache are free, the session needs {kv_bytes}; wait"
            raise Refusal("SERVER_FULL", message, retry_after_ms=retry_after_ms)
        if owner and self._owned[owner] >= self._limits.max_sessions_per_device:
            message = f"all {self._limits.max_sessions_per_device} sessions of a device are taken; end one of them"
            raise Refusal("SERVER_FULL", message, retry_after_ms=retry_after_ms)
        if owner and self._owned_bytes[owner] + kv_bytes > share:
            message = (
                f"{share - self._owned_bytes[owner]} bytes of KV cache are left of the device's share, the session "
            )
            message += f"needs {kv_bytes}; end another one"
            raise Refusal("SERVER_FULL", message, retry_after_ms=retry_after_ms)
        self._sessions += 1
        self._kv_bytes += kv_bytes
        self._owned[owner] += 1
        self._owned_bytes[owner] += kv_bytes

    def _release(self, kv_bytes: int, owner: str) -> None:
        self._sessions -= 1
        self._kv_bytes -= kv_bytes
        self._owned[owner] -= 1
        self._owned_bytes[owner] -= kv_bytes
        if not self._owned[owner]:
            del self._owned[owner], self._owned_bytes[owner]

    def _start_lease(self, session_id: bytes) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._limits.lease_s, self._expire, session_id)

    def _expire(self, session_id: bytes) -> None:
        logger.info("session %s: lease ended", session_id.hex()[:8], extra={"session": session_id.hex()[:8]})
        task = asyncio.get_running_loop().create_task(self.free(session_id))
        self._expiries.add(task)
        task.add_done_callback(self._expiries.discard)


def _microseconds(seconds: float) -> int:
    """For the wire, whose 32 bits end after an hour."""
    return min(round(seconds * 1e6), (1 << 32) - 1)
