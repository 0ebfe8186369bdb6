"""What the front lets through: real streams, byte by byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from isthmus.errors import LinkError, ProtocolError, SecurityError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.admission import Admission
from isthmus.runtime.server.audit import AuditLog
from isthmus.runtime.server.frame_rate import FrameRate
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.authority import Authority
from isthmus.runtime.wire.framing import hello_message, open_message, step_message
from isthmus.runtime.wire.security import DEVICE_HEADER, ChannelSecurity, ServerSecurity
from isthmus.runtime.wire.stream import ClientStream
from isthmus.runtime.wire.tokens import issue_token

INSECURE = ChannelSecurity(insecure=True)


@pytest.fixture
def hello(folder):
    bundle = open_bundle(folder, "device")
    return hello_message(bundle.manifest_sha256, bundle.manifest.split, "raw32")


@pytest.fixture
def make_stream(hello):
    streams = []

    def make(address: str, *, security: ChannelSecurity = INSECURE, greeting: bytes = hello) -> ClientStream:
        streams.append(ClientStream(address, security))
        streams[-1].send(greeting)
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


def message(**body) -> bytes:
    return pb.ClientMessage(**body).SerializeToString()


def opening(tokens: int = 8) -> bytes:
    return open_message(tokens, Sampling(), ())


def step(number: int, position: int) -> bytes:
    return step_message(number, position, 1, True, bytes(4 * 64))


def bodies(stream: ClientStream, count: int) -> list[str]:
    return [stream.receive(10).WhichOneof("body") for _ in range(count)]


def fault(stream: ClientStream) -> str:
    while (answer := stream.receive(10)).WhichOneof("body") != "fault":
        pass
    return pb.Fault.Code.Name(answer.fault.code)


def session_of(stream: ClientStream) -> bytes:
    while (answer := stream.receive(10)).WhichOneof("body") != "opened":
        pass
    return answer.opened.session


def test_everything_may_be_sent_at_once(make_fleet, make_stream):
    stream = make_stream(make_fleet().address)
    for each in (opening(), step(1, 0), step(2, 1), message(close=pb.Close()), opening(), step(1, 0)):
        stream.send(each)
    assert bodies(stream, 7) == ["welcome", "opened", "result", "result", "closed", "opened", "result"]


def test_a_client_may_wait_for_its_welcome(make_fleet, make_stream):
    fleet = make_fleet()
    stream = make_stream(fleet.address)
    welcome = stream.receive(10).welcome
    assert welcome.limits.max_session_tokens == fleet.fleet.current.manifest.max_length
    stream.send(opening())
    assert bodies(stream, 1) == ["opened"]


def test_a_step_without_a_session_is_answered(make_fleet, make_stream):
    stream = make_stream(make_fleet().address)
    stream.send(step(1, 0))
    stream.send(opening())
    assert bodies(stream, 3) == ["welcome", "fault", "opened"]


@pytest.mark.parametrize("second", [opening(), message(attach=pb.Attach(session=bytes(16)))], ids=["open", "attach"])
def test_a_stream_carries_one_session(make_fleet, make_stream, second):
    stream = make_stream(make_fleet().address)
    stream.send(opening())
    session_of(stream)
    stream.send(second)
    assert fault(stream) == "BAD_REQUEST"


def test_no_attach_is_smuggled_past_the_front(make_fleet, make_stream):
    """A message of two fields, the last of which counts: to the workers all sessions are the front's."""
    fleet = make_fleet()
    victim = make_stream(fleet.address)
    victim.send(opening())
    attach = message(attach=pb.Attach(session=session_of(victim)))
    for first in (step(1, 0), opening(), message(close=pb.Close())):
        for prelude in ((), (opening(),)):
            thief = make_stream(fleet.address)
            for each in prelude:
                thief.send(each)
            thief.send(first + attach)
            assert fault(thief) == "BAD_REQUEST"
    victim.send(step(1, 0))
    assert bodies(victim, 1) == ["result"]


@pytest.mark.parametrize("greeting", [opening(), b"", b"\xff" * 40], ids=["no-hello", "empty", "garbage"])
def test_a_stream_begins_with_hello(make_fleet, make_stream, greeting):
    assert fault(make_stream(make_fleet().address, greeting=greeting)) == "BAD_REQUEST"


def test_another_export_is_refused(make_fleet, make_stream):
    stream = make_stream(make_fleet().address, greeting=hello_message("0" * 64, 2, "raw32"))
    assert fault(stream) == "MANIFEST_MISMATCH"


@pytest.mark.parametrize("tokens", [0, 1 << 30])
def test_a_worker_says_what_is_out_of_range(make_fleet, make_stream, tokens):
    stream = make_stream(make_fleet().address)
    stream.send(opening(tokens))
    assert fault(stream) == "BAD_REQUEST"


def test_an_unknown_session_is_unknown(make_fleet, make_stream):
    stream = make_stream(make_fleet().address)
    stream.send(message(attach=pb.Attach(session=bytes(16))))
    assert fault(stream) == "SESSION_UNKNOWN"


def test_devices_are_told_apart_by_their_certificates(make_fleet, make_stream, tmp_path):
    Authority.create(tmp_path / "ca")
    ca = Authority(tmp_path / "ca")
    issued = ca.server(["127.0.0.1"])
    security = ServerSecurity(
        cert_file=Path(issued.cert_file), key_file=Path(issued.key_file), client_ca=ca.folder / "ca-cert.pem"
    )

    def device(name: str) -> ChannelSecurity:
        own = ca.device(name)
        return ChannelSecurity(
            ca_file=ca.folder / "ca-cert.pem", cert_file=Path(own.cert_file), key_file=Path(own.key_file)
        )

    fleet = make_fleet(security=security, max_sessions_per_device=1)
    one, two = device("one"), device("two")
    stream = make_stream(fleet.address, security=one)
    stream.send(opening())
    attach = message(attach=pb.Attach(session=session_of(stream)))
    thief = make_stream(fleet.address, security=two)
    thief.send(attach)
    assert fault(thief) == "SESSION_UNKNOWN"
    greedy = make_stream(fleet.address, security=one)
    greedy.send(opening())
    assert fault(greedy) == "SERVER_FULL"
    back = make_stream(fleet.address, security=one)
    back.send(attach)
    assert bodies(back, 2) == ["welcome", "attached"]
    assert fault(stream) == "CANCELLED"  # the stream that carried it is told


@pytest.mark.parametrize("own", [False, True], ids=["no-certificate", "another-authority"])
def test_none_but_the_front_enters_a_worker(make_fleet, make_stream, tmp_path, own):
    fleet = make_fleet(1)
    address = fleet.workers[0].server.address
    (tmp_path / "ca.pem").write_bytes(fleet.identity.authority)
    files = {}
    if own:
        Authority.create(tmp_path / "other")
        issued = Authority(tmp_path / "other").device("front")
        files = {"cert_file": Path(issued.cert_file), "key_file": Path(issued.key_file)}
    for security in (INSECURE, ChannelSecurity(ca_file=tmp_path / "ca.pem", **files)):
        with pytest.raises((LinkError, ProtocolError)):
            make_stream(address, security=security).receive(10)


def test_the_front_counts_a_device_s_frames(make_fleet, make_stream, tmp_path, monkeypatch):
    monkeypatch.setattr("isthmus.runtime.fleet.relay.FrameRate", lambda rate: FrameRate(rate, clock=lambda: 0.0))
    tokens = tmp_path / "tokens"
    names = [ChannelSecurity(insecure=True, token=issue_token(tokens, name)) for name in ("kitchen", "phone")]
    fleet = make_fleet(1, security=ServerSecurity(insecure=True, tokens=tokens), frames_per_s_per_device=16)
    for security, steps in zip(names, (18, 15), strict=True):
        stream = make_stream(fleet.address, security=security)
        for each in (opening(steps), *(step(number, number - 1) for number in range(1, steps + 1))):
            stream.send(each)
        assert bodies(stream, 2 + steps) == ["welcome", "opened", *["result"] * steps]
        assert fleet.call(lambda: fleet.front._service.frames.held) == 3  # with Open, the first one's
    assert fleet.workers[0].server.limits.frames_per_s_per_device == math.inf


@pytest.mark.parametrize("shared", [False, True])
def test_workers_tell_devices_prompts_apart(make_fleet, make_stream, tmp_path, shared):
    tokens = tmp_path / "tokens"
    devices = [ChannelSecurity(insecure=True, token=issue_token(tokens, name)) for name in ("kitchen", "phone")]
    fleet = make_fleet(1, security=ServerSecurity(insecure=True, tokens=tokens), prefixes_shared=shared)
    prompt = step_message(1, 0, 40, True, np.ones((40, 64), np.float32).tobytes())
    reused = []
    for device in (devices[0], devices[1], devices[0]):
        stream = make_stream(fleet.address, security=device)
        stream.send(opening(64))
        stream.send(prompt)
        assert bodies(stream, 3) == ["welcome", "opened", "result"]
        reused.append(fleet.workers[0].server.prefixes.reused)
    assert reused == ([0, 32, 64] if shared else [0, 0, 32])
    assert fleet.workers[0].worker.report().prefixes[1:] == (3 * 39, reused[-1])


def test_a_device_names_nobody_but_itself(tmp_path):
    token = issue_token(tmp_path / "tokens", "phone")
    claim = [(DEVICE_HEADER, b"kitchen"), *ChannelSecurity(token=token).metadata]
    assert Admission(ServerSecurity(insecure=True, tokens=tmp_path / "tokens")).identity({}, claim) == "phone"
    assert Admission(ServerSecurity(insecure=True)).identity({}, claim) == ""
    with pytest.raises(SecurityError, match="client_ca"):
        ServerSecurity(behind_front=True)


def test_a_device_whose_token_is_taken_back_is_sent_away_and_the_audit_log_tells(make_fleet, make_stream, tmp_path):
    tokens, path = tmp_path / "tokens", tmp_path / "audit.jsonl"
    kitchen, phone = (ChannelSecurity(insecure=True, token=issue_token(tokens, name)) for name in ("kitchen", "phone"))
    with AuditLog(path) as audit:
        fleet = make_fleet(1, security=ServerSecurity(insecure=True, tokens=tokens), audit=audit)
        streams = [make_stream(fleet.address, security=security) for security in (kitchen, phone)]
        for stream in streams:
            stream.send(opening())
            session_of(stream)
        kept = [line for line in tokens.read_text().splitlines(keepends=True) if not line.startswith("kitchen")]
        tokens.write_text("".join(kept))
        with pytest.raises(LinkError, match="UNAUTHENTICATED"):
            while True:
                streams[0].receive(20)
        streams[1].send(step(1, 0))
        streams[1].send(message(close=pb.Close()))
        assert bodies(streams[1], 2) == ["result", "closed"]
        with pytest.raises(SecurityError):
            make_stream(fleet.address, security=kitchen).receive(20)
        streams[1].close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    of = {name: [line["event"] for line in lines if line.get("device") == name] for name in ("kitchen", "phone")}
    assert of["kitchen"] == ["connected", "opened", "expelled", "disconnected"]
    assert of["phone"][:3] == ["connected", "opened", "closed"]
    assert [line["event"] for line in lines if "device" not in line] == ["turned away"]
