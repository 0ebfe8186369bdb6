from __future__ import annotations

import importlib
import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.errors import CodecError
from isthmus.quant.bitpack import pack, packed_bytes
from isthmus.quant.tabq import TabQ, _decode_numpy

TOKEN_BYTES = 5


def student_t(tokens: int, d_model: int, seed: int = 0) -> NDArray[np.float32]:
    """Values like a hidden state's: heavy tails, and a few channels that are large in every token."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_t(6, (tokens, d_model)).astype(np.float32)
    hidden[:, rng.choice(d_model, 3, replace=False)] *= np.float32(80)
    return hidden


def nasty_row(kind: str, d_model: int, seed: int) -> NDArray[np.float32]:
    """A token ``[1, d_model]`` of which something is extreme: its range, its ties, its outliers or its zeros."""
    rng = np.random.default_rng(seed)
    row = {
        "zero": np.zeros(d_model),
        "constant": np.full(d_model, -5.1),
        "two signs": rng.choice([-7.5, 7.5], d_model),
        "normal": rng.standard_normal(d_model),
        "offset": 1000 + rng.standard_normal(d_model),
        "sink": rng.standard_t(4, d_model) * np.where(rng.random(d_model) < 0.02, 25_000, 1),
        "large": rng.standard_normal(d_model) * 2.0**119,
        "largest": rng.choice([-1.0, 1.0], d_model) * float(np.finfo(np.float32).max),
        "small": rng.standard_normal(d_model) * 2.0**-118,
        "subnormal": rng.standard_normal(d_model) * 1e-42,
        "mixed": rng.standard_normal(d_model) * 10.0 ** rng.integers(-44, 38, d_model),
    }[kind]
    return row.astype(np.float32)[None]


NASTY_KINDS = ["zero", "constant", "two signs", "normal", "offset", "sink", "large", "largest", "small"]
NASTY_KINDS += ["subnormal", "mixed"]


def widths(payload: bytes, tokens: int) -> list[int]:
    return list(payload[: tokens * TOKEN_BYTES : TOKEN_BYTES])


def outlier_counts(payload: bytes, tokens: int) -> list[int]:
    return list(payload[1 : tokens * TOKEN_BYTES : TOKEN_BYTES])


def split_exact(
    hidden: NDArray[np.float32], decoded: NDArray[np.float32], outliers: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The remainder of each token and its error, in float64, without the largest magnitudes."""
    order = np.argsort(np.abs(hidden), axis=1, kind="stable")[:, : max(hidden.shape[1] - outliers, 0)]
    rest = np.take_along_axis(hidden, order, axis=1).astype(np.float64)
    return rest, np.take_along_axis(decoded, order, axis=1) - rest


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 20),
    d_model=st.sampled_from([9, 64, 100, 576]),
    outliers=st.sampled_from([0, 1, 8, 30]),
    tolerance=st.sampled_from([0.003, 0.01, 0.05, 0.2, 0.5]),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 25_000.0, 1e30, 1e35]),
)
def test_the_remainder_of_each_token_keeps_the_tolerance(
    seed: int, tokens: int, d_model: int, outliers: int, tolerance: float, magnitude: float
) -> None:
    hidden = student_t(tokens, d_model, seed) * np.float32(magnitude)
    codec = TabQ(outliers=outliers, tolerance=tolerance)
    decoded = codec.decode(codec.encode(hidden), tokens, d_model)
    rest, error = split_exact(hidden, decoded, outliers)
    assert (np.linalg.norm(error, axis=1) <= tolerance * (1 + 1e-5) * np.linalg.norm(rest, axis=1)).all()


@given(seed=st.integers(0, 2**32 - 1), tolerance=st.sampled_from([0.01, 0.05, 0.2]))
def test_one_bit_less_would_break_the_tolerance(seed: int, tolerance: float) -> None:
    hidden = student_t(6, 200, seed)
    payload = TabQ(tolerance=tolerance).encode(hidden)
    for row, width in enumerate(widths(payload, 6)):
        narrower = TabQ(tolerance=0.999, q_min=max(width - 1, 2), q_max=max(width - 1, 2))
        decoded = narrower.decode(narrower.encode(hidden[row : row + 1]), 1, 200)
        rest, error = split_exact(hidden[row : row + 1], decoded, 8)
        assert width == 2 or np.linalg.norm(error) > tolerance * (1 - 1e-5) * np.linalg.norm(rest)


def test_tokens_of_one_frame_take_the_bits_that_each_needs() -> None:
    rng = np.random.default_rng(0)
    two_values = rng.choice([0.0, 1.0], 576)
    normal = rng.standard_normal(576)
    spiked = np.where(np.arange(576) == 7, 30, normal)
    hidden = np.stack([two_values, normal, spiked]).astype(np.float32)
    first, second, third = widths(TabQ(outliers=0, tolerance=0.1).encode(hidden), 3)
    assert first == 2 < second < third <= 8
    assert widths(TabQ(outliers=1, tolerance=0.1).encode(hidden[2:]), 1) == [second]


@given(seed=st.integers(0, 2**32 - 1), outliers=st.integers(1, 64))
def test_the_largest_magnitudes_are_bit_exact(seed: int, outliers: int) -> None:
    hidden = student_t(5, 64, seed)
    hidden[0, :3] = [25_000, -1e30, np.finfo(np.float32).max]
    codec = TabQ(outliers=outliers, tolerance=0.5)
    decoded = codec.decode(codec.encode(hidden), 5, 64)
    largest = np.argsort(np.abs(hidden), axis=1)[:, 64 - outliers :]
    np.testing.assert_array_equal(
        np.take_along_axis(decoded, largest, axis=1), np.take_along_axis(hidden, largest, axis=1)
    )


@given(seed=st.integers(0, 2**32 - 1), threshold=st.sampled_from([0.5, 3.0, 100.0, 25_000.0]))
def test_a_threshold_keeps_all_from_there_on_bit_exact(seed: int, threshold: float) -> None:
    hidden = student_t(4, 100, seed)
    hidden[1, 5] = threshold
    hidden[2, 7] = -26_000
    codec = TabQ(threshold=threshold, tolerance=0.5)
    payload = codec.encode(hidden)
    decoded = codec.decode(payload, 4, 100)
    above = np.abs(hidden) >= np.float32(threshold)
    assert outlier_counts(payload, 4) == above.sum(axis=1).tolist()
    np.testing.assert_array_equal(decoded[above], hidden[above])


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (np.full(576, 1e-44), {}),
        (np.where(np.arange(576) % 2, 3e38, -3e38), {}),
        (np.random.default_rng(0).standard_normal(576), {"tolerance": 1e-6}),
        (np.random.default_rng(0).standard_normal(576), {"tolerance": 0.01, "q_max": 4}),
        (np.random.default_rng(0).standard_normal(576) + 9, {"threshold": 1.0}),
    ],
    ids=["subnormal", "largest", "fine tolerance", "few bits", "too many outliers"],
)
def test_a_token_that_no_width_can_hold_is_stored_raw_and_exact(
    row: NDArray[np.float64], options: dict[str, Any]
) -> None:
    hidden = np.stack([np.zeros(576), row]).astype(np.float32)
    codec = TabQ(**options)
    payload = codec.encode(hidden)
    assert widths(payload, 2) == [2, 0]
    assert codec.decode(payload, 2, 576).tobytes() == hidden.tobytes()


def test_zero_and_constant_tokens_decode_to_what_they_were() -> None:
    hidden = np.stack([np.zeros(64), np.full(64, 3.0), np.full(64, -1e30)]).astype(np.float32)
    codec = TabQ(tolerance=0.01)
    payload = codec.encode(hidden)
    assert widths(payload, 3) == [2, 2, 2]
    np.testing.assert_allclose(codec.decode(payload, 3, 64), hidden, rtol=0.005)


def test_every_byte_is_accounted_for() -> None:
    payload = TabQ(outliers=8, q_min=4, q_max=4, tolerance=0.9).encode(student_t(3, 576))
    indices, values, codes = 3 * 8 * 10 // 8, 3 * 8 * 4, 3 * 568 * 4 // 8
    assert len(payload) == 3 * TOKEN_BYTES + indices + values + codes


def test_tokens_of_one_width_share_a_run_and_runs_rise_in_width() -> None:
    rng = np.random.default_rng(0)
    two_values, fine = rng.choice([0.0, 1.0], (2, 9)), rng.standard_normal(9)
    hidden = np.stack([fine, two_values[0], 2 * fine, two_values[1]]).astype(np.float32)
    codec = TabQ(outliers=0, tolerance=0.05, q_max=6)
    payload = codec.encode(hidden)
    wide = widths(payload, 4)[0]
    assert widths(payload, 4) == [wide, 2, wide, 2]
    assert wide > 2
    narrow_run = pack(two_values.astype(np.uint8).ravel() * np.uint8(3), 2)
    assert payload[4 * TOKEN_BYTES :][: len(narrow_run)] == narrow_run
    assert len(payload) == 4 * TOKEN_BYTES + len(narrow_run) + packed_bytes(18, wide)
    decoded = codec.decode(payload, 4, 9)
    for row in range(4):
        assert decoded[row].tobytes() == codec.decode(codec.encode(hidden[row : row + 1]), 1, 9).tobytes()


@pytest.mark.parametrize("d_model", [1, 2, 8, 9, 255])
def test_outliers_that_take_the_whole_token_leave_it_exact(d_model: int) -> None:
    hidden = np.random.default_rng(d_model).standard_normal((3, d_model)).astype(np.float32)
    codec = TabQ(outliers=255)
    payload = codec.encode(hidden)
    assert outlier_counts(payload, 3) == [d_model] * 3
    assert codec.decode(payload, 3, d_model).tobytes() == hidden.tobytes()


@given(
    kinds=st.lists(st.sampled_from(NASTY_KINDS), min_size=1, max_size=4),
    d_model=st.sampled_from([1, 2, 7, 64, 300, 576, 2100]),
    seed=st.integers(0, 2**32 - 1),
    outliers=st.sampled_from([0, 1, 8, 255]),
    threshold=st.sampled_from([None, 1.0, 1e30, 9e37]),
    tolerance=st.sampled_from([1e-4, 0.01, 0.05, 0.2, 0.5]),
    q_range=st.sampled_from([(2, 8), (4, 4), (3, 6)]),
)
def test_the_compiled_form_makes_the_bytes_and_bits_of_the_numpy_form(
    kinds: list[str],
    d_model: int,
    seed: int,
    outliers: int,
    threshold: float | None,
    tolerance: float,
    q_range: tuple[int, int],
) -> None:
    hidden = np.concatenate([nasty_row(kind, d_model, seed + row) for row, kind in enumerate(kinds)])
    codec = TabQ(outliers, threshold, tolerance, *q_range)
    payload = codec._encode_numpy(hidden)
    assert codec.encode(hidden) == payload
    decoded = codec.decode(payload, len(kinds), d_model)
    assert decoded.tobytes() == _decode_numpy(payload, len(kinds), d_model).tobytes()
    compiled, reference = codec.quantize(hidden), codec._quantize_numpy(hidden)
    assert compiled.front() == reference.front()
    assert np.array_equal(compiled.coded, reference.coded)
    assert np.array_equal(compiled.codes[compiled.coded], reference.codes[reference.coded])


@given(
    kind=st.sampled_from(NASTY_KINDS),
    d_model=st.sampled_from([1, 5, 8, 64]),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_the_compiled_form_refuses_what_the_numpy_form_refuses(
    kind: str, d_model: int, edits: list[tuple[int, int]]
) -> None:
    payload = bytearray(TabQ(outliers=2).encode(nasty_row(kind, d_model, 0)))
    for place, flips in edits:
        payload[place % min(len(payload), 40)] ^= flips
    try:
        general = _decode_numpy(bytes(payload), 1, d_model).tobytes()
    except CodecError:
        with pytest.raises(CodecError):
            TabQ().decode(bytes(payload), 1, d_model)
    else:
        assert TabQ().decode(bytes(payload), 1, d_model).tobytes() == general


def test_equal_magnitudes_at_the_cut_stay_in_the_remainder() -> None:
    hidden = np.array([[5, 1, -1, 1, 0, 0]], np.float32)
    payload = TabQ(outliers=2).encode(hidden)
    assert outlier_counts(payload, 1) == [1]
    assert outlier_counts(TabQ(outliers=4).encode(hidden), 1) == [4]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        (0, 1, "width"),
        (0, 9, "width"),
        (0, 32, "width"),
        (1, 65, "outliers"),
        (2, 16, "zero point"),
        (4, 0x7B, "scale"),
        (4, 0x7F, "scale"),
        (4, 0xFF, "scale"),
    ],
)
def test_a_token_table_out_of_range_is_refused(field: int, value: int, complaint: str) -> None:
    codec = TabQ(q_min=4, q_max=4, tolerance=0.9)
    payload = bytearray(codec.encode(student_t(2, 64)))
    payload[TOKEN_BYTES + field] = value
    with pytest.raises(CodecError, match=rf"token 1 has .*{complaint}"):
        codec.decode(bytes(payload), 2, 64)


def test_indices_that_do_not_rise_or_leave_the_token_are_refused() -> None:
    codec = TabQ(outliers=2, q_min=4, q_max=4, tolerance=0.9)
    hidden = np.full((1, 5), 0.5, np.float32)
    hidden[0, [1, 3]] = 9
    payload = bytearray(codec.encode(hidden))
    assert payload[TOKEN_BYTES] == 0b11010000  # 1 and 3 at three bits, plane after plane
    for planes in (0b11100000, 0b00000000, 0b11000100, 0b11111100):  # 3 and 1, 0 and 0, 1 and 5 (twice)
        payload[TOKEN_BYTES] = planes
        with pytest.raises(CodecError, match="must rise within a token and stay below d_model 5"):
            codec.decode(bytes(payload), 1, 5)


def test_an_outlier_or_raw_value_that_is_not_finite_is_refused() -> None:
    codec = TabQ(outliers=1)
    payload = codec.encode(student_t(1, 64))
    nan = np.array([np.nan], "<f4").tobytes()
    with pytest.raises(CodecError, match="only finite"):
        codec.decode(payload[:6] + nan + payload[10:], 1, 64)
    raw = TabQ(tolerance=1e-6).encode(student_t(1, 64))
    with pytest.raises(CodecError, match="only finite"):
        codec.decode(raw[:-4] + nan, 1, 64)


@pytest.mark.parametrize(
    "options",
    [
        {"outliers": -1},
        {"outliers": 256},
        {"threshold": 0.0},
        {"threshold": float("nan")},
        {"threshold": float("inf")},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"tolerance": float("nan")},
        {"q_min": 1},
        {"q_max": 9},
        {"q_min": 6, "q_max": 5},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CodecError, match=next(iter(options))):
        TabQ(**options)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("name", ["_native", "_tabq"])
def test_what_can_be_compiled_was(name: str) -> None:
    importlib.import_module(f"isthmus.quant.{name}")  # both are optional, so that an error in one is silent
