from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import ProtocolError
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import (
    Refusal,
    crc_matches,
    fault_error,
    message_field,
    open_message,
    parse_client_message,
    parse_server_message,
    read_sampling,
    step_message,
)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.binary(max_size=64),
)
def test_a_step_arrives_as_it_was_sent(step, position, tokens, sample, payload):
    read = parse_client_message(step_message(step, position, tokens, sample, payload)).step
    assert (read.step, read.position, read.frame.tokens, read.sample, read.frame.payload) == (
        step,
        position,
        tokens,
        sample,
        payload,
    )
    assert crc_matches(read)


@given(st.data())
def test_any_changed_field_of_a_step_breaks_its_crc(data):
    read = parse_client_message(step_message(7, 9, 2, True, b"payload")).step
    match data.draw(st.sampled_from(["step", "position", "sample", "tokens", "payload"])):
        case "step":
            read.step ^= 1 << data.draw(st.integers(0, 63))
        case "position":
            read.position ^= 1 << data.draw(st.integers(0, 31))
        case "sample":
            read.sample = False
        case "tokens":
            read.frame.tokens ^= 1 << data.draw(st.integers(0, 31))
        case "payload":
            payload = bytearray(read.frame.payload)
            payload[data.draw(st.integers(0, 6))] ^= 1 << data.draw(st.integers(0, 7))
            read.frame.payload = bytes(payload)
    assert not crc_matches(read)


@given(st.binary(max_size=200))
def test_garbage_is_parsed_or_refused_and_nothing_else(data):
    try:
        assert parse_client_message(data).WhichOneof("body") is not None
    except Refusal as refusal:
        assert refusal.fault.fault.code == pb.Fault.BAD_REQUEST
    try:
        assert parse_server_message(data).WhichOneof("body") is not None
    except ProtocolError as error:
        assert error.code == "BAD_REQUEST"


FIELDS = pb.ClientMessage.DESCRIPTOR.fields_by_name


@given(st.binary(max_size=300), st.integers(0, 2**63))
def test_a_message_tells_its_kind_without_being_parsed(payload, number):
    for data in (step_message(number, 3, 1, True, payload), open_message(5, Sampling(), list(payload))):
        kind = parse_client_message(data).WhichOneof("body")
        assert kind is not None
        assert message_field(data) == FIELDS[kind].number


@given(st.binary(max_size=60))
def test_what_tells_its_kind_is_of_that_kind_alone(data):
    """Otherwise one could be taken for the other by whoever parses it."""
    step = step_message(1, 0, 1, True, b"x")
    for candidate in (data, step + data, data + step, step[:-1] + data):
        field = message_field(candidate)
        if field in range(1, 7):
            try:
                body = parse_client_message(candidate).WhichOneof("body")
            except Refusal:
                continue
            assert body is not None
            assert FIELDS[body].number == field


def test_sampling_crosses_without_rounding():
    sampling = Sampling(0.7, 40, 1e-9, 0.1, 1.3, 2**64 - 1)
    opening = parse_client_message(open_message(5, sampling, [1, 2])).open
    assert read_sampling(opening.sampling) == sampling
    assert list(opening.context_ids) == [1, 2]


def test_sampling_out_of_range_is_refused_with_the_rule():
    with pytest.raises(Refusal, match=r"top_p=2\.0.*between"):
        read_sampling(pb.Sampling(top_p=2, repetition_penalty=1))


def test_a_fault_tells_a_bounded_story():
    fault = Refusal("INTERNAL", "x" * 10_000).fault
    assert fault.ByteSize() < 1000


def test_a_fault_of_a_newer_server_is_still_an_error():
    error = fault_error(pb.Fault(code=99, message="something new"))
    assert error.code == "FAULT_99"
    assert "something new" in str(error)


def test_the_time_to_come_again_is_told():
    fault = Refusal("SERVER_FULL", "no room", retry_after_ms=1500).fault.fault
    assert "try again in 1.5 s" in str(fault_error(fault))
