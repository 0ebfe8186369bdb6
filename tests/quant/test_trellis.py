from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import CodecError
from isthmus.quant.trellis import GAINS, LIMIT, TrellisTables, _points

NEXT = [[0, 1], [3, 2], [5, 4], [6, 7], [1, 0], [2, 3], [4, 5], [7, 6]]
TABLES = TrellisTables.fit(
    np.random.default_rng(0).laplace(size=(400, 24)).astype(np.float32) * np.linspace(4, 0.3, 24, dtype=np.float32),
    np.arange(24, dtype=np.uint8) // 6,
)


def rows_of(seed: int, rows: int, scale: float) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(3, (rows, 24)) * scale).astype(np.float32)


def reconstruct(index: np.ndarray, gain: int) -> np.ndarray:
    """The decoder's rule, written down a second time."""
    values, state = np.empty(24, np.float32), 0
    for i, k in enumerate(index.tolist()):
        quantizer = state & 1
        values[i] = 2 * k - (np.sign(k) if quantizer else 0)
        if abs(k) <= LIMIT:
            values[i] += TABLES.offsets[TABLES.contexts[i] + gain, quantizer, k + LIMIT]
        state = NEXT[state][k & 1]
    return values


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 6), scale=st.sampled_from([0.0, 0.1, 2.0, 50.0, 20_000.0]))
def test_what_is_coded_comes_back(seed: int, rows: int, scale: float) -> None:
    sent = np.clip(rows_of(seed, rows, scale), -(2**19), 2**19)
    gains = TABLES.gains(sent)
    indices = TABLES.quantize(sent, gains)
    values, found = TABLES.decode(TABLES.encode(indices, gains, 12345), gains)
    assert found == 12345
    np.testing.assert_array_equal(
        values, [reconstruct(index, gain) for index, gain in zip(indices, gains, strict=True)]
    )


def test_the_path_is_the_best_of_all_paths() -> None:
    """Against every path of a short row that stays near its values."""
    tables = TrellisTables(TABLES.contexts[:4], TABLES.cumulative, TABLES.offsets)
    for seed in range(20):
        values = np.ascontiguousarray(rows_of(seed, 1, 1.5)[:, :4])
        gains = tables.gains(values)
        used = tables.contexts + gains[0]
        points = _points()
        costs = {}
        for path in np.ndindex(*[9] * 4):
            ks, state, cost = [k - 4 for k in path], 0, 0.0
            for i, k in enumerate(ks):
                q = state & 1
                point = points[q, k + LIMIT] + tables.offsets[used[i], q, k + LIMIT]
                cost += (values[0, i] - point) ** 2 + 0.6 * tables.bits[used[i], q, k + LIMIT]
                state = NEXT[state][k & 1]
            costs[tuple(ks)] = cost
        found = tuple(tables.quantize(values, gains)[0].tolist())
        assert costs[found] <= min(costs.values()) + 1e-4


def test_a_row_is_quantized_alone_as_among_others() -> None:
    values = rows_of(3, 50, 2.0)
    gains = TABLES.gains(values)
    together = TABLES.quantize(values, gains)
    for row in range(50):
        alone = values[row : row + 1]
        np.testing.assert_array_equal(TABLES.quantize(alone, TABLES.gains(alone))[0], together[row])


def test_a_gain_is_a_quarter_of_an_octave() -> None:
    row = rows_of(4, 1, 0.3)
    middle = int(TABLES.gains(row)[0])
    wider = np.concatenate([row * 2 ** (steps / 4) for steps in range(-3, 4)])
    assert TABLES.gains(wider).tolist() == list(range(middle - 3, middle + 4))
    assert TABLES.gains(np.concatenate([row * 1e6, row * 0])).tolist() == [GAINS - 1, 0]


def test_gains_pay_where_rows_spread_unlike_each_other() -> None:
    rng = np.random.default_rng(2)
    values = (rng.standard_normal((600, 24)) * np.exp(0.4 * rng.standard_normal((600, 1)))).astype(np.float32)
    tables = TrellisTables.fit(values[:300], np.full(24, 6, np.uint8))
    sent, own = values[300:], tables.gains(values[300:])
    taken, errors = {}, {}
    for name, gains in {"own": own, "middling": np.full_like(own, 8)}.items():
        payload = tables.encode(tables.quantize(sent, gains), gains, 0)
        taken[name], errors[name] = len(payload), np.square(tables.decode(payload, gains)[0] - sent).mean()
    assert taken["own"] < 0.97 * taken["middling"]
    assert errors["own"] < 1.02 * errors["middling"]


def test_bytes_are_what_the_tables_promise() -> None:
    values = np.random.default_rng(1).laplace(size=(2000, 24)).astype(np.float32)
    gains = TABLES.gains(values)
    indices = TABLES.quantize(values, gains)
    bits, states = 0.0, np.zeros(len(values), int)
    for i in range(24):
        k = indices[:, i]
        assert np.abs(k).max() <= LIMIT
        bits += float(TABLES.bits[TABLES.contexts[i] + gains, states & 1, k + LIMIT].sum())
        states = np.array(NEXT)[states, k & 1]
    assert len(TABLES.encode(indices, gains, 0)) == pytest.approx(bits / 8, rel=0.002)


@pytest.mark.parametrize("sigma", [1.5, 3.0, 6.0])
def test_gaussian_numbers_come_within_a_decibel_of_the_bound(sigma: float) -> None:
    values = np.random.default_rng(0).normal(0, sigma, (1000, 100)).astype(np.float32)
    tables = TrellisTables.fit(values, np.zeros(100, np.uint8))
    gains = tables.gains(values)
    payload = tables.encode(tables.quantize(values, gains), gains, 0)
    error = np.mean((tables.decode(payload, gains)[0] - values) ** 2) / sigma**2
    bits = 8 * len(payload) / values.size
    gap = 10 * np.log10(error) + 20 * np.log10(2) * bits
    assert 0 <= gap < 0.9  # scalar quantization with the same coder: 1.2 to 1.5


@pytest.mark.parametrize("change", ["shorter", "longer", "empty"])
def test_a_payload_of_another_length_is_refused_or_ends_elsewhere(change: str) -> None:
    rows = rows_of(5, 3, 2.0)
    gains = TABLES.gains(rows)
    payload = TABLES.encode(TABLES.quantize(rows, gains), gains, 777)
    altered = {"shorter": payload[:-1], "longer": payload + b"\0", "empty": b""}[change]
    try:
        _, seed = TABLES.decode(altered, gains)
    except CodecError as error:
        assert "send the frame again" in str(error)
    else:
        assert seed != 777


@pytest.mark.parametrize(
    "tables",
    [
        TrellisTables(np.array([19], np.uint8), TABLES.cumulative, TABLES.offsets),
        TrellisTables(TABLES.contexts, TABLES.cumulative[..., :-1].copy(), TABLES.offsets),
        TrellisTables(TABLES.contexts, np.zeros_like(TABLES.cumulative), TABLES.offsets),
        TrellisTables(TABLES.contexts, TABLES.cumulative, TABLES.offsets[:1].copy()),
    ],
)
def test_tables_that_do_not_fit_are_refused_before_they_are_read(tables: TrellisTables) -> None:
    with pytest.raises(ValueError):
        tables.decode(b"abcdefgh", np.zeros(2, np.uint8))
