"""The server against clients that break the rules, on real sockets with TLS."""

from __future__ import annotations

import re
import threading
import weakref

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message

from isthmus.errors import LinkError, RequestError
from isthmus.runtime.bundle import KVSpec
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import (
    PROTOCOL_MINOR,
    hello_message,
    kv_crc,
    open_message,
    seal,
    step_crc,
    step_message,
)
from isthmus.runtime.wire.security import ChannelSecurity
from isthmus.runtime.wire.stream import ClientStream
from isthmus.runtime.wire.transport import MAX_MESSAGE_BYTES

MANIFEST = "a" * 64
PROMPT = [3, 1, 4, 1, 5]


class RawClient:
    """Says exactly what it is told to."""

    def __init__(self, address: str) -> None:
        self.stream = ClientStream(address, ChannelSecurity())

    def send(self, message: bytes | Message) -> None:
        self.stream.send(message if isinstance(message, bytes) else message.SerializeToString())

    def receive(self) -> pb.ServerMessage:
        return self.stream.receive(10.0)

    def fault(self) -> pb.Fault:
        message = self.receive()
        assert message.HasField("fault"), message
        return message.fault

    def code(self) -> str:
        return pb.Fault.Code.Name(self.fault().code)

    def result(self) -> pb.Result:
        message = self.receive()
        assert message.HasField("result"), message
        return message.result

    def ended(self) -> bool:
        with pytest.raises(LinkError, match=r"ended|broke"):
            self.stream.receive(10.0)
        return True

    def greet(self, manifest: str = MANIFEST, split: int = 2, codec: str = "raw32") -> None:
        self.send(hello_message(manifest, split, codec))
        assert self.receive().HasField("welcome")

    def open(self, max_tokens: int = 64) -> bytes:
        self.greet()
        self.send(open_message(max_tokens, Sampling(), ()))
        return self.receive().opened.session

    def attach(self, session: bytes, acknowledged: int) -> None:
        self.greet()
        self.send(pb.ClientMessage(attach=pb.Attach(session=session, last_acknowledged_step=acknowledged)))


@pytest.fixture
def make_client(server):
    clients = []

    def make(address: str = server.address) -> RawClient:
        clients.append(RawClient(address))
        return clients[-1]

    yield make
    for client in clients:
        client.stream.close()


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def frame(hidden):
    """Step number, token ids and position to a well-formed Step, and what must come of it."""

    def make(step: int, ids: list[int], position: int, *, sample: bool = True) -> bytes:
        return step_message(step, position, len(ids), sample, hidden(ids, position).tobytes())

    return make


def step_with_frame(step: int, position: int, tokens: int, payload: bytes, crc: int | None = None) -> bytes:
    if crc is None:
        crc = step_crc(step, position, tokens, True, payload)
    content = pb.Frame(tokens=tokens, payload=payload, crc32c=crc)
    return pb.ClientMessage(step=pb.Step(step=step, position=position, sample=True, frame=content)).SerializeToString()


# Handshake.


def test_welcome_states_the_limits(make_server, make_client):
    client = make_client(make_server(lease_s=2.5, max_frame_tokens=9, max_session_tokens=4096).address)
    client.send(hello_message(MANIFEST, 2, "raw16"))
    limits = client.receive().welcome.limits
    assert (limits.lease_ms, limits.max_frame_tokens, limits.max_session_tokens) == (2500, 9, 1024)


FITTING = {"protocol_major": 1, "manifest_sha256": MANIFEST, "split": 2, "codec": "raw32"}


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"protocol_major": 2}, "VERSION_MISMATCH", ["2.0", f"1.{PROTOCOL_MINOR}"]),
        ({"manifest_sha256": "c" * 64}, "MANIFEST_MISMATCH", ["c" * 64, MANIFEST]),
        ({"split": 3}, "MANIFEST_MISMATCH", ["layer 3", "at 2"]),
        ({"codec": "zip"}, "UNSUPPORTED_CODEC", ["zip", "raw32, raw16"]),
        ({"codec": "tabq"}, "UNSUPPORTED_CODEC", ["tabq"]),
    ],
    ids=["wrong version", "wrong manifest", "wrong split", "unknown codec", "codec not of the bundle"],
)
def test_a_hello_that_does_not_fit_is_refused_with_both_values(client, server, change, code, named, bystander):
    client.send(pb.ClientMessage(hello=pb.Hello(**FITTING | change)))
    client.send(open_message(8, Sampling(), ()))
    fault = client.fault()
    assert pb.Fault.Code.Name(fault.code) == code
    assert all(value in fault.message for value in named)
    assert client.ended()
    assert server.sessions == 1


@pytest.mark.parametrize(
    "first",
    [
        b"\xff\xff garbage",
        b"",
        pb.ClientMessage(step=pb.Step(step=1)).SerializeToString(),
        open_message(8, Sampling(), ()),
        pb.ClientMessage(cancel=pb.Cancel()).SerializeToString(),
    ],
    ids=["garbage", "empty", "step", "open", "cancel"],
)
def test_a_stream_that_does_not_begin_with_hello_is_ended(client, first, bystander):
    client.send(first)
    assert client.code() == "BAD_REQUEST"
    assert client.ended()


@pytest.mark.parametrize("greeted", [False, True])
def test_a_stream_without_a_session_is_ended_in_time(make_server, make_client, greeted):
    client = make_client(make_server(idle_s=0.2).address)
    if greeted:
        client.greet()
    assert "within 0.2 s" in client.fault().message
    assert client.ended()


# Sessions and admission.


@pytest.mark.parametrize(
    "request_",
    [
        pb.Open(max_tokens=0),
        pb.Open(max_tokens=1025),
        pb.Open(max_tokens=8, sampling=pb.Sampling(temperature=float("nan"), top_p=1, repetition_penalty=1)),
        pb.Open(max_tokens=8, sampling=pb.Sampling(temperature=-1, top_p=1, repetition_penalty=1)),
        pb.Open(max_tokens=8, sampling=pb.Sampling(top_p=1, repetition_penalty=1), context_ids=[256]),
        pb.Open(max_tokens=1, sampling=pb.Sampling(top_p=1, repetition_penalty=1), context_ids=[1, 2]),
    ],
    ids=["no tokens", "too many tokens", "nan", "negative", "id beyond vocabulary", "too many ids"],
)
def test_an_open_out_of_range_is_refused(client, server, engine, request_, bystander):
    client.greet()
    sessions = server.sessions
    client.send(pb.ClientMessage(open=request_))
    assert client.code() == "BAD_REQUEST"
    assert client.ended()
    assert server.sessions == sessions


def test_kv_is_reserved_at_open_and_given_back_at_close(make_server, make_client):
    server = make_server(kv_bytes=64 * 100)
    first, second = make_client(server.address), make_client(server.address)
    first.open(60)
    second.greet()
    second.send(open_message(60, Sampling(), ()))
    fault = second.fault()
    assert fault.code == pb.Fault.SERVER_FULL
    assert fault.retry_after_ms == 1000
    first.send(pb.ClientMessage(close=pb.Close()))
    assert first.receive().HasField("closed")
    make_client(server.address).open(60)


def test_a_session_that_can_never_fit_is_not_told_to_wait(make_server, make_client):
    client = make_client(make_server(kv_bytes=64 * 10).address)
    client.greet()
    client.send(open_message(11, Sampling(), ()))
    fault = client.fault()
    assert (fault.code, fault.retry_after_ms) == (pb.Fault.BAD_REQUEST, 0)


def test_a_session_that_cannot_be_made_leaves_its_place_free(make_server, make_client, engine, monkeypatch):
    server = make_server(max_sessions=1)

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine, "new_session", out_of_memory)
        client = make_client(server.address)
        client.greet()
        client.send(open_message(8, Sampling(), ()))
        assert client.code() == "INTERNAL"
    make_client(server.address).open(8)


def test_a_stream_carries_one_session_after_the_other(client, frame, expected):
    first = client.open()
    client.send(pb.ClientMessage(close=pb.Close()))
    assert client.receive().HasField("closed")
    client.send(open_message(64, Sampling(), ()))
    second = client.receive().opened.session
    assert len(first) == len(second) == 16
    assert first != second
    client.send(frame(1, PROMPT, 0))
    assert client.result().token == expected(PROMPT, 1)[0]
    client.send(open_message(64, Sampling(), ()))
    assert client.code() == "BAD_REQUEST"


def test_any_number_of_damaged_messages_is_answered(client, frame, expected):
    client.open()
    damaged = bytearray(seal(frame(1, PROMPT, 0)))
    damaged[len(damaged) // 2] ^= 1
    for _ in range(1500):  # more than Python's calls may nest
        client.stream._outgoing.put(bytes(damaged))
        fault = client.fault()
        assert (fault.code, fault.expected_step) == (pb.Fault.BAD_CRC, 1)
    client.send(frame(1, PROMPT, 0))
    assert client.result().token == expected(PROMPT, 1)[0]


@pytest.mark.parametrize("body", ["step", "close", "cancel", "hello", "attach"])
def test_messages_without_a_session_do_no_harm(client, body, bystander):
    client.greet()
    client.send(pb.ClientMessage(**{body: getattr(pb, body.capitalize())()}))
    answer = client.receive()
    if body in ("close", "cancel"):
        assert answer.HasField("closed")
    else:
        expected = pb.Fault.SESSION_UNKNOWN if body == "attach" else pb.Fault.BAD_REQUEST
        assert answer.fault.code == expected


# Steps.


def bad_frames() -> dict[str, tuple[bytes, str]]:
    row = np.zeros(16, np.float32)
    poisoned = {name: np.array([*row[:15], value], np.float32) for name, value in [("nan", np.nan), ("inf", np.inf)]}
    return {
        "bad CRC": (step_with_frame(1, 0, 1, row.tobytes(), crc=1), "BAD_CRC"),
        "no tokens": (step_with_frame(1, 0, 0, b""), "BAD_FRAME"),
        "no frame": (pb.ClientMessage(step=pb.Step(step=1)).SerializeToString(), "BAD_CRC"),
        "impossible token count": (step_with_frame(1, 0, 2**32 - 1, row.tobytes()), "BAD_FRAME"),
        "more tokens than payload": (step_with_frame(1, 0, 2, row.tobytes()), "BAD_FRAME"),
        "truncated payload": (step_with_frame(1, 0, 1, row.tobytes()[:-1]), "BAD_FRAME"),
        "NaN": (step_with_frame(1, 0, 1, poisoned["nan"].tobytes()), "NON_FINITE"),
        "infinity": (step_with_frame(1, 0, 1, poisoned["inf"].tobytes()), "NON_FINITE"),
        "step zero": (step_with_frame(0, 0, 1, row.tobytes()), "OUT_OF_ORDER"),
        "step out of order": (step_with_frame(2, 0, 1, row.tobytes()), "OUT_OF_ORDER"),
        "position gap": (step_with_frame(1, 1, 1, row.tobytes()), "BAD_REQUEST"),
        "beyond the session": (step_with_frame(1, 0, 65, np.zeros((65, 16), np.float32).tobytes()), "SESSION_FULL"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_frames())
def test_a_refused_step_leaves_its_session_and_the_others_as_they_were(
    client, frame, expected, name, bystander, engine
):
    message, code = bad_frames()[name]
    client.open()
    client.send(message)
    fault = client.fault()
    assert pb.Fault.Code.Name(fault.code) == code
    if code in ("BAD_CRC", "OUT_OF_ORDER"):
        assert fault.expected_step == 1
    client.send(frame(1, PROMPT, 0))
    assert client.result().token == expected(PROMPT, 1)[0]


# Keys and values.


def kv_step(
    step: int = 1,
    position: int = 0,
    tokens: int = 2,
    *,
    sample: bool = False,
    crc: int | None = None,
    **changes: object,
) -> bytes:
    """A Step of keys and values of the fake back's 3 layers, 1 head of 8, the checksum right unless given."""
    fields = {"tokens": tokens, "first_layer": 2, "last_layer": 5, "payload": bytes(3 * 2 * tokens * 8 * 4)} | changes
    chunk = pb.KVChunk(**fields)
    chunk.crc32c = kv_crc(step, position, sample, chunk) if crc is None else crc
    return pb.ClientMessage(step=pb.Step(step=step, position=position, sample=sample, kv=chunk)).SerializeToString()


def float_rows(tokens: int, value: float) -> bytes:
    rows = np.zeros((3, 2, 1, tokens, 8), np.float32)
    rows[-1, -1, -1, -1, -1] = value
    return rows.tobytes()


def coded_rows(tokens: int, scale: float) -> bytes:
    scales = np.ones((3, 2, 1, tokens), np.float16)
    scales[-1, -1, -1, -1] = scale
    return bytes(scales.size * 8) + scales.tobytes()


BAD_CHUNKS = {
    "bad CRC": (kv_step(crc=1), "BAD_CRC", "damaged"),
    "no tokens": (kv_step(tokens=0), "BAD_FRAME", "0 tokens"),
    "impossible token count": (kv_step(tokens=513, payload=b""), "BAD_FRAME", "513"),
    "empty payload": (kv_step(payload=b""), "BAD_FRAME", "0 bytes"),
    "truncated payload": (kv_step(payload=float_rows(2, 0)[:-1]), "BAD_FRAME", "383 bytes"),
    "more tokens than payload": (kv_step(tokens=3, payload=float_rows(2, 0)), "BAD_FRAME", "take 576"),
    "fewer layers": (kv_step(last_layer=4), "BAD_FRAME", "[2, 4)"),
    "the front's layers": (kv_step(first_layer=0, last_layer=2), "BAD_FRAME", "[0, 2)"),
    "no layers": (kv_step(first_layer=5), "BAD_FRAME", "[5, 5)"),
    "layers that end before they begin": (kv_step(first_layer=5, last_layer=2), "BAD_FRAME", "[5, 2)"),
    "unknown coding": (kv_step(coding=7), "BAD_FRAME", "coding 7"),
    "negative coding": (kv_step(coding=-1), "BAD_FRAME", "coding -1"),
    "floats said to be codes": (kv_step(coding=pb.KVChunk.ROWS8), "BAD_FRAME", "take 120"),
    "NaN": (kv_step(payload=float_rows(2, np.nan)), "NON_FINITE", "NaN"),
    "infinity": (kv_step(payload=float_rows(2, np.inf)), "NON_FINITE", "infinity"),
    "NaN scale": (kv_step(coding=pb.KVChunk.ROWS8, payload=coded_rows(2, np.nan)), "NON_FINITE", "scale"),
    "infinite scale": (kv_step(coding=pb.KVChunk.ROWS8, payload=coded_rows(2, np.inf)), "NON_FINITE", "scale"),
    "negative scale": (kv_step(coding=pb.KVChunk.ROWS8, payload=coded_rows(2, -1)), "NON_FINITE", "scale"),
    "a token asked for": (kv_step(sample=True), "BAD_REQUEST", "give no token"),
    "position gap": (kv_step(position=1), "BAD_REQUEST", "gap"),
    "beyond the session": (kv_step(tokens=65), "SESSION_FULL", "64"),
    "step out of order": (kv_step(step=2), "OUT_OF_ORDER", "step 2"),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_refused_keys_and_values_leave_their_session_and_the_others_as_they_were(
    client, frame, expected, name, bystander
):
    message, code, says = BAD_CHUNKS[name]
    client.open()
    client.send(message)
    fault = client.fault()
    assert pb.Fault.Code.Name(fault.code) == code
    assert says in fault.message
    client.send(frame(1, PROMPT, 0))
    assert client.result().token == expected(PROMPT, 1)[0]


def test_codes_of_a_float_cache_are_refused_where_the_cache_is_quantized(client, frame, engine, bystander):
    engine.manifest.kv["server"] = KVSpec(8, 1, 8)
    client.open()
    client.send(kv_step(coding=pb.KVChunk.ROWS8, payload=coded_rows(2, 1)))
    fault = client.fault()
    assert fault.code == pb.Fault.BAD_FRAME
    assert "8 bits" in fault.message
    client.send(kv_step(payload=bytes(3 * 2 * 2 * 8)))
    assert client.result().length == 2


def test_keys_and_values_lengthen_a_session_and_roll_it_back_as_frames_do(client, frame, engine):
    client.open()
    client.send(kv_step(1, 0, 2))
    assert client.result().length == 2
    client.send(kv_step(1, 0, 2))  # repeated: answered, not done
    assert client.result().length == 2
    client.send(kv_step(2, 2, 3))
    assert client.result().length == 5
    client.send(kv_step(3, 1, 2))
    assert client.result().length == 3
    client.send(frame(4, [1], 3))
    result = client.result()
    assert (result.length, result.HasField("token")) == (4, True)
    assert engine.advanced == 4


def test_flipped_bits_in_keys_and_values_are_found(client, bystander):
    message = bytearray(kv_step())
    client.open()
    for at in range(8, len(message), 37):
        damaged = bytearray(message)
        damaged[at] ^= 4
        try:
            step = pb.ClientMessage.FromString(bytes(damaged)).step
        except DecodeError:
            continue
        if step.HasField("kv"):
            client.send(bytes(damaged))
            assert client.code() in ("BAD_CRC", "OUT_OF_ORDER")


def test_a_message_above_the_limit_ends_the_stream_and_not_the_session(client, make_client, frame, expected, bystander):
    session = client.open()
    client.send(step_with_frame(1, 0, 1, bytes(4_000_001)))
    assert client.code() == "FRAME_TOO_LARGE"
    assert client.ended()
    again = make_client()
    again.attach(session, 0)
    assert again.receive().attached.last_step == 0
    again.send(frame(1, PROMPT, 0))
    assert again.result().token == expected(PROMPT, 1)[0]


def test_a_message_that_grpc_refuses_does_not_hurt_the_others(server, engine, bystander):
    # gRPC's client would not send it, so the client here has no limit.
    credentials = grpc.ssl_channel_credentials(ChannelSecurity()._roots("127.0.0.1"))
    with grpc.secure_channel(server.address, credentials, [("grpc.max_send_message_length", -1)]) as channel:
        call = channel.stream_stream("/isthmus.v1.Isthmus/Session", None, None)
        messages = [hello_message(MANIFEST, 2, "raw32"), bytes(MAX_MESSAGE_BYTES + 1)]
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter(messages)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("cut", [1, 7, 40, -1])
def test_a_truncated_message_ends_the_stream_and_not_the_session(client, make_client, frame, cut, bystander):
    session = client.open()
    client.send(frame(1, PROMPT, 0)[:cut])
    assert client.code() == "BAD_REQUEST"
    assert client.ended()
    again = make_client()
    again.attach(session, 0)
    assert again.receive().attached.last_step == 0


def test_a_repeated_step_gets_its_result_again_and_is_not_computed_again(client, frame, engine, expected):
    client.open()
    client.send(frame(1, PROMPT, 0))
    first = client.result()
    client.send(frame(1, PROMPT, 0))
    assert client.result() == first
    tokens = expected(PROMPT, 2)
    client.send(frame(2, tokens[:1], len(PROMPT)))
    second = client.result()
    assert (first.token, second.token) == tuple(tokens)
    client.send(frame(1, PROMPT, 0))  # older: its result is kept, too
    assert client.result() == first
    assert engine.advanced == 2


def test_a_gap_in_the_steps_names_the_step_to_go_on_with(client, frame, expected, bystander):
    client.open()
    client.send(frame(1, PROMPT, 0))
    token = client.result().token
    client.send(frame(4, [token], len(PROMPT)))
    fault = client.fault()
    assert (fault.code, fault.expected_step) == (pb.Fault.OUT_OF_ORDER, 2)
    client.send(frame(2, [token], len(PROMPT)))
    assert client.result().token == expected(PROMPT, 2)[1]


def test_a_smaller_position_rolls_back(client, frame, expected):
    client.open()
    client.send(frame(1, [*PROMPT, 77, 78], 0))
    assert client.result().length == len(PROMPT) + 2
    client.send(frame(2, PROMPT[3:], 3))
    result = client.result()
    assert (result.token, result.length) == (expected(PROMPT, 1)[0], len(PROMPT))


def test_a_step_without_sample_has_no_token(client, frame):
    client.open()
    client.send(frame(1, PROMPT, 0, sample=False))
    result = client.result()
    assert not result.HasField("token")
    assert result.length == len(PROMPT)


def test_every_step_is_answered_in_order(client, frame):
    client.open()
    bad = step_with_frame(1, 0, 1, bytes(64), crc=1)
    for message in (bad, frame(1, [1], 0), frame(3, [1], 1), frame(2, [1], 1), bad, frame(3, [1], 2)):
        client.send(message)
    answers = [client.receive() for _ in range(6)]
    kinds = [a.result.step or pb.Fault.Code.Name(a.fault.code) for a in answers]
    assert kinds == ["BAD_CRC", 1, "OUT_OF_ORDER", 2, "BAD_CRC", 3]


def test_a_failure_of_the_engine_ends_that_session_alone_and_tells_nothing(
    client, make_client, frame, engine, server, bystander, caplog
):
    session = client.open()
    engine.fail_at = 0
    client.send(frame(1, PROMPT, 0))
    fault = client.fault()
    engine.fail_at = -1
    assert fault.code == pb.Fault.INTERNAL
    assert "details" not in fault.message
    assert "details" in caplog.text
    assert server.sessions == 1
    other = make_client()
    other.attach(session, 0)
    assert other.code() == "SESSION_UNKNOWN"


# Leases.


def test_an_attached_stream_gets_the_result_that_was_not_acknowledged(client, make_client, frame, expected):
    session = client.open()
    client.send(frame(1, PROMPT, 0))
    result = client.result()
    client.stream.close()
    second = make_client()
    second.attach(session, 0)
    assert second.receive().attached.last_step == 1
    assert second.result() == result
    second.stream.close()
    third = make_client()
    third.attach(session, 1)
    assert third.receive().attached.last_step == 1
    third.send(frame(2, [result.token], len(PROMPT)))
    assert third.result().token == expected(PROMPT, 2)[1]


def test_a_newer_stream_takes_the_session_from_the_older(client, make_client, frame, expected, bystander):
    session = client.open()
    newer = make_client()
    newer.attach(session, 0)
    assert newer.receive().HasField("attached")
    assert client.code() == "CANCELLED"
    assert client.ended()
    newer.send(frame(1, PROMPT, 0))
    assert newer.result().token == expected(PROMPT, 1)[0]


def test_a_step_that_still_runs_for_the_older_stream_counts(client, make_client, frame, engine, eventually):
    session = client.open()
    engine.gate.clear()
    client.send(frame(1, PROMPT, 0))
    client.send(frame(2, [1], len(PROMPT)))  # waits, and is dropped with its stream
    threading.Event().wait(0.2)
    newer = make_client()
    newer.attach(session, 0)
    assert client.code() == "CANCELLED"
    engine.gate.set()
    assert newer.receive().attached.last_step == 1
    assert newer.result().step == 1
    assert engine.advanced == 1


def test_a_session_is_freed_when_its_lease_ends(make_server, make_client, engine, eventually):
    server = make_server(lease_s=0.3)
    client = make_client(server.address)
    session = client.open()
    client.stream.close()
    assert eventually(lambda: engine.sessions == [] and server.sessions == 0)
    late = make_client(server.address)
    late.attach(session, 0)
    fault = late.fault()
    assert fault.code == pb.Fault.SESSION_UNKNOWN
    assert "lease of 0.3 s" in fault.message


def test_attaching_stops_the_lease(make_server, make_client, frame):
    server = make_server(lease_s=0.4)
    client = make_client(server.address)
    session = client.open()
    client.stream.close()
    again = make_client(server.address)
    again.attach(session, 0)
    assert again.receive().HasField("attached")
    threading.Event().wait(0.6)
    again.send(frame(1, PROMPT, 0))
    assert again.result().step == 1


def test_an_unknown_session_is_refused(client, bystander):
    client.attach(bytes(16), 0)
    assert client.code() == "SESSION_UNKNOWN"
    assert client.ended()


def test_cancel_drops_the_steps_that_wait(client, frame, engine):
    client.open()
    engine.gate.clear()
    client.send(frame(1, [1], 0))
    client.send(frame(2, [1], 1))
    client.send(frame(3, [1], 2))
    client.send(pb.ClientMessage(cancel=pb.Cancel()))
    threading.Event().wait(0.2)
    engine.gate.set()
    assert client.result().step == 1
    assert client.receive().HasField("closed")
    assert engine.advanced == 1
    assert engine.sessions == []


# The server itself.


def test_sessions_take_turns_during_a_long_prefill(make_client, frame, engine):
    long, short = make_client(), make_client()
    long.open()
    short.open()
    engine.gate.clear()
    for step in range(4):
        long.send(frame(step + 1, [1], step, sample=False))
    threading.Event().wait(0.2)
    short.send(frame(1, [1], 0))
    threading.Event().wait(0.2)
    engine.gate.set()
    assert short.result().queue_us > 100_000  # it waited for one step of the other session
    assert [long.result().step for _ in range(4)] == [1, 2, 3, 4]
    first, second = engine.sessions
    assert engine.order == [first, second, first, first, first]


def test_a_step_that_waits_for_its_turn_is_dropped_with_its_stream(make_client, frame, engine, eventually):
    first, second = make_client(), make_client()
    first.open()
    session = second.open()
    engine.gate.clear()
    first.send(frame(1, [1], 0))
    threading.Event().wait(0.2)
    second.send(frame(1, [1], 0))
    threading.Event().wait(0.2)
    second.stream.close()
    threading.Event().wait(0.2)
    engine.gate.set()
    assert first.result().step == 1
    again = make_client()
    again.attach(session, 0)
    assert again.receive().attached.last_step == 0
    assert engine.order == engine.sessions[:1]


def test_many_sessions_at_once_get_their_own_tokens(server, make_generation, expected):
    prompts = [[seed, seed + 1, 2 * seed] for seed in range(8)]
    generations = [make_generation(server.address, prompt, seed=i) for i, prompt in enumerate(prompts)]
    threads = [threading.Thread(target=generation.run, args=(15,)) for generation in generations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for i, generation in enumerate(generations):
        assert generation.tokens == expected(prompts[i], 15, seed=i)


def test_the_memory_of_a_closed_session_is_given_back_at_once(client, frame, engine, eventually):
    client.open()
    client.send(frame(1, PROMPT, 0))
    client.result()
    session = weakref.ref(engine.sessions[0])
    engine.order.clear()
    client.send(pb.ClientMessage(close=pb.Close()))
    assert client.receive().HasField("closed")
    assert eventually(lambda: session() is None)


def test_a_port_in_use_is_named(server, engine):
    with pytest.raises(LinkError, match=re.escape(server.address)):
        BackServer(engine, server.address).start()


def test_stop_frees_sessions_and_threads_and_may_be_repeated(engine, user_config, make_generation):
    before = {thread.name for thread in threading.enumerate()}
    server = BackServer(engine)
    with pytest.raises(LinkError, match="start"):
        _ = server.address
    generation = make_generation(server.start(), PROMPT, on_server_loss="fail")
    generation.run(1)
    assert server.sessions == 1
    with pytest.raises(LinkError, match="already"):
        server.start()
    server.stop(0.1)
    assert server.wait(0)
    assert engine.sessions == []
    server.stop()
    names = {thread.name for thread in threading.enumerate()} - before
    assert not [name for name in names if name.startswith(("isthmus-server", "isthmus-compute"))]


def test_a_server_can_be_started_again(engine, user_config, make_generation, expected):
    server = BackServer(engine)
    for _ in range(2):
        with server:
            generation = make_generation(server.address, PROMPT)
            assert generation.run(2) == expected(PROMPT, 2)
            generation.link.close()


def test_an_ipv6_address_is_served(engine, user_config, make_generation, expected):
    with BackServer(engine, "[::1]:0") as server:
        assert server.address.startswith("[::1]:")
        generation = make_generation(server.address, PROMPT)
        assert generation.run(2) == expected(PROMPT, 2)
        generation.link.close()


@pytest.mark.parametrize("limits", [{"max_sessions": 0}, {"lease_s": -1}, {"max_frame_bytes": MAX_MESSAGE_BYTES}])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(RequestError, match=next(iter(limits))):
        ServerLimits(**limits)
