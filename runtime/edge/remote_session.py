"""A session on a server, that outlives its streams and, if it must, the server."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...devices.budget import JOURNAL_BYTES
from ...errors import LinkError, ProtocolError, SecurityError
from ..sampling import Sampling
from ..skipping import NO_BYPASS, Bypass
from ..wire import isthmus_pb2 as pb
from ..wire.framing import (
    DRAFT_MINOR,
    FFN_SKIP_MINOR,
    PROTOCOL_MAJOR,
    SKIP_MINOR,
    fault_error,
    open_message,
    renumbered_step,
)
from ..wire.security import ChannelSecurity
from ..wire.stream import ClientStream, DamagedMessageError
from ..wire.transport import PIPELINE_DEPTH, RESULTS_KEPT
from .generate import Replay
from .journal import Journal, context_of

if TYPE_CHECKING:
    from .options import OnServerLoss

logger = logging.getLogger(__name__)  # gets texts of errors: a record that is kept would keep their connections

# Pauses between attempts to restore a session: doubled each time, jittered so that devices do not come together.
_FIRST_DELAY_S = 0.2
_LONGEST_DELAY_S = 10.0
MAX_ATTEMPTS = 8  # to restore a session at one address; their pauses last about 20 seconds together
LOCAL_ATTEMPTS = 4  # about a second on a link that refuses at once: the device need not wait, it can go on alone
WAIT_S = 600.0  # that `wait` waits for a server
_CLOSE_TIMEOUT_S = 2.0  # a server that does not answer a Close frees the session by its lease
_MAX_RESENDS = 4  # of one step on a link that damages it; then the link is not worth having

# Faults by which a server says that a session is lost, though the stream is whole; and those that pass with time.
_SESSION_LOST = ("SESSION_UNKNOWN", "INTERNAL", "DRAINING")
_TRY_AGAIN = ("SERVER_FULL", "DRAINING", "INTERNAL", "BAD_CRC", "OUT_OF_ORDER")


def passes(error: LinkError) -> bool:
    """Whether a new session may be had where one was lost or refused, now or later."""
    if isinstance(error, ProtocolError):
        return error.code in (*_TRY_AGAIN, *_SESSION_LOST)
    return not isinstance(error, SecurityError)


@dataclass(frozen=True)
class Peers:
    """The servers that may have a session, and how they are spoken to; see `isthmus.runtime.edge.link.RemoteBack`."""

    addresses: Sequence[str]
    hello: bytes
    security: ChannelSecurity
    connect_timeout: float = 5.0
    step_timeout: float = 30.0
    on_server_loss: OnServerLoss = "replay"
    journal_bytes: int = JOURNAL_BYTES

    @property
    def replays(self) -> bool:
        """Whether a lost session is made again."""
        return self.on_server_loss in ("replay", "wait")


class RemoteSession:
    """What the device knows of its session on a server, and how it gets there and back.

    The server answers every step that it reads, in order. ``_on_the_way`` has, for each step without an answer, the
    round of resending in which it was sent: a fault of an older round is about what was sent again since.

    Args:
        peers: to find the session on.
        renumbered: called with the new number of each step on its way, by its old one, when a session is made again.

    Attributes:
        id: that the server gave it.
        last_step: that was sent.
        acknowledged: the last one that was answered.
        unacknowledged: numbers and messages of those behind it.
        bytes_up: of steps, those sent again included.
        bytes_down: of their answers.
        reattached: streams that took over from a broken one.
        replays: how often it was made again.
        journal: what it consists of.
    """

    def __init__(self, peers: Peers, renumbered: Callable[[Mapping[int, int]], None] = lambda _: None) -> None:
        self.id = b""
        self.last_step = self.acknowledged = 0
        self.unacknowledged: deque[tuple[int, bytes]] = deque()
        self.bytes_up = self.bytes_down = 0
        self.reattached = 0
        self.replays: list[Replay] = []
        self.address = peers.addresses[0]
        self.minor = 0
        self._peers, self._renumbered = peers, renumbered
        self._stream: ClientStream | None = None
        self._limits: pb.Limits | None = None
        self._on_the_way: deque[int] = deque()
        self._round = 0
        self._resends = self._attempts = 0  # since the last result
        self.journal = Journal(peers.journal_bytes if peers.replays else 0)
        self._lost = False  # no server has it any more
        self._opening: tuple[int, Sampling, tuple[int, ...], Bypass] = (0, Sampling(), (), NO_BYPASS)

    @property
    def limits(self) -> pb.Limits:
        """What the server grants, as its Welcome said; raises `LinkError` before `open`."""
        if self._limits is None:
            raise LinkError("the server's limits are not known before open(); call that first")
        return self._limits

    @property
    def is_open(self) -> bool:
        """Whether a stream carries it."""
        return self._stream is not None

    @property
    def received_at(self) -> float:
        """`time.perf_counter` when the last message came in that `receive` took."""
        return self._live_stream().received_at

    def wait(self, seconds: float) -> bool:
        """Wait for at most so long; whether `receive` would not wait for the server then."""
        return self._live_stream().wait(seconds)

    def open(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int], bypass: Bypass = NO_BYPASS) -> None:
        """Begin it on the first server that grants it, see `isthmus.runtime.edge.link.RemoteBack.open`."""
        self._opening = max_tokens, sampling, tuple(context_ids), bypass
        request = open_message(max_tokens, sampling, context_ids, bypass)
        for address in self._peers.addresses[:-1]:
            try:
                self._open(address, request)
                return
            except LinkError as error:
                logger.warning("%s; trying the next address", str(error))
        self._open(self._peers.addresses[-1], request)

    def check_open(self) -> None:
        """Raise `LinkError` unless a stream carries it."""
        self._live_stream()

    def send(self, message: bytes, position: int) -> None:
        """Send a step, whose number is the one after `last_step`.

        Args:
            message: the step.
            position: of its first token.
        """
        self.last_step += 1
        self.unacknowledged.append((self.last_step, message))
        self.journal.sent(self.last_step, position, message)
        self._send_step(message)

    def receive(self) -> pb.Result | None:
        """Wait for the answer to one step, and mend what it tells of; the result, if it is a new one.

        Raises:
            LinkError: the link is gone and the session could not be restored.
            ProtocolError: the server refused the step, or does not keep the protocol.
        """
        try:
            message = self._live_stream().receive(self._peers.step_timeout)
        except (ProtocolError, SecurityError):
            raise
        except LinkError as error:
            self._restore(error)
            return None
        self.bytes_down += message.ByteSize()
        if message.WhichOneof("body") in ("welcome", "opened", "attached"):
            return None  # said twice on the way
        sent_in = self._on_the_way.popleft() if self._on_the_way else self._round
        match message.WhichOneof("body"):
            case "result":
                return self._acknowledge(message.result)
            case "fault" if message.fault.code in (pb.Fault.BAD_CRC, pb.Fault.OUT_OF_ORDER):
                if sent_in == self._round:
                    self._resends += 1
                    if self._resends > _MAX_RESENDS:
                        raise fault_error(message.fault)
                    self._resend(message.fault.expected_step)
                return None
            case "fault":
                fault = fault_error(message.fault)
                if fault.code not in _SESSION_LOST or not self._peers.replays:
                    raise fault
                self._lost = True
                self._restore(fault)
                return None
            case body:
                raise ProtocolError("BAD_REQUEST", f"{self.address} answered {body} where a result was due")

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
            logger.debug("the session on %s ends by its lease: %s", self.address, str(error))
        finally:
            self._disconnect()

    def _open(self, address: str, request: bytes) -> None:
        """Connect to an address and begin a session there."""
        # Hello and Open travel together: that saves a round trip, and a server that refuses the first
        # ignores the rest.
        self.address = address
        for resends in range(_MAX_RESENDS, -1, -1):
            self._connect(request)
            try:
                self._check_skipping(address)
                self.id = self._expect("opened", self._peers.step_timeout).opened.session
                return
            except BaseException as error:
                self.close(cancel=True)  # the session may be there already
                refused = isinstance(error, ProtocolError) and error.code == "BAD_CRC"
                if not (refused or isinstance(error, DamagedMessageError)) or not resends:
                    raise

    def _check_skipping(self, address: str) -> None:
        """Raise `LinkError` if the server is too old to leave out what the device does."""
        bypass = self._opening[-1]
        for what, asked, minor in (
            ("a skip schedule", bool(bypass.blocks), SKIP_MINOR),
            ("to skip feed-forward networks", bypass.ffn_similarity is not None, FFN_SKIP_MINOR),
        ):
            if asked and self.minor < minor:
                raise LinkError(
                    f"{address} speaks protocol {PROTOCOL_MAJOR}.{self.minor}: {what} needs {PROTOCOL_MAJOR}.{minor}; "
                    "update the server, or leave it out"
                )

    def _acknowledge(self, result: pb.Result) -> pb.Result | None:
        if result.step <= self.acknowledged:
            return None
        if result.step > self.last_step:
            raise ProtocolError("BAD_REQUEST", f"{self.address} answered step {result.step}, which was never sent")
        if result.step > self.acknowledged + 1 and self.minor >= DRAFT_MINOR:
            # Answers come in order: those between were lost, and the server has kept them.
            self._restore(LinkError(f"{self.address}: the answer to step {self.acknowledged + 1} was lost"))
            return None
        while self.unacknowledged and self.unacknowledged[0][0] <= result.step:
            self.unacknowledged.popleft()
        self.acknowledged = result.step
        self.journal.answered(result)
        self._resends = self._attempts = 0
        return result

    def _resend(self, first: int) -> None:
        """Send the steps from ``first`` on again."""
        if not self.acknowledged < first <= self.last_step:
            raise ProtocolError("OUT_OF_ORDER", f"{self.address} wants step {first}, which this device has not kept")
        self._round += 1
        for step, message in self.unacknowledged:
            if step >= first:
                self._send_step(message)

    def _connect(self, request: bytes) -> None:
        """Open a stream, greet, and send `Open` or `Attach`, whose answer is still to come."""
        self._stream = ClientStream(self.address, self._peers.security)
        try:
            self._stream.send(self._peers.hello)
            self._stream.send(request)
            welcome = self._expect("welcome", self._peers.connect_timeout).welcome
            self._limits, self.minor = welcome.limits, welcome.protocol_minor
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
            raise ProtocolError("BAD_REQUEST", f"{self.address} answered {body} where {kind} was due")
        return message

    def _send_step(self, message: bytes) -> None:
        self._on_the_way.append(self._round)
        self.bytes_up += len(message)
        self._live_stream().send(message)

    def _restore(self, reason: LinkError) -> None:
        """Attach to the session again, or make it again; send again what the server has not done.

        Raises:
            LinkError: neither could be done in as many attempts, or as much time, as the policy allows.
        """
        started, cause = time.monotonic(), reason
        lease_end, home = started + self.limits.lease_ms / 1000, self.address
        order = [home, *(address for address in self._peers.addresses if address != home)]
        while True:
            self._disconnect()
            self._check_patience(reason, started, len(order))
            delay = _delay_before(self._attempts // len(order))
            address = order[self._attempts % len(order)]
            self._attempts += 1
            level = logging.WARNING if self._attempts == 1 else logging.INFO  # one line a break is enough
            logger.log(level, "%s; trying %s, attempt %d, in %.1f s", str(reason), address, self._attempts, delay)
            time.sleep(delay)
            try:
                if address == home and not self._lost and time.monotonic() < lease_end:
                    self._attach()
                elif self._peers.replays:
                    self._replay(address, cause, started)
                else:
                    raise reason
                return
            except SecurityError as error:
                reason = self._without(order, address, error)
            except ProtocolError as error:
                if error.code == "SESSION_UNKNOWN" and self._peers.replays:
                    self._lost, self._attempts = True, self._attempts - 1  # this address may well have room
                    reason = error
                elif error.code in _TRY_AGAIN and self._peers.replays:
                    self._lost |= address == home
                    reason = error
                else:
                    reason = self._without(order, address, error)
            except LinkError as error:
                reason = error

    def _check_patience(self, reason: LinkError, started: float, addresses: int) -> None:
        """Raise the error that ends the generation, once the policy allows no further attempt."""
        attempts = self._attempts
        match self._peers.on_server_loss:
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
        logger.warning("%s; not trying %s again", str(error), address)
        return error

    def _attach(self) -> None:
        """Carry the session over to a new stream."""
        attach = pb.Attach(session=self.id, last_acknowledged_step=self.acknowledged)
        self._connect(pb.ClientMessage(attach=attach).SerializeToString())
        attached = self._expect("attached", self._peers.step_timeout).attached
        self.reattached += 1
        self._on_the_way.clear()
        for _ in range(min(attached.last_step - self.acknowledged, RESULTS_KEPT if self.minor >= DRAFT_MINOR else 1)):
            self._on_the_way.append(self._round)  # the results of these follow
        if attached.last_step < self.last_step:
            self._resend(attached.last_step + 1)

    def _replay(self, address: str, reason: LinkError, started: float) -> None:
        """Make the session again at an address: what was done, then what was on its way."""
        messages, chosen = self.journal.replay(self.acknowledged)
        max_tokens, sampling, context_ids, bypass = self._opening
        self._open(address, open_message(max_tokens, sampling, context_of(context_ids, chosen), bypass))
        sent_before = self.bytes_up
        for number, message in enumerate(messages):
            if number >= PIPELINE_DEPTH:
                self._expect("result", self._peers.step_timeout)
            self.bytes_up += len(message)
            self._live_stream().send(message)
        for _ in messages[-PIPELINE_DEPTH:]:
            self._expect("result", self._peers.step_timeout)
        numbers = {step: len(messages) + place for place, (step, _) in enumerate(self.unacknowledged, 1)}
        self.journal.renumber(self.acknowledged, numbers)
        self.unacknowledged = deque(
            (numbers[step], renumbered_step(message, numbers[step])) for step, message in self.unacknowledged
        )
        self._renumbered(numbers)
        self.acknowledged, self.last_step = len(messages), len(messages) + len(numbers)
        self._lost = False
        self._on_the_way.clear()
        seconds, bytes_up = time.monotonic() - started, self.bytes_up - sent_before
        self.replays.append(Replay(address, self.journal.length + 1, len(messages), bytes_up, seconds, str(reason)))
        logger.warning("the session goes on at %s: %d steps replayed in %.2f s", address, len(messages), seconds)
        if numbers:
            self._resend(len(messages) + 1)


def _delay_before(attempt: int) -> float:
    """Seconds to wait before the attempt of this number, counted from 0; the first comes at once."""
    if attempt == 0:
        return 0.0
    return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
