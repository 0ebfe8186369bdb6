"""The calibration of exits: the binomial bound, the sequence of thresholds, and what it promises."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import RequestError
from isthmus.runtime.exits import THRESHOLDS, ExitCurve, binomial_tail


@given(st.integers(0, 40), st.integers(0, 40), st.floats(0.01, 0.99))
def test_the_tail_is_the_sum_of_its_terms(events, more, chance):
    trials = events + more
    terms = (comb(trials, at) * chance**at * (1 - chance) ** (trials - at) for at in range(events + 1))
    assert binomial_tail(events, trials, chance) == pytest.approx(sum(terms), rel=1e-9)


def test_many_trials_do_not_overflow():
    assert binomial_tail(4_900, 100_000, 0.05) == pytest.approx(0.074, abs=0.005)


def curve(*bins: tuple[float, int, int]) -> ExitCurve:
    return ExitCurve(*zip(*bins, strict=True))


def test_the_lowest_threshold_before_the_first_that_fails_is_taken():
    measured = curve((0.0, 1000, 1000), (0.5, 1000, 500), (0.7, 1000, 990), (0.9, 1000, 1000))
    assert measured.threshold(0.9) == 0.7
    assert measured.threshold(0.85) == 0.0
    assert measured.share(0.7) == 0.5


def test_an_even_share_is_not_enough_for_a_promise():
    # 0.95 of 1,000 agree: the bound at a risk of 0.05 lies below.
    assert curve((0.0, 1000, 950)).threshold(0.95) is None
    assert curve((0.0, 1000, 963)).threshold(0.95) == 0.0
    assert curve((0.0, 1000, 963)).threshold(0.95, 0.001) is None
    assert ExitCurve((0.0,), (1000,), (963,), dependence=2.0).threshold(0.95) is None


def test_few_tokens_promise_nothing():
    assert curve((0.0, 40, 40)).threshold(0.95) is None


@pytest.mark.parametrize(("agreement", "risk"), [(0, 0.05), (1, 0.05), (1.5, 0.05), (float("nan"), 0.05), (0.9, 0)])
def test_promises_out_of_range_are_refused(agreement, risk):
    with pytest.raises(RequestError, match="between 0 and 1"):
        curve((0.0, 1000, 1000)).threshold(agreement, risk)


@pytest.mark.parametrize(
    ("thresholds", "tokens", "agreed"),
    [((0.0, 0.5), (1,), (1,)), ((0.5, 0.5), (1, 1), (1, 1)), ((0.0,), (3,), (4,)), ((), (), ())],
)
def test_a_curve_that_cannot_be_is_refused(thresholds, tokens, agreed):
    with pytest.raises(ValueError, match="an exit curve"):
        ExitCurve(thresholds, tokens, agreed)


def test_tokens_are_counted_into_their_bins():
    confidence, agreed = np.array([0.0, 0.019, 0.5, 0.999, 1.0]), np.array([True, False, True, False, True])
    measured = ExitCurve.of([(confidence[:2], agreed[:2]), (confidence[2:], agreed[2:])])
    assert measured.thresholds == THRESHOLDS
    assert measured.tokens[0] == 2
    assert measured.agreed[0] == 1
    assert measured.tokens[THRESHOLDS.index(0.5)] == 1
    assert measured.tokens[-1] == 2
    assert measured.agreed[-1] == 1
    assert measured.dependence == 1
    assert ExitCurve.from_dict(json.loads(json.dumps(asdict(measured)))) == measured


def texts(rng: np.random.Generator, copies: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A draft whose chance to be right is its confidence; each token comes so many times in its text."""
    confidence = rng.random((50, 80 // copies))
    agreed = rng.random(confidence.shape) < confidence
    return [(np.repeat(c, copies), np.repeat(a, copies)) for c, a in zip(confidence, agreed, strict=True)]


def test_tokens_that_depend_on_each_other_count_less():
    rng = np.random.default_rng(1)
    assert ExitCurve.of(texts(rng, 1)).dependence < 2.5
    assert 6 < ExitCurve.of(texts(rng, 8)).dependence < 20


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("agreement", [0.8, 0.95])
def test_the_promise_is_broken_no_more_often_than_the_risk_says(agreement, copies):
    rng = np.random.default_rng(0)
    broken = found = 0
    for _ in range(300):
        threshold = ExitCurve.of(texts(rng, copies)).threshold(agreement, 0.1)
        if threshold is not None:
            found += 1
            broken += (1 - threshold) ** 2 / 2 > 1 - agreement  # the share of all tokens that exits get wrong
    assert found > 250
    assert broken <= 45  # of 300 with a risk of 0.1: more has a probability below 1 %
