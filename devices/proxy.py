"""A TCP proxy that makes a local connection behave like a given link.

It needs no privileges and no kernel module, so that it runs where netem does not. What it forwards it delays, passes at
the link's rate (one queue for each direction, shared by all connections, as on a radio), and keeps in order. A
connection's first bytes wait one more round trip, TCP's handshake. It sits above TCP: loss is a retransmission timeout
(see `isthmus.devices.link`), and the kernel's own buffers come on top of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import selectors
import socket
import struct
from concurrent.futures import Future
from dataclasses import dataclass

from ..errors import LinkError
from .background import BackgroundService
from .channel import Trace
from .link import SEGMENT_BYTES, LinkProfile, parse_duration_s, parse_size_bytes, retransmission_ms

logger = logging.getLogger(__name__)

Address = tuple[str, int]
_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]  # of one direction

_MAX_CONNECTIONS = 256  # select, below, takes descriptors under 1024
_CONNECT_TIMEOUT_S = 10.0
_CHUNK_S = 0.01  # of the link's rate: what arrives together
_MAX_CHUNK_BYTES = 1 << 16
# What a connection may have on the way in each direction: what the link itself holds, and a modem's queue before it.
_QUEUE_BYTES = 1 << 16
_MAX_IN_FLIGHT_BYTES = 8 << 20
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


@dataclass(frozen=True)
class DropAfter:
    """When each connection is reset: so long after it opened, or after so many bytes both ways."""

    seconds: float = math.inf
    bytes_: float = math.inf

    @classmethod
    def parse(cls, text: str) -> DropAfter:
        """Read a time such as ``20s`` or a size such as ``500kB``.

        Raises:
            LinkError: neither, or 0.
        """
        try:
            drop = cls(seconds=parse_duration_s(text))
        except LinkError:
            try:
                drop = cls(bytes_=parse_size_bytes(text))
            except LinkError:
                raise LinkError(
                    f"drop after {text!r}: must be a time (us, ms, s) or a size (B, kB, MB), as in 20s or 500kB"
                ) from None
        if not min(drop.seconds, drop.bytes_):
            raise LinkError(f"drop after {text!r}: no connection would come up; give more than 0")
        return drop


class LinkProxy(BackgroundService):
    """Forwards TCP connections over an emulated link, on a thread of its own.

    ::

        with LinkProxy(("127.0.0.1", 0), ("127.0.0.1", 7070), LINKS["lte"]) as proxy:
            print(proxy.address)
            proxy.wait()

    The link's time, for its trace and its stalls, begins with the first connection.

    Args:
        listen: host and port; port 0 picks a free one.
        connect: host and port of the target.
        link: what is emulated.
        trace: rates and round trip over time, in place of the link's own.
        drop: when connections are reset.
        seed: of jitter and loss.
        check: refuse to start if the target is down.

    Attributes:
        bytes_up: forwarded to the target so far.
        bytes_down: forwarded from the target so far.
    """

    def __init__(
        self,
        listen: Address,
        connect: Address,
        link: LinkProfile,
        *,
        trace: Trace | None = None,
        drop: DropAfter | None = None,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        # select waits in microseconds, epoll in whole milliseconds: up to one too many each way.
        super().__init__("proxy", lambda: asyncio.SelectorEventLoop(selectors.SelectSelector()))
        self.link = link
        self.bytes_up = self.bytes_down = 0
        self._listen, self._connect = listen, connect
        self._trace = Trace.steady(link) if trace is None else trace
        self._drop = DropAfter() if drop is None else drop
        self._check = check
        self._random = random.Random(seed)
        self._free_s = {True: 0.0, False: 0.0}  # when the last byte has left, by direction
        self._began: float | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def _serve(self, started: Future[str]) -> None:
        if self._check:
            _, writer = await self._open_target()
            writer.transport.abort()
        try:
            server = await asyncio.start_server(self._accept, *self._listen)
        except OSError as error:
            raise LinkError(
                f"cannot listen on {_text(self._listen)}: {error.strerror or error}; choose another address, port 0 "
                "picks a free one"
            ) from error
        started.set_result(_text(server.sockets[0].getsockname()[:2]))
        await self._stopping.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _open_target(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.wait_for(asyncio.open_connection(*self._connect), _CONNECT_TIMEOUT_S)
        except OSError as error:  # a timeout is one too
            reason = error.strerror or str(error) or f"no answer within {_CONNECT_TIMEOUT_S:g} s"
            raise LinkError(
                f"cannot reach the target {_text(self._connect)}: {reason}; start it first, or check the address"
            ) from error

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= _MAX_CONNECTIONS:
            logger.warning("a connection beyond %d was refused", _MAX_CONNECTIONS)
            _reset(writer)
            return
        connection = asyncio.get_running_loop().create_task(self._forward(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until both directions have ended, or it breaks, or is dropped."""
        writers = [writer]
        try:
            target_reader, target_writer = await self._open_target()
            writers.append(target_writer)
            await self._carry((reader, target_writer), (target_reader, writer))
            for each in writers:
                each.close()
        except* LinkError as errors:
            logger.error("%s; the client's connection was closed", errors.exceptions[0])
        except* OSError as errors:
            logger.info("connection ended: %s", errors.exceptions[0])
        finally:
            for each in writers:
                if not each.is_closing():
                    _reset(each)

    async def _carry(self, up: _Ends, down: _Ends) -> None:
        """Carry both directions until both have ended."""
        opened_s = self._now_s()
        arrived_s = opened_s + 1.5e-3 * self._trace.rtt_ms_at(opened_s)  # the first bytes, after the handshake
        ways = _Way(True, arrived_s), _Way(False, arrived_s)
        limit_s = self._drop.seconds if self._drop.seconds < math.inf else None
        try:
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                for way, (reader, writer) in zip(ways, (up, down), strict=True):
                    group.create_task(self._take(way, reader))
                    group.create_task(self._deliver(way, writer, ways))
        except TimeoutError as error:  # ours; one of a socket comes in a group
            raise ConnectionResetError(f"dropped after {limit_s:g} s") from error

    async def _take(self, way: _Way, reader: asyncio.StreamReader) -> None:
        """Read what is sent, and put it on its way."""
        while not way.ended:
            now_s = self._now_s()
            rate = 125e3 * self._trace.rate_mbit_s_at(now_s, up=way.up)  # bytes a second
            held = min(_MAX_IN_FLIGHT_BYTES, _QUEUE_BYTES + rate * self._trace.rtt_ms_at(now_s) / 2e3)
            await way.room_below(held)
            data = await reader.read(int(min(_MAX_CHUNK_BYTES, max(SEGMENT_BYTES, rate * _CHUNK_S))))
            way.put(self._arrival_s(len(data), up=way.up), data)

    async def _deliver(self, way: _Way, writer: asyncio.StreamWriter, both: tuple[_Way, _Way]) -> None:
        """Write what has arrived, when it has."""
        while True:
            arrival_s, data = await way.get()
            await asyncio.sleep(arrival_s - self._now_s())
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
            way.delivered(len(data))
            if way.up:
                self.bytes_up += len(data)
            else:
                self.bytes_down += len(data)
            if (moved := sum(each.bytes_delivered for each in both)) >= self._drop.bytes_:
                raise ConnectionResetError(f"dropped after {moved} bytes")

    def _now_s(self) -> float:
        """Seconds since the first connection."""
        now = asyncio.get_running_loop().time()
        if self._began is None:
            self._began = now
        return now - self._began

    def _arrival_s(self, bytes_: int, *, up: bool) -> float:
        """When what is sent now arrives, but for what is ahead of it in its connection."""
        link, now_s = self.link, self._now_s()
        start_s = max(now_s, self._free_s[up])
        if link.stall is not None:
            start_s = link.stall.release(start_s)
        sent_s = self._free_s[up] = self._trace.sent_s(start_s, bytes_, up=up)
        rtt_ms = self._trace.rtt_ms_at(sent_s)
        delay_ms = rtt_ms / 2 + self._random.uniform(-link.jitter_ms, link.jitter_ms)
        if self._random.random() < 1 - (1 - link.loss) ** math.ceil(bytes_ / SEGMENT_BYTES):
            delay_ms += retransmission_ms(rtt_ms)
        arrival_s = sent_s + max(0.0, delay_ms) / 1e3
        return arrival_s if link.stall is None else link.stall.release(arrival_s)


class _Way:
    """What is on its way in one direction of a connection."""

    def __init__(self, up: bool, first_s: float) -> None:
        self.up = up
        self.bytes_delivered = 0
        self.ended = False
        self._last_s = first_s
        self._chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._bytes = 0
        self._delivered = asyncio.Event()

    def put(self, arrival_s: float, data: bytes) -> None:
        """Send data, behind what was sent before; empty data ends the way."""
        self.ended = not data
        self._last_s = max(self._last_s, arrival_s)
        self._bytes += len(data)
        self._chunks.put_nowait((self._last_s, data))

    async def get(self) -> tuple[float, bytes]:
        """The next data, and when it arrives."""
        return await self._chunks.get()

    def delivered(self, bytes_: int) -> None:
        """Count bytes as out."""
        self._bytes -= bytes_
        self.bytes_delivered += bytes_
        self._delivered.set()

    async def room_below(self, limit: float) -> None:
        """Wait until fewer bytes than ``limit`` are on their way."""
        while self._bytes >= limit:
            self._delivered.clear()
            await self._delivered.wait()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST: its peer learns at once, and loses what it has not read."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
