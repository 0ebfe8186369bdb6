"""The device's end of the link: a session on the server that survives its connections."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ...errors import LinkError, ProtocolError, RequestError, SecurityError
from ...quant.codec import Codec
from ..sampling import Sampling
from ..wire import isthmus_pb2 as pb
from ..wire.framing import (
    DRAFT_MINOR,
    KV_MINOR,
    PROTOCOL_MAJOR,
    fault_error,
    hello_message,
    kv_message,
    open_message,
    renumbered_step,
    step_message,
)
from ..wire.kv import encode_rows
from ..wire.security import ChannelSecurity
from ..wire.stream import ClientStream
from ..wire.transport import PIPELINE_DEPTH, RESULTS_KEPT
from .generate import Move, Replay, StepReport
from .journal import JOURNAL_BYTES, Journal, context_of
from .verification import Answer, Question, checked_tokens

if TYPE_CHECKING:
    from .model import OnServerLoss

logger = logging.getLogger(__name__)

# Back-off between attempts to attach again: doubled each time, jittered so that devices do not come together.
_FIRST_DELAY_S = 0.2
_LONGEST_DELAY_S = 10.0
_CLOSE_TIMEOUT_S = 2.0  # a server that does not answer a Close frees the session by its lease
_WORST_BYTES_PER_VALUE = 8  # above every codec's expansion, so that a full frame stays below max_frame_bytes
_KV_CHUNK_BYTES = 1 << 18  # as steps without an answer are bounded in time: 2 s of 1 Mbit/s
_KV_MESSAGE_BYTES = 64  # of a step with keys and values, the payload aside
MAX_ATTEMPTS = 8  # to restore a session at one address; their pauses last about 20 seconds together
LOCAL_ATTEMPTS = 4  # about a second on a link that refuses at once: the device need not wait, it can go on alone
WAIT_S = 600.0  # that `wait` waits for a server
# Faults by which a server says that a session is lost, though the stream is whole.
_SESSION_LOST = ("SESSION_UNKNOWN", "INTERNAL", "DRAINING")
_TRY_AGAIN = ("SERVER_FULL", "DRAINING", "INTERNAL", "BAD_CRC", "OUT_OF_ORDER")

_MAX_RESENDS = 4  # of one step on a link that damages it; then the link is not worth having


@dataclass
class _Session:
    """What the device knows of its session on the server.

    The server answers every step that it reads, in order. ``on_the_way`` has, for each step without an
    answer, the round of resending in which it was sent: a fault of an older round is about what was sent
    again since.
    """

    id: bytes = b""
    last_step: int = 0
    acknowledged: int = 0
    unacknowledged: deque[tuple[int, bytes]] = field(default_factory=deque)  # steps as they were sent
    on_the_way: deque[int] = field(default_factory=deque)
    questions: deque[Question] = field(default_factory=deque)  # submitted steps that were not collected
    round: int = 0
    resends: int = 0  # since the last result
    attempts: int = 0  # to restore it, since the last result
    opening: tuple[int, Sampling, tuple[int, ...]] = (0, Sampling(), ())
    journal: Journal = field(default_factory=Journal)
    lost: bool = False  # no server has it any more
    bytes_up: int = 0  # of steps, those sent again included
    told_up: int = 0  # of them, those in a report
    bytes_down: int = 0


class RemoteBack:
    """The back half on a server. One object carries one session at a time; it is used from one thread.

    The stream under the session is disposable: if it breaks, or a step's result does not come in time, a new
    one attaches to the session and the steps without a result are sent again, byte for byte. If the session itself is
    lost with its server, it is made again from the journal of what was sent, there or on another server; the tokens
    that follow are the same.

    Args:
        addresses: ``HOST:PORT`` of servers with the same half; the first that grants a session gets it.
        manifest_sha256: of the device half; the server's must be equal.
        split: first layer on the server.
        d_model: width of the hidden states.
        codec: how hidden states are encoded.
        security: TLS and what it trusts, or plaintext.
        connect_timeout: seconds for connection and handshake.
        step_timeout: seconds for one result, and for opening a session.
        on_server_loss: ``replay`` restores a session as above, in `MAX_ATTEMPTS` for each address with growing pauses;
            ``wait`` goes on trying for `WAIT_S`; ``local`` only attaches again, a few times, because the device can go
            on alone; ``fail`` does neither.
        journal_bytes: that are kept to make a session again.
    """

    source = "server"
    moves: Sequence[Move] = ()

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        manifest_sha256: str,
        split: int,
        d_model: int,
        codec: Codec,
        security: ChannelSecurity,
        connect_timeout: float = 5.0,
        step_timeout: float = 30.0,
        on_server_loss: OnServerLoss = "replay",
        journal_bytes: int = JOURNAL_BYTES,
    ) -> None:
        self.round_trips = 0  # one after the other: steps on their way together count once
        self.reattached = 0  # streams that took over from a broken one
        self.replays: list[Replay] = []
        self._addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        self._address = self._addresses[0]
        self._on_server_loss = on_server_loss
        self._journal_bytes = journal_bytes if on_server_loss in ("wait", "replay") else 0
        self._hello = hello_message(manifest_sha256, split, codec.name)
        self._d_model = d_model
        self._codec = codec
        self._security = security
        self._connect_timeout = connect_timeout
        self._step_timeout = step_timeout
        self._stream: ClientStream | None = None
        self._limits: pb.Limits | None = None
        self._minor = 0
        self._session = _Session()

    @property
    def limits(self) -> pb.Limits:
        """What the server grants, as its Welcome said; raises `LinkError` before `open`."""
        if self._limits is None:
            raise LinkError("the server's limits are not known before open(); call that first")
        return self._limits

    @property
    def lease_s(self) -> float:
        """Seconds for which the server keeps the session without a stream."""
        return self.limits.lease_ms / 1000

    @property
    def bytes_up(self) -> int:
        """Bytes of this session's steps, those sent again included."""
        return self._session.bytes_up

    def kv_chunk_limit(self, row_bytes: int) -> int:
        """Most positions in one step that carries keys and values.

        Args:
            row_bytes: most bytes of one position's.

        Raises:
            LinkError: the server is too old for such steps, or not even one position fits into a frame.
        """
        if self._minor < KV_MINOR:
            raise LinkError(
                f"{self._address} speaks protocol {PROTOCOL_MAJOR}.{self._minor}: keys and values need "
                f"{PROTOCOL_MAJOR}.{KV_MINOR}; update the server, or send hidden states"
            )
        fitting = (self.limits.max_frame_bytes - _KV_MESSAGE_BYTES) // row_bytes
        if not fitting:
            raise LinkError(
                f"keys and values of one position take {row_bytes} bytes, a frame {self.limits.max_frame_bytes}; "
                "send hidden states"
            )
        return min(self.limits.max_frame_tokens, fitting, max(1, _KV_CHUNK_BYTES // row_bytes))

    def chunk_limit(self) -> int:
        """Most tokens in one step."""
        by_bytes = self.limits.max_frame_bytes // (_WORST_BYTES_PER_VALUE * self._d_model)
        return max(1, min(self.limits.max_frame_tokens, by_bytes))

    def open(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int] = ()) -> None:
        """Connect and begin a session.

        Args:
            max_tokens: positions to reserve: prompt and new tokens.
            sampling: how the server chooses tokens.
            context_ids: the prompt's ids, needed only by a repetition penalty.

        Raises:
            LinkError: the server cannot be reached; `SecurityError` if it is not trusted.
            ProtocolError: the server refuses: another export or version, an unknown codec, no room.
        """
        if self._stream is not None:
            raise RequestError("the link carries a session already; close() it first")
        opening = max_tokens, sampling, tuple(context_ids)
        self._session = _Session(opening=opening, journal=Journal(self._journal_bytes))
        request = open_message(max_tokens, sampling, context_ids)
        for address in self._addresses[:-1]:
            try:
                self._open(address, request)
                return
            except LinkError as error:
                logger.warning("%s; trying the next address", error)
        self._open(self._addresses[-1], request)

    def _open(self, address: str, request: bytes) -> None:
        """Connect to an address and begin a session there."""
        # Hello and Open travel together: that saves a round trip, and a server that refuses the first
        # ignores the rest.
        self._address = address
        self._connect(request)
        try:
            self._session.id = self._expect("opened", self._step_timeout).opened.session
        except BaseException:
            self.close(cancel=True)  # the session may be there already
            raise

    def step(
        self, hidden: NDArray[np.float32], position: int, token_ids: Sequence[int] = (), *, sample: bool
    ) -> StepReport:
        """Send hidden states; wait for the token if one is asked for.

        Without ``sample`` the call returns while the step is on its way, unless `PIPELINE_DEPTH` steps are.

        Args:
            hidden: ``[tokens, d_model]`` of consecutive positions, at most `chunk_limit` of them.
            token_ids: of the same positions.
            position: of the first; smaller than the session's length rolls the server back to it.
            sample: whether the token after the last position is wanted.

        Returns:
            The token, and what the step cost. Bytes received and the server's times are those of every result
            that came in during the call.

        Raises:
            LinkError: the link is gone and could not be restored.
            ProtocolError: the server refused the step, or has forgotten the session; `close` the link then.
            CodecError: the hidden states are not finite.
        """
        self._live_stream()
        started = perf_counter()
        payload = self._codec.encode(hidden, token_ids)
        message = step_message(self._session.last_step + 1, position, len(hidden), sample, payload)
        return self._exchange(message, position, started, sample=sample)

    @property
    def verifies(self) -> bool:
        """Whether the server is new enough to take drafts."""
        return self._minor >= DRAFT_MINOR

    @property
    def on_the_way(self) -> int:
        """Submitted steps that were not collected."""
        return len(self._session.questions)

    def submit(
        self,
        hidden: NDArray[np.float32],
        position: int,
        token_ids: Sequence[int],
        *,
        drafted: int = 0,
        path: Sequence[int] = (),
    ) -> None:
        """Send a step that asks for tokens and do not wait for them: `collect` gives them, in the order of the steps.

        Args:
            hidden: see `step`.
            position: see `step`.
            token_ids: of the same positions.
            drafted: how many of the last ids are guesses. If all are, the step goes on from one that was not
                collected yet, and the first id is a guess at what that one chooses.
            path: then, the guesses at the positions before: those after the last token that is sure.

        Raises:
            RequestError: too many steps wait to be collected; the server keeps no more results.
            CodecError: the hidden states are not finite.
        """
        session = self._session
        self._live_stream()
        if len(session.questions) >= RESULTS_KEPT:
            raise RequestError(
                f"{len(session.questions)} steps without an answer: collect one, {RESULTS_KEPT} are kept"
            )
        started = perf_counter()
        payload = self._codec.encode(hidden, token_ids)
        drafts = [*path, *token_ids[len(token_ids) - drafted :]]
        message = step_message(session.last_step + 1, position, len(hidden), True, payload, drafts)
        session.last_step += 1
        sent = perf_counter()
        ids = tuple(token_ids)
        trip = self.round_trips + 1
        session.questions.append(Question(session.last_step, position, ids, drafted, trip, sent - started, sent))
        session.unacknowledged.append((session.last_step, message))
        session.journal.sent(session.last_step, position, message)
        self._send_step(message)

    def answered(self) -> bool:
        """Whether `collect` need not wait for the server, as far as one can see."""
        return self._live_stream().ready

    def collect(self) -> Answer:
        """Wait for the tokens of the oldest submitted step.

        Returns:
            Them, and what the step cost; the bytes are those that crossed since the last report.

        Raises:
            LinkError: the link is gone and could not be restored.
            ProtocolError: the server refused the step, has forgotten the session, or its answer does not fit what was
                sent; `close` the link then.
        """
        session = self._session
        self._live_stream()
        bytes_down = session.bytes_down
        last: pb.Result | None = None
        # A session that is made again on the way numbers its steps anew.
        while last is None or last.step < session.questions[0].step:
            last = self._receive_result()
        question = session.questions.popleft()
        self.round_trips = max(self.round_trips, question.trip)
        bytes_up, session.told_up = session.bytes_up - session.told_up, session.bytes_up
        report = StepReport(
            bytes_up=bytes_up,
            bytes_down=session.bytes_down - bytes_down,
            encode_s=question.encode_s,
            wait_s=perf_counter() - question.sent,
            server_decode_s=last.decode_us / 1e6,
            server_queue_s=last.queue_us / 1e6,
            server_compute_s=last.compute_us / 1e6,
            onnxruntime_s=last.onnxruntime_us / 1e6,
        )
        return Answer(checked_tokens(question, last), report)

    def send_rows(self, rows: NDArray[Any], position: int, first_layer: int) -> StepReport:
        """Send keys and values of consecutive positions, which the device's own copy of the back computed.

        They are sent exactly with the codec ``raw32``, else in 8 bits; the codes of a quantized cache as they are.

        Args:
            rows: ``[layers, 2, kv_heads, tokens, row_width]``, at most `kv_chunk_limit` tokens.
            position: of the first.
            first_layer: that they are of.

        Returns:
            As `step` without ``sample``, which see for the errors.
        """
        self._live_stream()
        started = perf_counter()
        coding, payload = encode_rows(rows, exact=self._codec.name == "raw32")
        layers, _, _, tokens, _ = rows.shape
        chunk = pb.KVChunk(
            tokens=tokens, first_layer=first_layer, last_layer=first_layer + layers, coding=coding, payload=payload
        )
        message = kv_message(self._session.last_step + 1, position, chunk)
        return self._exchange(message, position, started, sample=False)

    def _exchange(self, message: bytes, position: int, started: float, *, sample: bool) -> StepReport:
        """Send the next step; take in what results there are, or are due."""
        encoded = perf_counter()
        session = self._session
        bytes_up, bytes_down = session.bytes_up, session.bytes_down
        session.last_step += 1
        session.unacknowledged.append((session.last_step, message))
        session.journal.sent(session.last_step, position, message)
        self._send_step(message)
        results: list[pb.Result] = []
        while len(session.unacknowledged) >= (1 if sample else PIPELINE_DEPTH):
            result = self._receive_result()
            if result is not None:
                results.append(result)
        session.told_up = session.bytes_up
        self.round_trips += sample
        last = results[-1] if results else pb.Result()
        return StepReport(
            token=last.token if sample and last.HasField("token") else None,
            bytes_up=session.bytes_up - bytes_up,
            bytes_down=session.bytes_down - bytes_down,
            encode_s=encoded - started,
            wait_s=perf_counter() - encoded,
            server_decode_s=sum(result.decode_us for result in results) / 1e6,
            server_queue_s=sum(result.queue_us for result in results) / 1e6,
            server_compute_s=sum(result.compute_us for result in results) / 1e6,
            onnxruntime_s=sum(result.onnxruntime_us for result in results) / 1e6,
        )

    def close(self, *, cancel: bool = False) -> None:
        """End the session, so that the server need not wait for its lease. Safe twice, and on a broken link.

        Args:
            cancel: drop the steps that are on their way instead of finishing them.
        """
        stream = self._stream
        if stream is None:
            return
        ending = pb.ClientMessage(cancel=pb.Cancel()) if cancel else pb.ClientMessage(close=pb.Close())
        try:
            stream.send(ending.SerializeToString())
            deadline = time.monotonic() + _CLOSE_TIMEOUT_S
            while stream.receive(deadline - time.monotonic()).WhichOneof("body") != "closed":
                pass  # answers to the steps before it
        except LinkError as error:
            logger.debug("the session on %s ends by its lease: %s", self._address, error)
        finally:
            self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _connect(self, request: bytes) -> None:
        """Open a stream, greet, and send `Open` or `Attach`, whose answer is still to come."""
        self._stream = ClientStream(self._address, self._security)
        try:
            self._stream.send(self._hello)
            self._stream.send(request)
            welcome = self._expect("welcome", self._connect_timeout).welcome
            self._limits, self._minor = welcome.limits, welcome.protocol_minor
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _live_stream(self) -> ClientStream:
        if self._stream is None:
            raise LinkError("the link carries no session; open() one first")
        return self._stream

    def _expect(self, kind: str, timeout: float) -> pb.ServerMessage:
        """The next message, which must be of a kind."""
        message = self._live_stream().receive(timeout)
        body = message.WhichOneof("body")
        if body == "fault":
            raise fault_error(message.fault)
        if body != kind:
            raise ProtocolError("BAD_REQUEST", f"{self._address} answered {body} where {kind} was due")
        return message

    def _send_step(self, message: bytes) -> None:
        self._session.on_the_way.append(self._session.round)
        self._session.bytes_up += len(message)
        self._live_stream().send(message)

    def _receive_result(self) -> pb.Result | None:
        """Wait for the answer to one step, and mend what it tells of; the result, if it is a new one."""
        try:
            message = self._live_stream().receive(self._step_timeout)
        except (ProtocolError, SecurityError):
            raise
        except LinkError as error:
            self._restore(error)
            return None
        session = self._session
        session.bytes_down += message.ByteSize()
        sent_in = session.on_the_way.popleft() if session.on_the_way else session.round
        match message.WhichOneof("body"):
            case "result":
                return self._acknowledge(message.result)
            case "fault" if message.fault.code in (pb.Fault.BAD_CRC, pb.Fault.OUT_OF_ORDER):
                if sent_in == session.round:
                    session.resends += 1
                    if session.resends > _MAX_RESENDS:
                        raise fault_error(message.fault)
                    self._resend(message.fault.expected_step)
                return None
            case "fault":
                fault = fault_error(message.fault)
                if fault.code not in _SESSION_LOST or not self._journal_bytes:
                    raise fault
                session.lost = True
                self._restore(fault)
                return None
            case body:
                raise ProtocolError("BAD_REQUEST", f"{self._address} answered {body} where a result was due")

    def _acknowledge(self, result: pb.Result) -> pb.Result | None:
        session = self._session
        if result.step <= session.acknowledged:
            return None
        if result.step > session.last_step:
            raise ProtocolError("BAD_REQUEST", f"{self._address} answered step {result.step}, which was never sent")
        while session.unacknowledged and session.unacknowledged[0][0] <= result.step:
            session.unacknowledged.popleft()
        session.acknowledged = result.step
        session.journal.answered(result)
        session.resends = session.attempts = 0
        return result

    def _resend(self, first: int) -> None:
        """Send the steps from ``first`` on again."""
        session = self._session
        if not session.acknowledged < first <= session.last_step:
            raise ProtocolError("OUT_OF_ORDER", f"{self._address} wants step {first}, which this device has not kept")
        session.round += 1
        for step, message in session.unacknowledged:
            if step >= first:
                self._send_step(message)

    def _restore(self, reason: LinkError) -> None:
        """Attach to the session again, or make it again; send again what the server has not done.

        Raises:
            LinkError: neither could be done in as many attempts, or as much time, as the policy allows.
        """
        session = self._session
        started, cause = time.monotonic(), reason
        lease_end, home = started + self.lease_s, self._address
        order = [home, *(address for address in self._addresses if address != home)]
        while True:
            self._disconnect()
            self._check_patience(reason, started, len(order))
            delay = _delay_before(session.attempts // len(order))
            address = order[session.attempts % len(order)]
            session.attempts += 1
            level = logging.WARNING if session.attempts == 1 else logging.INFO  # one line a break is enough
            logger.log(level, "%s; trying %s, attempt %d, in %.1f s", reason, address, session.attempts, delay)
            time.sleep(delay)
            try:
                if address == home and not session.lost and time.monotonic() < lease_end:
                    self._attach()
                elif self._journal_bytes:
                    self._replay(address, cause, started)
                else:
                    raise reason
                return
            except SecurityError as error:
                reason = self._without(order, address, error)
            except ProtocolError as error:
                if error.code == "SESSION_UNKNOWN" and self._journal_bytes:
                    session.lost, session.attempts = True, session.attempts - 1  # this address may well have room
                    reason = error
                elif error.code in _TRY_AGAIN and self._journal_bytes:
                    session.lost |= address == home
                    reason = error
                else:
                    reason = self._without(order, address, error)
            except LinkError as error:
                reason = error

    def _check_patience(self, reason: LinkError, started: float, addresses: int) -> None:
        """Raise the error that ends the generation, once the policy allows no further attempt."""
        attempts = self._session.attempts
        match self._on_server_loss:
            case "fail":
                raise reason
            case "local":
                patient = attempts < LOCAL_ATTEMPTS
            case "wait":
                patient = time.monotonic() - started < WAIT_S
            case "replay":
                patient = attempts < MAX_ATTEMPTS * addresses
        if not patient:
            raise LinkError(
                f"{reason}; {attempts} attempts to restore the session failed: start the generation again, give "
                "further addresses, or wait longer (--on-server-loss wait)"
            ) from reason

    @staticmethod
    def _without(order: list[str], address: str, error: LinkError) -> LinkError:
        """Give an address up whose refusal does not get better with time; raise that if it was the last one."""
        if len(order) == 1:
            raise error
        order.remove(address)
        logger.warning("%s; not trying %s again", error, address)
        return error

    def _attach(self) -> None:
        """Carry the session over to a new stream."""
        session = self._session
        attach = pb.Attach(session=session.id, last_acknowledged_step=session.acknowledged)
        self._connect(pb.ClientMessage(attach=attach).SerializeToString())
        attached = self._expect("attached", self._step_timeout).attached
        self.reattached += 1
        session.on_the_way.clear()
        for _ in range(min(attached.last_step - session.acknowledged, RESULTS_KEPT if self.verifies else 1)):
            session.on_the_way.append(session.round)  # the results of these follow
        if attached.last_step < session.last_step:
            self._resend(attached.last_step + 1)

    def _replay(self, address: str, reason: LinkError, started: float) -> None:
        """Make the session again at an address: what was done, then what was on its way."""
        session = self._session
        messages, chosen = session.journal.replay(session.acknowledged)
        max_tokens, sampling, context_ids = session.opening
        self._open(address, open_message(max_tokens, sampling, context_of(context_ids, chosen)))
        sent_before = session.bytes_up
        for number, message in enumerate(messages):
            if number >= PIPELINE_DEPTH:
                self._expect("result", self._step_timeout)
            session.bytes_up += len(message)
            self._live_stream().send(message)
        for _ in messages[-PIPELINE_DEPTH:]:
            self._expect("result", self._step_timeout)
        numbers = {step: len(messages) + place for place, (step, _) in enumerate(session.unacknowledged, 1)}
        session.journal.renumber(session.acknowledged, numbers)
        session.unacknowledged = deque(
            (numbers[step], renumbered_step(message, numbers[step])) for step, message in session.unacknowledged
        )
        session.questions = deque(each._replace(step=numbers[each.step]) for each in session.questions)
        session.acknowledged, session.last_step = len(messages), len(messages) + len(numbers)
        session.lost = False
        session.on_the_way.clear()
        seconds, bytes_up = time.monotonic() - started, session.bytes_up - sent_before
        token = 1 + max((question.position for question in session.questions), default=session.journal.length)
        self.replays.append(Replay(address, token, len(messages), bytes_up, seconds, str(reason)))
        logger.warning("the session goes on at %s: %d steps replayed in %.2f s", address, len(messages), seconds)
        if numbers:
            self._resend(len(messages) + 1)


def _delay_before(attempt: int) -> float:
    """Seconds to wait before the attempt of this number, counted from 0; the first comes at once."""
    if attempt == 0:
        return 0.0
    return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
