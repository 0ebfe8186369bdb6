"""Connections that never came to a call: counted, told of, and not confused with those that did."""

from __future__ import annotations

import json
import socket
from urllib.request import urlopen

import grpc
import pytest

from isthmus.errors import LinkError
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server import server as server_module
from isthmus.runtime.server.handshakes import Handshakes
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.metrics import parse_metrics
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity

PATIENCE_S = 0.3


@pytest.fixture
def server(engine, user_config, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "_WATCH_S", 0.05)
    limits = ServerLimits(idle_s=PATIENCE_S)
    with BackServer(engine, limits=limits, metrics="127.0.0.1:0", audit=tmp_path / "audit") as server:
        yield server


def failed(server: BackServer) -> float:
    with urlopen(f"http://{server.metrics_address}/metrics") as answer:
        return parse_metrics(answer.read().decode())["connections_failed_total"]


def test_those_that_fail_are_counted_and_the_others_are_not(server, make_generation, make_link, eventually, tmp_path):
    running = make_generation(server.address, [1, 2, 3])
    running.run(1)
    with pytest.raises(LinkError):
        make_link(server.address, security=ChannelSecurity(insecure=True)).open(8, Sampling())
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port))) as plain:
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while plain.recv(100):
            pass
    with socket.create_connection((host, int(port))):
        assert eventually(lambda: failed(server) == 3)
    for _ in range(3):
        make_generation(server.address, [4, 5]).run(1)
    running.run(2)
    assert not eventually(lambda: failed(server) != 3, PATIENCE_S + 0.3)
    told = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert sum(line["connections"] for line in told if line["event"] == "turned away") == 3


def test_a_peer_that_calls_again_hides_no_failure():
    handshakes = Handshakes(0.0)
    handshakes.begin()
    handshakes._called("ipv4:10.0.0.1:1")
    handshakes.begin()  # fails
    handshakes._called("ipv4:10.0.0.1:1")
    assert handshakes.failed() == 1
    assert handshakes.failed() == 0


def test_the_failed_are_those_that_are_left():
    handshakes = Handshakes(3600.0)
    for number in range(4):
        handshakes.begin()
        if number != 1:
            handshakes._called(f"ipv4:10.0.0.1:{number}")
    handshakes._patience = 0.0
    assert handshakes.failed() == 1


def test_plaintext_connections_have_no_handshake(engine, user_config):
    from isthmus.runtime.wire.security import ServerSecurity

    with BackServer(engine, security=ServerSecurity(insecure=True), metrics="127.0.0.1:0") as server:
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/none/None")(b"", timeout=5)
        assert failed(server) == 0
