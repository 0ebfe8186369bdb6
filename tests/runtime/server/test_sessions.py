"""The step machine without a socket."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.quant.codec import Raw32
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.sessions import Session
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import Refusal, parse_client_message, step_message


def make_session(engine) -> Session:
    return Session(engine, engine.new_session(64, Sampling()), 64, ServerLimits())


def step_of(step: int, ids: list[int], position: int, hidden) -> pb.Step:
    payload = hidden(ids, position).tobytes()
    return parse_client_message(step_message(step, position, len(ids), True, payload)).step


def test_a_refused_rollback_rolls_nothing_back(engine, hidden):
    session = make_session(engine)
    session.step(step_of(1, [1, 2, 3], 0, hidden), Raw32(), 0.0)
    with pytest.raises(Refusal):
        session.step(step_of(2, [1], 0, lambda *at: hidden(*at) * np.float32("nan")), Raw32(), 0.0)
    assert engine.sessions[0].length == 3


def test_resume_gives_the_last_result_only_to_whom_it_is_new(engine, hidden):
    session = make_session(engine)
    assert session.resume(0) == [pb.ServerMessage(attached=pb.Attached(last_step=0))]
    result = session.step(step_of(1, [1], 0, hidden), Raw32(), 0.0)
    attached = pb.ServerMessage(attached=pb.Attached(last_step=1))
    assert session.resume(0) == [attached, result]
    assert session.resume(1) == [attached]


def test_session_ids_are_long_and_differ(engine):
    ids = {make_session(engine).id for _ in range(50)}
    assert len(ids) == 50
    assert {len(session_id) for session_id in ids} == {16}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 6), max_size=30))
def test_whatever_repeats_and_gaps_arrive_each_step_is_done_once_in_order(numbers):
    done: list[int] = []

    class Recorder:
        length = 0

        def sample(self) -> int:
            return done[-1]

    class Engine:
        onnxruntime_seconds = 0.0

        @staticmethod
        def advance(parts: list[tuple[Recorder, np.ndarray, int]]) -> None:
            done.extend(int(hidden[0, 0]) for _, hidden, _ in parts)

        class manifest:  # noqa: N801
            class architecture:  # noqa: N801
                d_model = 1

    session = Session(Engine, Recorder(), 64, ServerLimits())
    for number in numbers:
        payload = np.array([[number]], np.float32).tobytes()
        step = parse_client_message(step_message(number, 0, 1, True, payload)).step
        try:
            result = session.step(step, Raw32(), 0.0).result
            assert result.step == result.token == number
        except Refusal as refusal:
            assert refusal.fault.fault.expected_step == len(done) + 1
    assert done == list(range(1, len(done) + 1))
    assert len(done) == longest_run(numbers)


def longest_run(numbers: list[int]) -> int:
    """How far 1, 2, 3 … can be followed through the numbers."""
    reached = 0
    for number in numbers:
        reached += number == reached + 1
    return reached
