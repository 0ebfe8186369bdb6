"""What drafts are expected to bring, against the loop that it describes, played event by event."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.export.draft_costs import DRAFT_LENGTHS, DraftFigures, StepTimes, Wait, draft_d_ff
from isthmus.export.footprint import Footprint
from isthmus.export.shipped_drafts import shipped_draft, shipped_figures
from isthmus.runtime.bundle import Architecture

SURE = Wait(drafts=10, wrong=0.0, gap=1.0, acceptance=(0.5, 0.7, 0.8))


def figures(*waits: Wait) -> DraftFigures:
    return DraftFigures(d_ff=1024, vocabulary=4608, waits=waits)


def played(times: StepTimes, length: int, acceptance: tuple[float, ...], rng: random.Random) -> tuple[float, int]:
    """Time and tokens of one round trip with the drafts after it: the device works while answers are on their way."""
    run = 0
    while rng.random() < acceptance[min(run, len(acceptance) - 1)]:
        run += 1
    now, sure, drafted, last = times.front_ms, 0, 0, 0.0
    answers = [now + times.answer_ms]  # of each frame, the first sure token's, the first draft's, …
    while sure <= run:
        if drafted - sure < length:
            now += times.draft_ms
            drafted += 1
            answers.append(now + times.answer_ms)
        else:
            now = max(now, answers[sure], last)
        while sure < len(answers) and max(answers[sure], last + times.frame_ms * bool(sure)) <= now:
            last = max(answers[sure], last + times.frame_ms * bool(sure))
            sure += 1
            if sure > run:
                break
    return last, run + 1


@pytest.mark.parametrize("length", [1, 2, 4, 8])
@pytest.mark.parametrize("times", [StepTimes(2, 3, 80, 0.0), StepTimes(2, 3, 11, 0.0), StepTimes(5, 8, 40, 0.0)])
def test_the_expected_time_is_that_of_the_loop(times, length):
    rng = random.Random(0)
    runs = [played(times, length, SURE.acceptance, rng) for _ in range(20000)]
    tokens = sum(tokens for _, tokens in runs)
    expected = figures(SURE).drafted(times, length)
    assert expected.tokens == pytest.approx(tokens / len(runs), rel=0.03)
    assert expected.ms_per_token == pytest.approx(sum(ms for ms, _ in runs) / tokens, rel=0.06)


@given(
    acceptance=st.lists(st.floats(0, 0.95), min_size=1, max_size=6),
    front=st.floats(0.1, 50),
    guess=st.floats(0.0, 20),
    answer=st.floats(0.1, 500),
    frame=st.floats(0, 30),
)
def test_longer_drafts_never_take_longer_and_none_saves_more_than_its_round_trip(
    acceptance, front, guess, answer, frame
):
    drafts = figures(dataclasses.replace(SURE, acceptance=tuple(acceptance)))
    times = StepTimes(front, front + guess, answer, frame)
    expected = [drafts.drafted(times, length) for length in DRAFT_LENGTHS]
    means = [each.ms_per_token for each in expected]
    assert means == sorted(means, reverse=True)
    assert front + answer <= means[-1] * expected[-1].tokens * 1.0001
    assert means[0] <= 1.0001 * (front + guess + answer + frame)


def test_a_draft_that_is_never_right_changes_no_time_but_by_what_it_sends():
    never = dataclasses.replace(SURE, acceptance=(0.0,))
    times = StepTimes(2, 3, 60, 0.1)
    assert figures(never).drafted(times, 4) == pytest.approx((62, 1, 1))
    expected = figures(dataclasses.replace(never, wrong=10.0)).drafted(times._replace(frame_ms=20), 4)
    assert expected == pytest.approx((62 + 8 * 20 - 40, 1, 9))  # they queue on the link


def test_between_measured_waits_it_is_between_what_came_of_them():
    short, long = SURE, Wait(drafts=30, wrong=8.0, gap=3.0, acceptance=(0.7, 0.8, 0.9))
    both = figures(short, long)
    for answer, alone in ((3.0, short), (30.0, short), (90.0, long), (900.0, long)):
        times = StepTimes(2, 3, answer, 0.1)
        assert both.drafted(times, 4) == figures(alone).drafted(times, 4)
    tokens = [both.drafted(StepTimes(2, 3, answer, 0.1), 4).tokens for answer in range(30, 95, 5)]
    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[-1]


def test_the_shipped_drafts_are_those_that_were_measured():
    files = {"model.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
    figures = shipped_figures(files)
    assert figures
    for split, measured in figures.items():
        draft = shipped_draft(files, split)
        assert len(draft.weights["gate"]) == measured.d_ff
        assert len(draft.vocabulary) == measured.vocabulary
    assert shipped_figures({"model.gguf": "0" * 64}) == {}


def test_a_draft_s_width_follows_its_front():
    whole = 1536
    arch = Architecture("llama", 30, 576, 9, 3, 64, whole, 49152, 1e-5, 1e5, 8192, tied_embeddings=True)
    footprint = Footprint(arch)
    assert draft_d_ff(footprint, 10, 4608) == 1024  # the shipped one's
    assert draft_d_ff(footprint, 20, 8192) == whole
    assert draft_d_ff(footprint, 1, 4608) == whole // 3
    assert draft_d_ff(footprint, 10, 4096) > 1024
