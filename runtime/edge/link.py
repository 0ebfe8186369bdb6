"""The device's end of the link: a session on the server that survives its connections."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ...devices.budget import JOURNAL_BYTES
from ...errors import LinkError, RequestError
from ...quant.codec import Codec
from ..sampling import Sampling
from ..skipping import NO_BYPASS, Bypass
from ..wire import isthmus_pb2 as pb
from ..wire.framing import (
    DRAFT_MINOR,
    KV_MINOR,
    PROTOCOL_MAJOR,
    hello_message,
    kv_message,
    step_message,
)
from ..wire.kv import encode_rows
from ..wire.security import ChannelSecurity
from ..wire.transport import PIPELINE_DEPTH, RESULTS_KEPT
from .generate import Move, Replay, StepReport
from .journal import Journal
from .remote_session import Peers, RemoteSession, passes
from .server_watch import ServerWatch
from .verification import Answer, Question, checked_tokens

if TYPE_CHECKING:
    from .options import OnServerLoss

logger = logging.getLogger(__name__)

_WORST_BYTES_PER_VALUE = 8  # above every codec's expansion, so that a full frame stays below max_frame_bytes
_KV_CHUNK_BYTES = 1 << 18  # as steps without an answer are bounded in time: 2 s of 1 Mbit/s
_KV_MESSAGE_BYTES = 64  # of a step with keys and values, the payload aside


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
        self._d_model, self._codec = d_model, codec
        self._peers = Peers(
            [addresses] if isinstance(addresses, str) else list(addresses),
            hello_message(manifest_sha256, split, codec.name),
            security,
            connect_timeout,
            step_timeout,
            on_server_loss,
            journal_bytes,
        )
        self._session = RemoteSession(self._peers)
        self._questions: deque[Question] = deque()  # submitted steps that were not collected
        self._told_up = 0  # bytes sent that are in a report
        self._opening: tuple[int, Sampling, Sequence[int], Bypass] = (0, Sampling(), (), NO_BYPASS)
        self._losses = 0

    @property
    def limits(self) -> pb.Limits:
        """What the server grants, as its Welcome said; raises `LinkError` before `open`."""
        return self._session.limits

    @property
    def reattached(self) -> int:
        """Streams that took over from a broken one."""
        return self._session.reattached

    @property
    def replays(self) -> list[Replay]:
        """How often the session was made again."""
        return self._session.replays

    @property
    def journal(self) -> Journal:
        """The steps that the session consists of."""
        return self._session.journal

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
        if self._session.minor < KV_MINOR:
            raise LinkError(
                f"{self._session.address} speaks protocol {PROTOCOL_MAJOR}.{self._session.minor}: keys and values need "
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

    def open(
        self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int] = (), bypass: Bypass = NO_BYPASS
    ) -> None:
        """Connect and begin a session.

        Args:
            max_tokens: positions to reserve: prompt and new tokens.
            sampling: how the server chooses tokens.
            context_ids: the prompt's ids, needed only by a repetition penalty.
            bypass: what positions leave out of the server's half.

        Raises:
            LinkError: the server cannot be reached; `SecurityError` if it is not trusted.
            ProtocolError: the server refuses: another export or version, an unknown codec, no room.
        """
        if self._session.is_open:
            raise RequestError("the link carries a session already; close() it first")
        self._session = RemoteSession(self._peers, self._renumber)
        self._opening = max_tokens, sampling, context_ids, bypass
        self._questions.clear()
        self._told_up = 0
        self._session.open(max_tokens, sampling, context_ids, bypass)

    def reopen(self) -> None:
        """Begin the session that was opened last anew, empty, when it is lost; see `open`."""
        self.open(*self._opening)

    def watch(self, lost: LinkError) -> ServerWatch | None:
        """Watch, beside what this object carries, for a server that grants sessions again.

        The first trial waits twice as long as it did after the loss before.

        Args:
            lost: why there is none.

        Returns:
            None if none will: it is not trusted, or refuses what time does not change.
        """
        self._losses += 1
        return ServerWatch(self._try_session, self._losses - 1) if passes(lost) else None

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
        self._session.check_open()
        started = perf_counter()
        payload = self._codec.encode(hidden, token_ids)
        encoded = perf_counter()
        message = step_message(self._session.last_step + 1, position, len(hidden), sample, payload)
        return self._exchange(message, position, encoded, encoded - started, sample=sample)

    @property
    def verifies(self) -> bool:
        """Whether the server is new enough to take drafts."""
        return self._session.minor >= DRAFT_MINOR

    @property
    def on_the_way(self) -> int:
        """Submitted steps that were not collected."""
        return len(self._questions)

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
        self._session.check_open()
        if len(self._questions) >= RESULTS_KEPT:
            raise RequestError(f"{len(self._questions)} steps without an answer: collect one, {RESULTS_KEPT} are kept")
        started = perf_counter()
        payload = self._codec.encode(hidden, token_ids)
        encoded = perf_counter()
        drafts = [*path, *token_ids[len(token_ids) - drafted :]]
        step = session.last_step + 1
        message = step_message(step, position, len(hidden), True, payload, drafts)
        ids = tuple(token_ids)
        trip = self.round_trips + 1
        self._questions.append(Question(step, position, ids, drafted, trip, encoded - started, encoded, len(message)))
        session.send(message, position)

    def answered(self, *, within_s: float = 0.0) -> bool:
        """Whether `collect` need not wait for the server, as far as one can see; waits so long to see it."""
        return self._session.wait(within_s)

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
        self._session.check_open()
        bytes_down = session.bytes_down
        last: pb.Result | None = None
        # A session that is made again on the way numbers its steps anew.
        while last is None or last.step < self._questions[0].step:
            last = session.receive()
        question = self._questions.popleft()
        self.round_trips = max(self.round_trips, question.trip)
        bytes_up, self._told_up = session.bytes_up - self._told_up, session.bytes_up
        report = StepReport(
            bytes_up=bytes_up,
            bytes_down=session.bytes_down - bytes_down,
            encode_s=question.encode_s,
            wait_s=max(0.0, session.received_at - question.encoded),
            server_decode_s=last.decode_us / 1e6,
            server_queue_s=last.queue_us / 1e6,
            server_compute_s=last.compute_us / 1e6,
            onnxruntime_s=last.onnxruntime_us / 1e6,
        )
        return Answer(checked_tokens(question, last), report, question.bytes_up)

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
        self._session.check_open()
        started = perf_counter()
        coding, payload = encode_rows(rows, exact=self._codec.name == "raw32")
        encoded = perf_counter()
        layers, _, _, tokens, _ = rows.shape
        chunk = pb.KVChunk(
            tokens=tokens, first_layer=first_layer, last_layer=first_layer + layers, coding=coding, payload=payload
        )
        message = kv_message(self._session.last_step + 1, position, chunk)
        return self._exchange(message, position, encoded, encoded - started, sample=False)

    def _exchange(self, message: bytes, position: int, encoded: float, encode_s: float, *, sample: bool) -> StepReport:
        """Send the next step; take in what results there are, or are due."""
        session = self._session
        bytes_up, bytes_down = session.bytes_up, session.bytes_down
        session.send(message, position)
        results: list[pb.Result] = []
        while len(session.unacknowledged) >= (1 if sample else PIPELINE_DEPTH):
            result = session.receive()
            if result is not None:
                results.append(result)
        self._told_up = session.bytes_up
        self.round_trips += sample
        last = results[-1] if results else pb.Result()
        return StepReport(
            token=last.token if sample and last.HasField("token") else None,
            bytes_up=session.bytes_up - bytes_up,
            bytes_down=session.bytes_down - bytes_down,
            encode_s=encode_s,
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
        self._session.close(cancel=cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _try_session(self) -> None:
        """Open a session of its own and end it; any thread may."""
        trial = RemoteSession(self._peers)
        trial.open(1, Sampling(), ())
        trial.close()

    def _renumber(self, steps: Mapping[int, int]) -> None:
        """Call steps on their way as the session that was made again does."""
        self._questions = deque(each._replace(step=steps[each.step]) for each in self._questions)
