"""One stream of the wire as a client sees it."""

from __future__ import annotations

import queue
import threading
from time import perf_counter

import grpc

from ...errors import LinkError
from . import isthmus_pb2 as pb
from .framing import Seals, parse_server_message, seal
from .security import ChannelSecurity
from .transport import SESSION_PATH

_JOIN_TIMEOUT_S = 2.0  # a closed channel ends its stream at once; this only keeps a bug from hanging the caller


_Received = tuple[float, bytes | grpc.RpcError | None]  # when it came


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
        self._call = call(iter(self._outgoing.get, None), metadata=security.metadata)
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
        if received is None:  # an end stays the next thing to tell
            raise LinkError(f"{self._address}: the server ended the stream")
        if not self._greeted:
            raise self._security.explain(self._address, received) from received
        raise LinkError(f"{self._address}: the link broke ({_status(received)})") from received

    def close(self) -> None:
        """End the stream and its connection."""
        self._outgoing.put(None)
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._channel.close()
        self._reader.join(_JOIN_TIMEOUT_S)

    def _read(self) -> None:
        end: grpc.RpcError | None = None
        try:
            for message in self._call:
                self._inbox.put((perf_counter(), message))
        except grpc.RpcError as error:
            end = error
        self._inbox.put((perf_counter(), end))


def _status(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else repr(error)
