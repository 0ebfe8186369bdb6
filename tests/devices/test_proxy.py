"""The proxy over real sockets. Times are bounded from below only: a shared machine may be late, never early."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from isthmus.devices.channel import Trace
from isthmus.devices.link import LINKS, LinkProfile, Stall, retransmission_ms
from isthmus.devices.proxy import DropAfter, LinkProxy
from isthmus.errors import LinkError

IDEAL = LINKS["loopback"]
EARLY_S = 0.002  # clocks differ by as much


class Target:
    """A server that keeps what comes in, and answers with ``answer``; echoes if that is None."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.received = b""
        self.arrivals: list[float] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        with client:
            try:
                if self._answer:
                    client.sendall(self._answer)
                while data := client.recv(1 << 16):
                    self.arrivals.append(time.monotonic())
                    self.received += data
                    if self._answer is None:
                        client.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def make_target() -> Iterator[Callable[..., Target]]:
    targets = []

    def make(answer: bytes | None = None) -> Target:
        targets.append(Target(answer))
        return targets[-1]

    yield make
    for target in targets:
        target.close()


@pytest.fixture
def make_proxy(make_target) -> Iterator[Callable[..., LinkProxy]]:
    proxies = []

    def make(link: LinkProfile, target: Target | None = None, **options: object) -> LinkProxy:
        target = target or make_target()
        proxies.append(LinkProxy(("127.0.0.1", 0), target.address, link, **options))  # type: ignore[arg-type]
        proxies[-1].start()
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.stop()


def connect(proxy: LinkProxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def receive(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := client.recv(1 << 16)):
        data += part
    return data


def noise(count: int) -> bytes:
    return np.random.default_rng(0).bytes(count)


def echoed_s(client: socket.socket, data: bytes) -> float:
    """Seconds until data is back."""
    started = time.monotonic()
    client.sendall(data)
    assert receive(client, len(data)) == data
    return time.monotonic() - started


@pytest.mark.parametrize(
    "link",
    [
        IDEAL,
        LinkProfile("jittery", 20, jitter_ms=10),
        LinkProfile("lossy", 2, 100, 100, loss=0.001),
        LinkProfile("slow", 5, 50, 80, jitter_ms=2),
    ],
    ids=lambda link: link.name,
)
def test_bytes_arrive_as_they_were_sent_both_ways(make_proxy, make_target, link):
    sent, answer = noise(300_000), noise(200_000)[::-1]
    target = make_target(answer)
    proxy = make_proxy(link, target)
    with connect(proxy) as client:
        sender = threading.Thread(target=client.sendall, args=(sent,))
        sender.start()
        assert receive(client, len(answer)) == answer
        sender.join()
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""  # the end passes too, behind the last byte
    assert target.received == sent
    assert (proxy.bytes_up, proxy.bytes_down) == (len(sent), len(answer))


def test_the_end_of_one_direction_leaves_the_other_open():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        LinkProxy(("127.0.0.1", 0), listener.getsockname(), IDEAL, check=False) as proxy,
        connect(proxy) as client,
    ):
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        server, _ = listener.accept()
        with server:
            assert receive(server, 100) == b"question"
            server.sendall(b"answer")
        assert receive(client, 100) == b"answer"


def test_a_round_trip_takes_at_least_the_links(make_proxy):
    with connect(make_proxy(LinkProfile("x", 80))) as client:
        assert echoed_s(client, b"a") >= 2 * 0.08 - EARLY_S  # with the handshake's
        for _ in range(3):
            assert echoed_s(client, b"a") >= 0.08 - EARLY_S


def test_each_direction_has_its_own_rate(make_proxy):
    with connect(make_proxy(LinkProfile("x", up_mbit_s=2))) as client:
        assert echoed_s(client, noise(100_000)) >= 0.4 - EARLY_S
    with connect(make_proxy(LinkProfile("x", down_mbit_s=4))) as client:
        assert echoed_s(client, noise(100_000)) >= 0.2 - EARLY_S


def test_connections_share_the_rate(make_proxy):
    proxy = make_proxy(LinkProfile("x", up_mbit_s=2))
    data = noise(50_000)
    with connect(proxy) as first, connect(proxy) as second:
        started = time.monotonic()
        first.sendall(data)
        second.sendall(data)
        for client in (first, second):
            assert receive(client, len(data)) == data
        assert time.monotonic() - started >= 0.4 - EARLY_S


def test_loss_costs_a_retransmission_timeout(make_proxy):
    link = LinkProfile("x", 10, loss=0.5)
    with connect(make_proxy(link)) as client:
        times = [echoed_s(client, b"a") for _ in range(6)]
    # Of 12 packets of seed 0 some are lost; each of those costs a timeout.
    assert sum(times) >= 6 * 0.01 + retransmission_ms(10) / 1e3 - EARLY_S


def test_jitter_keeps_the_order(make_proxy, make_target):
    target = make_target(b"")
    sent = b""
    with connect(make_proxy(LinkProfile("x", 40, jitter_ms=20), target)) as client:
        for number in range(100):
            part = number.to_bytes(2, "big")
            client.sendall(part)
            sent += part
            time.sleep(0.001)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert target.received == sent
    assert len(target.arrivals) > 1  # not one lump, whose order would show nothing


def test_nothing_passes_in_a_stall(make_proxy):
    with connect(make_proxy(LinkProfile("x", stall=Stall(0.0, 0.4)))) as client:
        assert echoed_s(client, b"a") >= 0.4 - 0.1  # it began with the connection, a moment ago
        assert echoed_s(client, b"a") < 20


def test_a_trace_changes_the_link_while_it_runs(make_proxy):
    trace = Trace((0.0, 0.3), (0.0, 300.0), (1000.0, 0.5), (1000.0, 1000.0))
    with connect(make_proxy(IDEAL, trace=trace)) as client:
        started = time.monotonic()
        echoed_s(client, b"a")
        time.sleep(max(0.0, 0.35 - (time.monotonic() - started)))
        assert echoed_s(client, b"a") >= 0.3 - EARLY_S
        assert echoed_s(client, noise(20_000)) >= 0.3 + 0.32 - EARLY_S


def test_a_connection_is_dropped_after_so_many_bytes(make_proxy):
    proxy = make_proxy(IDEAL, drop=DropAfter(bytes_=50_000))
    for _ in range(2):  # each connection, not the first alone
        with connect(proxy) as client, pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(noise(1000))
                client.recv(1 << 16)
            client.recv(1)


def test_a_connection_is_dropped_after_a_time(make_proxy, caplog):
    caplog.set_level("INFO", "isthmus")
    proxy = make_proxy(IDEAL, drop=DropAfter(seconds=0.3))
    started = time.monotonic()
    with connect(proxy) as client:
        with pytest.raises(ConnectionResetError):
            while client.recv(1):
                pass
        assert time.monotonic() - started >= 0.3 - EARLY_S
    assert "connection ended: dropped after 0.3 s" in caplog.text


def test_memory_is_bounded_where_the_target_does_not_read():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        LinkProxy(("127.0.0.1", 0), listener.getsockname(), IDEAL, check=False) as proxy,
        connect(proxy) as client,
    ):
        client.settimeout(1.0)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 1 << 30:
                sent += client.send(bytes(1 << 16))
        # What is on its way in the proxy, and the kernel's buffers of four sockets.
        assert sent < 64 << 20


def test_a_target_that_is_down_is_an_error_at_the_start():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with pytest.raises(LinkError, match=r"cannot reach the target 127.0.0.1:\d+: .*start it first"):
        LinkProxy(("127.0.0.1", 0), address, IDEAL).start()


def test_a_target_that_goes_down_closes_the_client_and_the_proxy_goes_on(caplog):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with LinkProxy(("127.0.0.1", 0), address, IDEAL, check=False) as proxy:
        for _ in range(2):
            with pytest.raises(ConnectionResetError), connect(proxy) as client:  # perhaps while it connects
                client.recv(1)
        assert "cannot reach the target" in caplog.text
        with socket.create_server(address) as target, connect(proxy) as client:
            client.sendall(b"it is back")
            server, _ = target.accept()
            with server:
                assert receive(server, 10) == b"it is back"


def test_a_port_in_use_is_an_error(make_target):
    target = make_target()
    with pytest.raises(LinkError, match="cannot listen on 127"):
        LinkProxy(target.address, target.address, IDEAL).start()


def test_it_starts_once_and_stops_as_often_as_asked(make_proxy):
    proxy = make_proxy(IDEAL)
    with pytest.raises(LinkError, match="was started already"):
        proxy.start()
    with connect(proxy) as client:
        assert echoed_s(client, b"a") < 20
        proxy.stop()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    proxy.stop()
    assert proxy.wait(0)


def test_it_has_no_address_before_it_starts():
    with pytest.raises(LinkError, match="no address before start"):
        _ = LinkProxy(("127.0.0.1", 0), ("127.0.0.1", 1), IDEAL).address


@pytest.mark.parametrize(
    ("text", "drop"),
    [("20s", DropAfter(seconds=20)), ("500kB", DropAfter(bytes_=500_000)), ("100ms", DropAfter(seconds=0.1))],
)
def test_a_drop_is_a_time_or_a_size(text, drop):
    assert DropAfter.parse(text) == drop


@pytest.mark.parametrize(
    ("text", "message"), [("20", "a time .* or a size"), ("-2s", "a time"), ("0s", "no connection"), ("0B", "no conn")]
)
def test_a_drop_that_is_neither_is_refused(text, message):
    with pytest.raises(LinkError, match=message):
        DropAfter.parse(text)
