from __future__ import annotations

import numpy as np

from isthmus.export.token_importance import fit_importance, without_trend


def test_slopes_are_found_under_the_noise_of_single_draws() -> None:
    rng = np.random.default_rng(0)
    scales = np.geomspace(0.1, 30, 12)
    hidden = (5 + rng.standard_normal((40_000, 12)) * scales).astype(np.float32)
    slopes = rng.standard_normal(12) * 0.3 / scales
    importances = 1e-7 * np.exp(hidden @ slopes) * rng.exponential(size=len(hidden))
    found = fit_importance(hidden, importances)
    np.testing.assert_allclose(found * scales, slopes * scales, atol=0.03)


def test_what_has_no_reason_is_not_foretold() -> None:
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((500, 64)).astype(np.float32)
    by_chance = fit_importance(hidden, rng.exponential(size=500) ** 3)
    assert (hidden @ by_chance).std() < 0.5


def test_channels_that_do_not_vary_and_losses_without_a_gradient_do_no_harm() -> None:
    hidden = np.ones((300, 4), np.float32)
    hidden[:, 1:] = np.random.default_rng(2).standard_normal((300, 3))
    assert np.isfinite(fit_importance(hidden, np.exp(hidden[:, 1].astype(np.float64)))).all()
    np.testing.assert_allclose(fit_importance(hidden, np.zeros(300)), np.zeros(4), atol=1e-9)


def test_positions_at_which_all_count_for_more_are_no_reason() -> None:
    rng = np.random.default_rng(3)
    positions = np.tile(np.arange(1, 201), 100)
    own = rng.exponential(size=len(positions))
    trend = 1 + 30 / positions
    even = without_trend(own * trend, positions)
    assert abs(even[positions < 8].mean() - even[positions >= 128].mean()) < 0.1
    one_octave = positions >= 128
    np.testing.assert_allclose(
        even[one_octave] / even[one_octave].mean(), (own * trend)[one_octave] / (own * trend)[one_octave].mean()
    )


def test_a_position_where_nothing_counts_is_left_at_that() -> None:
    positions = np.arange(1, 101)
    importances = np.where(positions < 8, 0.0, 2.0)
    np.testing.assert_allclose(without_trend(importances, positions), np.where(positions < 8, 0.0, 1.0))
