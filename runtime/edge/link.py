"""The device's end of the link: a session on the server that survives its connections."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from types import TracebackType

import grpc
import numpy as np
from numpy.typing import NDArray

from ...errors import LinkError, ProtocolError, RequestError, SecurityError
from ...quant.codec import Codec
from ..sampling import Sampling
from ..wire import isthmus_pb2 as pb
from ..wire.framing import fault_error, hello_message, open_message, parse_server_message, step_message
from ..wire.security import ChannelSecurity
from ..wire.transport import PIPELINE_DEPTH, SESSION_PATH
from .generate import StepReport

logger = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.2  # back-off between re-attachments: doubled each time, jittered so that devices do not come at once
_LONGEST_DELAY_S = 10.0
_CLOSE_TIMEOUT_S = 2.0  # a server that does not answer a Close frees the session by its lease
_WORST_BYTES_PER_VALUE = 8  # above every codec's expansion, so that a full frame stays below max_frame_bytes
_MAX_RESENDS = 4  # of one step on a link that damages it; then the link is not worth having


class RemoteBack:
    """The back half on a server. One object carries one session at a time; it is used from one thread.

    The stream under the session is disposable: if it breaks, or a step's result does not come in time, a new
    one attaches to the session and the steps without a result are sent again, byte for byte.

    Args:
        address: ``HOST:PORT`` of the server.
        manifest_sha256: of the device half; the server's must be equal.
        split: first layer on the server.
        d_model: width of the hidden states.
        codec: how hidden states are encoded.
        security: TLS and what it trusts, or plaintext.
        connect_timeout: seconds for connection and handshake.
        step_timeout: seconds for one result, and for opening a session.
        max_reattach: new streams that are tried, with growing pauses, without a result in between. The
            default's pauses last about 20 seconds together, less than a lease.
    """

    source = "server"

    def __init__(
        self,
        address: str,
        *,
        manifest_sha256: str,
        split: int,
        d_model: int,
        codec: Codec,
        security: ChannelSecurity,
        connect_timeout: float = 5.0,
        step_timeout: float = 30.0,
        max_reattach: int = 7,
    ) -> None:
        self.round_trips = 0  # times that the device waited for a token
        self.reattached = 0  # streams that took over from a broken one
        self._address = address
        self._hello = hello_message(manifest_sha256, split, codec.name)
        self._d_model = d_model
        self._codec = codec
        self._security = security
        self._connect_timeout = connect_timeout
        self._step_timeout = step_timeout
        self._max_reattach = max_reattach
        self._stream: _Stream | None = None
        self._limits: pb.Limits | None = None
        self._forget_session()

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
        if not sampling_needs_context(sampling):
            context_ids = ()
        self._forget_session()
        # Hello and Open travel together: that saves a round trip, and a server that refuses the first ignores the rest.
        self._connect(open_message(max_tokens, sampling, context_ids))
        try:
            self._session = self._expect("opened", self._step_timeout).opened.session
        except BaseException:
            self._disconnect()
            raise

    def step(self, hidden: NDArray[np.float32], position: int, *, sample: bool) -> StepReport:
        """Send hidden states; wait for the token if one is asked for.

        Without ``sample`` the call returns while the step is on its way, unless `PIPELINE_DEPTH` steps are.

        Args:
            hidden: ``[tokens, d_model]`` of consecutive positions, at most `chunk_limit` of them.
            position: of the first; smaller than the session's length rolls the server back to it.
            sample: whether the token after the last position is wanted.

        Returns:
            The token, and what the step cost. Bytes received and the server's times are those of every result
            that came in during the call.

        Raises:
            LinkError: the link is gone and could not be restored.
            ProtocolError: the server refused the step, or has forgotten the session.
            CodecError: the hidden states are not finite.
        """
        if self._stream is None:
            raise LinkError("the link carries no session; open() one first")
        started = perf_counter()
        payload = self._codec.encode(hidden)
        step = self._last_step + 1
        message = step_message(step, position, len(hidden), sample, payload)
        encoded = perf_counter()
        self._last_step = step
        self._unacknowledged.append((step, message))
        self._stream.send_step(step, message)
        results: list[pb.Result] = []
        while self._unacknowledged and (sample or len(self._unacknowledged) >= PIPELINE_DEPTH):
            results += self._receive_results()
        self.round_trips += sample
        last = results[-1] if results else pb.Result()
        return StepReport(
            token=last.token if sample and last.HasField("token") else None,
            bytes_up=len(message),
            bytes_down=sum(result.ByteSize() for result in results),
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
            while stream.receive(deadline - time.monotonic()).WhichOneof("body") not in ("closed", "fault"):
                pass
        except (grpc.RpcError, LinkError) as error:
            logger.debug("the session on %s ends by its lease: %s", self._address, error)
        finally:
            self._disconnect()

    def __enter__(self) -> RemoteBack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _forget_session(self) -> None:
        self._session = b""
        self._last_step = 0
        self._acknowledged = 0
        self._unacknowledged: deque[tuple[int, bytes]] = deque()
        self._resends = 0

    def _connect(self, request: bytes) -> None:
        """Open a stream, greet, and send `Open` or `Attach`, whose answer is still to come."""
        self._stream = _Stream(self._address, self._security)
        try:
            self._stream.send(self._hello)
            self._stream.send(request)
            self._limits = self._expect("welcome", self._connect_timeout).welcome.limits
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _expect(self, kind: str, timeout: float) -> pb.ServerMessage:
        """The next message, which must be of a kind; any failure is final for this stream."""
        if self._stream is None:
            raise LinkError(f"the link to {self._address} is closed; open() it again")
        try:
            message = self._stream.receive(timeout)
        except grpc.RpcError as error:
            raise self._security.explain(self._address, error) from error
        body = message.WhichOneof("body")
        if body == "fault":
            raise fault_error(message.fault)
        if body != kind:
            raise ProtocolError("BAD_REQUEST", f"{self._address} answered {body} where {kind} was due")
        return message

    def _receive_results(self) -> list[pb.Result]:
        """Wait for one answer to a step; the result that it brought, if it is new."""
        if self._stream is None:
            raise LinkError(f"the link to {self._address} is closed; open() it again")
        try:
            message = self._stream.receive(self._step_timeout)
        except (grpc.RpcError, _Late, _Ended) as error:
            return self._reattach(error)
        ...
