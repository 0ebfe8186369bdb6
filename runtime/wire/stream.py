"""One stream of the wire as a client sees it."""

from __future__ import annotations

import queue
import threading
from time import perf_counter
from typing import Any, NamedTuple

import grpc

from ...errors import LinkError
from . import isthmus_pb2 as pb
from .framing import Seals, parse_server_message, seal
from .security import ChannelSecurity
from .transport import SESSION_PATH

_JOIN_TIMEOUT_S = 2.0  # a closed channel ends its stream at once; this only keeps a bug from hanging the caller


class _End(NamedTuple):
    """How a stream ended."""

    code: grpc.StatusCode
    details: str


_Received = tuple[float, bytes | _End]  # when it came


class DamagedMessageError(LinkError):
    """What came in is not what was sent."""


class ClientStream:
    """One gRPC stream. Messages come in on a thread of its own, so that every wait can have a deadline.

    Attributes:
        received_at: `time.perf_counter` when the last message came in that `receive` gave.
    """

    def __init__(self, address: str, security: ChannelSecurity) -> None:
        self._address = address
        self._security = security
        self._greeted = False
        self._seals = Seals()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[_Received] = queue.SimpleQueue()
        self._next: _Received | None = None
        self.received_at = 0.0
        self._channel = security.channel(address)
        call = self._channel.stream_stream(SESSION_PATH, None, None)
        self._call: Any = call(iter(self._outgoing.get, None), metadata=security.metadata)
        self._reader = threading.Thread(target=self._read, name="isthmus-link", daemon=True)
        self._reader.start()

    def send(self, message: bytes) -> None:
        """Hand a message to gRPC; if the stream is broken, `receive` tells."""
        self._outgoing.put(seal(message))

    def wait(self, timeout: float) -> bool:
        """Wait for at most so many seconds; whether `receive` has something to tell at once."""
        if self._next is None:
            try:
                self._next = self._inbox.get(timeout=max(0.0, timeout))
            except queue.Empty:
                return False
        return True

    def receive(self, timeout: float) -> pb.ServerMessage:
        """The next message.

        Raises:
            LinkError: the stream has ended, or nothing came within ``timeout`` seconds.
            DamagedMessageError: what came is not what was sent.
        """
        if not self.wait(timeout) or self._next is None:
            raise LinkError(f"{self._address}: no answer within {timeout:g} s; the server or the network hangs")
        self.received_at, received = self._next
        if isinstance(received, bytes):
            self._next = None
            self._greeted = True
            message = self._seals.open(received)
            if message is None:
                raise DamagedMessageError(f"{self._address}: a message of {len(received)} bytes was damaged on its way")
            return parse_server_message(message)
        # An end stays the next thing to tell.
        if received.code is grpc.StatusCode.OK:
            raise LinkError(f"{self._address}: the server ended the stream")
        if not self._greeted:
            raise self._security.explain(self._address, received.code, received.details)
        raise LinkError(f"{self._address}: the link broke ({received.code.name}: {received.details})")

    def close(self) -> None:
        """End the stream and its connection. Safe twice."""
        if self._call is None:
            return
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()
        self._reader.join(_JOIN_TIMEOUT_S)
        self._call = None

    def _read(self) -> None:
        # The last reference to a call must go while the process lives: what deletes a call takes a lock, and at the
        # process's exit a thread of gRPC's may have been stopped with it in hand. An error of a call is the call
        # itself, and its traceback leads back to it; so neither is kept.
        call = self._call
        code, details = grpc.StatusCode.OK, ""
        try:
            for message in call:
                self._inbox.put((perf_counter(), message))
        except grpc.RpcError as error:
            error.__traceback__ = None
            code, details = call.code(), call.details() or ""
        self._inbox.put((perf_counter(), _End(code, details)))
