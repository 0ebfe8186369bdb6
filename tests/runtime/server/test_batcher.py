"""Which steps run together, and that none waits longer than it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.quant.codec import Raw32
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.batcher import LONG_RUN_ROWS, SHORT_ROWS, SHORT_RUN_ROWS, Batcher
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.sessions import Session, Work
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import parse_client_message, step_message


@dataclass
class Recorder:
    """An engine that notes which rows ran together; a session is a name."""

    onnxruntime_seconds: float = 0.0
    runs: list[list[tuple[str, int, int]]] = field(default_factory=list)
    failing: str = ""

    def advance(self, parts: Sequence[tuple[Any, np.ndarray, int]]) -> None:
        if any(name == self.failing for name, _, _ in parts):
            raise RuntimeError("a fault")
        self.runs.append([(name, len(rows), wanted) for name, rows, wanted in parts])
        self.onnxruntime_seconds += 1.0


class Finisher:
    """Stands for a session whose step has run."""

    def finish(self, work: Work) -> pb.ServerMessage:
        assert not work.remaining
        return pb.ServerMessage(result=work.result)


def work(name: str, rows: int, wanted: int = 1) -> Work:
    return Work(Finisher(), name, np.zeros((rows, 4), np.float32), wanted, None, False, pb.Result(), 0.0)  # type: ignore[arg-type]


def drain(batcher: Batcher) -> list[str]:
    """Names in the order in which their steps came to an end."""
    ended = []
    while batcher:
        ended += [str(done.compute) for done, _ in batcher.run()]
    return ended


def test_short_steps_run_together_and_long_ones_in_pieces_between() -> None:
    engine = Recorder()
    batcher = Batcher(engine, max_batch=8)
    for each in (work("a", 1), work("long", LONG_RUN_ROWS + 20), work("b", SHORT_ROWS, 3)):
        batcher.add(each)
    assert [str(done.compute) for done, _ in batcher.run()] == ["a", "b"]
    batcher.add(work("a", 1))
    assert batcher.run() == []
    assert drain(batcher) == ["a", "long"]
    assert engine.runs == [
        [("a", 1, 1), ("b", SHORT_ROWS, 3)],
        [("long", LONG_RUN_ROWS, 0)],
        [("a", 1, 1)],
        [("long", 20, 1)],
    ]


def test_long_steps_take_turns() -> None:
    engine = Recorder()
    batcher = Batcher(engine, max_batch=8)
    for name in ("x", "y"):
        batcher.add(work(name, 3 * LONG_RUN_ROWS))
    assert drain(batcher) == ["x", "y"]
    assert [run[0][0] for run in engine.runs] == ["x", "y", "x", "y", "x", "y"]


def test_prompts_share_a_run_as_far_as_they_fit() -> None:
    engine = Recorder()
    batcher = Batcher(engine, max_batch=8)
    for name, rows in (("a", 12), ("b", 12), ("c", 20)):
        batcher.add(work(name, rows))
    assert drain(batcher) == ["a", "b", "c"]
    assert engine.runs == [[("a", 12, 1), ("b", 12, 1), ("c", 8, 0)], [("c", 12, 1)]]


def test_the_rows_whose_tokens_are_wanted_run_together_at_last() -> None:
    engine = Recorder()
    batcher = Batcher(engine, max_batch=8)
    batcher.add(work("draft", LONG_RUN_ROWS + 10, wanted=30))
    batcher.add(work("all", LONG_RUN_ROWS + 10, wanted=LONG_RUN_ROWS + 10))
    drain(batcher)
    assert engine.runs == [
        [("draft", 12, 0)],
        [("all", LONG_RUN_ROWS + 10, LONG_RUN_ROWS + 10)],
        [("draft", 30, 30)],
    ]


@given(st.lists(st.integers(1, 4 * LONG_RUN_ROWS), min_size=1, max_size=30), st.integers(1, 6))
def test_every_row_runs_once_in_bounded_runs(rows: list[int], max_batch: int) -> None:
    engine = Recorder()
    batcher = Batcher(engine, max_batch)
    for number, count in enumerate(rows):
        batcher.add(work(str(number), count))
    assert sorted(drain(batcher), key=int) == [str(number) for number in range(len(rows))]
    done = dict.fromkeys(map(str, range(len(rows))), 0)
    long_before = False
    for run in engine.runs:
        assert len(run) <= max_batch
        is_long = rows[int(run[0][0])] - done[run[0][0]] > SHORT_ROWS
        assert sum(count for _, count, _ in run) <= (LONG_RUN_ROWS if is_long else SHORT_RUN_ROWS)
        if long_before and is_long:  # two in a row: no short step waited
            remaining = [count - done[str(number)] for number, count in enumerate(rows)]
            assert not any(0 < count <= SHORT_ROWS for count in remaining)
        long_before = is_long
        for name, count, _ in run:
            done[name] += count
    assert [done[str(number)] for number in range(len(rows))] == rows


def test_no_session_is_starved_however_many_there_are() -> None:
    engine = Recorder()
    batcher = Batcher(engine, max_batch=4)
    names = [str(number) for number in range(10)]
    for name in names:
        batcher.add(work(name, 1))
    for _ in range(50):
        for done, _ in batcher.run():
            batcher.add(work(str(done.compute), 1))
    turns = [sum(name in {entry[0] for entry in run} for run in engine.runs) for name in names]
    assert max(turns) - min(turns) <= 1


def test_a_step_that_fails_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = Recorder(failing="bad")
    batcher = Batcher(engine, max_batch=8)
    for name in ("a", "bad", "b"):
        batcher.add(work(name, 1))
    outcomes = {str(done.compute): outcome for done, outcome in batcher.run()}
    assert isinstance(outcomes["bad"], RuntimeError)
    assert isinstance(outcomes["a"], pb.ServerMessage)
    assert isinstance(outcomes["b"], pb.ServerMessage)
    assert engine.runs == [[("a", 1, 1)], [("b", 1, 1)]]
    assert not batcher
    assert "each runs alone" in caplog.text


def test_a_session_whose_token_cannot_be_chosen_leaves_the_others_theirs(engine, hidden, monkeypatch) -> None:
    """With the sessions of a server; the first one's logits are damaged."""
    sessions = [Session(engine, engine.new_session(64, Sampling()), 64, ServerLimits()) for _ in range(2)]

    def no_token() -> int:
        raise RuntimeError("NaN")

    monkeypatch.setattr(engine.sessions[0], "sample", no_token)
    batcher = Batcher(engine, max_batch=8)
    step = parse_client_message(step_message(1, 0, 2, True, hidden([1, 2], 0).tobytes())).step
    for session in sessions:
        prepared = session.prepare(step, Raw32(), 0.0)
        assert isinstance(prepared, Work)
        batcher.add(prepared)
    (_, failure), (_, answer) = batcher.run()
    assert isinstance(failure, RuntimeError)
    assert isinstance(answer, pb.ServerMessage)
    assert answer.result.length == 2
