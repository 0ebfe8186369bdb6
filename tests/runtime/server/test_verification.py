"""Steps with drafts: what they must give is what undrafted steps give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.quant.codec import Raw32
from isthmus.runtime.back import BackEngine
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.sessions import Session
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import Refusal, crc_matches, parse_client_message, step_message

PROMPT = [5, 6, 7]


def make_session(engine: Any, seed: int = 0) -> Session:
    return Session(engine, engine.new_session(256, Sampling(seed=seed)), 256, ServerLimits())


def run(session: Session, step: int, ids: list[int], position: int, hidden: Any, drafted: list[int] = ()) -> pb.Result:
    """One sampled step with the hidden states of ``ids``."""
    message = step_message(step, position, len(ids), True, hidden(ids, position).tobytes(), drafted)
    return session.step(parse_client_message(message).step, Raw32(), 0.0).result


def test_drafts_are_taken_up_to_the_first_wrong_one(engine, hidden, expected):
    tokens = expected(PROMPT, 6)
    session = make_session(engine)
    assert run(session, 1, PROMPT, 0, hidden).token == tokens[0]
    wrong = (tokens[3] + 1) % 256
    drafts = [tokens[1], tokens[2], wrong, 9]
    result = run(session, 2, [tokens[0], *drafts], 3, hidden, drafts)
    assert list(result.tokens) == tokens[1:4]
    assert not result.HasField("token")
    assert result.length == 3 + 3  # the last token and two right drafts
    assert run(session, 3, [tokens[3]], 6, hidden).token == tokens[4]


def test_right_drafts_give_one_more_token_and_may_come_with_the_prompt(engine, hidden, expected):
    tokens = expected(PROMPT, 4)
    result = run(make_session(engine), 1, PROMPT + tokens[:3], 0, hidden, tokens[:3])
    assert list(result.tokens) == tokens
    assert result.length == 6


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_generation_by_any_guesses_in_any_frames_is_the_undrafted_one(engine, hidden, expected, data):
    tokens = expected(PROMPT, 24)
    session, step, done = make_session(engine), 1, []
    result = run(session, 1, PROMPT, 0, hidden)
    done.append(result.token)
    while len(done) < 12:
        # A chain of frames, sent before the first is answered: the later ones begin with a guess.
        chain = [done[-1]]
        position, failed = 2 + len(done), False
        for number in range(data.draw(st.integers(1, 3))):
            count = data.draw(st.integers(0 if number == 0 else 1, 3))
            guesses = []
            for _ in range(count):
                right = tokens[len(done) + len(guesses)] if len(done) + len(guesses) < len(tokens) else 1
                guesses.append(right if data.draw(st.booleans()) else (right + 1) % 256)
            rows = [*chain, *guesses] if number == 0 else guesses
            step += 1
            result = run(session, step, rows, position, hidden, guesses)
            position += len(rows)
            chosen = list(result.tokens) if guesses else [result.token]
            if failed:
                assert chosen == []
                continue
            assumed = guesses if number == 0 else guesses[1:]
            if number and guesses[0] != done[-1]:
                assert chosen == []
                failed = True
                continue
            done += chosen
            failed = len(chosen) <= len(assumed)
        assert result.length == 2 + len(done)
    assert done == tokens[: len(done)]


def test_a_guess_that_does_not_follow_does_nothing(engine, hidden, expected):
    tokens = expected(PROMPT, 3)
    session = make_session(engine)
    run(session, 1, PROMPT, 0, hidden)
    for step, (position, guess) in enumerate([(3, tokens[0] ^ 1), (4, tokens[0]), (2, tokens[0])], start=2):
        result = run(session, step, [guess], position, hidden, [guess])
        assert (list(result.tokens), result.length) == ([], 3)
    result = run(session, 5, tokens[:2], 3, hidden, tokens[:2])
    assert (list(result.tokens), result.length) == (tokens[1:3], 5)


def test_a_branch_is_taken_only_where_its_path_was_chosen(engine, hidden, expected):
    tokens = expected(PROMPT, 6)
    wrong = [(token + 1) % 256 for token in tokens]
    session = make_session(engine)
    run(session, 1, PROMPT, 0, hidden)
    # The main chain guesses wrong at once; its second frame would fit where the session ends after the branch.
    run(session, 2, [tokens[0], wrong[1]], 3, hidden, [wrong[1]])
    branch = run(session, 3, tokens[1:3], 4, hidden, tokens[1:3])
    assert list(branch.tokens) == tokens[2:4]
    main = run(session, 4, [tokens[3]], 6, hidden, [wrong[1], wrong[2], tokens[3]])
    assert (list(main.tokens), main.length) == ([], 6)
    result = run(session, 5, [tokens[3]], 6, hidden, tokens[1:4])
    assert (list(result.tokens), result.length) == (tokens[4:5], 7)


def test_every_result_on_its_way_is_kept_for_the_next_stream(engine, hidden, expected):
    tokens = expected(PROMPT, 5)
    session = make_session(engine)
    results = [run(session, 1, PROMPT, 0, hidden)]
    for step in range(2, 5):
        guess = tokens[step - 2]
        results.append(run(session, step, [guess], step + 1, hidden, [guess]))
    answers = session.resume(1)
    assert answers[0].attached.last_step == 4
    assert [answer.result for answer in answers[1:]] == results[1:]
    assert run(session, 3, [tokens[1]], 4, hidden, [tokens[1]]) == results[2]


@pytest.mark.parametrize(
    ("drafted", "sample", "code"),
    [([1], False, "BAD_REQUEST"), (list(range(67)), True, "BAD_FRAME"), ([256], True, "BAD_FRAME")],
)
def test_drafts_that_break_a_rule_are_refused_and_change_nothing(engine, hidden, drafted, sample, code):
    session = make_session(engine)
    run(session, 1, PROMPT, 0, hidden)
    step = parse_client_message(step_message(2, 3, 2, sample, hidden([1, 2], 3).tobytes(), drafted)).step
    with pytest.raises(Refusal) as refusal:
        session.step(step, Raw32(), 0.0)
    assert pb.Fault.Code.Name(refusal.value.fault.fault.code) == code
    assert engine.sessions[0].length == 3


@given(st.integers(0, 2), st.integers(0, 31))
def test_a_changed_draft_breaks_the_checksum(index, bit):
    step = parse_client_message(step_message(7, 9, 4, True, b"payload", [1, 2, 3])).step
    assert crc_matches(step)
    step.frame.drafted[index] ^= 1 << bit
    assert not crc_matches(step)


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, seed=7),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=1),
    Sampling(repetition_penalty=1.5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_verified_tokens_are_those_sampled_one_by_one(tiny: Any, bits: int, sampling: Sampling) -> None:
    engine = BackEngine.open(Path(tiny.bundle(bits=bits, split=2)) / "server", threads=1)
    rng = np.random.default_rng(bits)
    hidden = rng.standard_normal((24, engine.manifest.architecture.d_model), np.float32)
    plain = engine.new_session(64, sampling, PROMPT)
    chosen = []
    for row in hidden:
        plain.advance(row[None])
        chosen.append(plain.sample())
    drafted = engine.new_session(64, sampling, PROMPT)
    at, tokens = 0, []
    while at < 20:
        count = int(rng.integers(0, 4))
        guesses = chosen[at : at + count]
        if guesses and rng.random() < 0.5:
            guesses[-1] = (guesses[-1] + 1) % 256
        drafted.advance(hidden[at : at + count + 1])
        tokens += drafted.verify(guesses)
        at = drafted.length
        assert len(tokens) == at
        assert drafted.history == PROMPT + tokens
    assert tokens == chosen[: len(tokens)]
