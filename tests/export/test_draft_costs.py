"""What drafts are expected to bring, against the loop that it describes, played event by event."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.export.draft_costs import DRAFT_LENGTHS, DraftFigures, StepTimes
from isthmus.export.shipped_drafts import shipped_draft, shipped_figures

FIGURES = DraftFigures(split=3, d_ff=1024, vocabulary=4608, acceptance=(0.5, 0.7, 0.8), worthwhile=0.0)


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
    runs = [played(times, length, FIGURES.acceptance, rng) for _ in range(20000)]
    mean_ms = sum(ms for ms, _ in runs) / len(runs)
    tokens = sum(tokens for _, tokens in runs) / len(runs)
    assert FIGURES.tokens_per_round_trip() == pytest.approx(tokens, rel=0.03)
    assert FIGURES.cycle_ms(times, length) == pytest.approx(mean_ms, rel=0.06)


@given(
    acceptance=st.lists(st.floats(0, 0.95), min_size=1, max_size=6),
    front=st.floats(0.1, 50),
    guess=st.floats(0.0, 20),
    answer=st.floats(0.1, 500),
    frame=st.floats(0, 30),
)
def test_longer_drafts_never_take_longer_and_no_draft_that_is_right_costs_more_than_a_round_trip(
    acceptance, front, guess, answer, frame
):
    figures = dataclasses.replace(FIGURES, acceptance=tuple(acceptance))
    times = StepTimes(front, front + guess, answer, frame)
    cycles = [figures.cycle_ms(times, length) for length in DRAFT_LENGTHS]
    assert cycles == sorted(cycles, reverse=True)
    tokens = figures.tokens_per_round_trip()
    assert front + answer <= cycles[-1] * 1.0001
    assert cycles[0] <= 1.0001 * (tokens * (front + guess + answer + frame))


def test_a_draft_that_is_never_right_changes_no_time_but_by_what_it_sends():
    never = dataclasses.replace(FIGURES, acceptance=(0.0,))
    times = StepTimes(2, 3, 60, 0.1)
    assert never.tokens_per_round_trip() == 1
    assert never.cycle_ms(times, 4) == pytest.approx(62)
    slow = dataclasses.replace(never, worthwhile=8.0)
    assert slow.cycle_ms(times._replace(frame_ms=20), 4) == pytest.approx(62 + 8 * 20 - 40)  # they queue on the link
    assert slow.frames_per_token(times) == 9


def test_the_shipped_draft_is_the_one_that_was_measured():
    files = {"model.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
    figures = shipped_figures(files)
    draft = shipped_draft(files, figures.split)
    assert len(draft.weights["gate"]) == figures.d_ff
    assert len(draft.vocabulary) == figures.vocabulary
    assert shipped_figures({"model.gguf": "0" * 64}) is None
