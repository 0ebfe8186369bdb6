"""Grids fitted to a weight: never worse than the extremes by their own measure, and the kernel agrees on the values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from isthmus.errors import ExportError
from isthmus.quant.grids import METHODS, mse_grid, quantize
from isthmus.quant.nbits import PACKED_BITS, dequantize, quantize_rtn, rtn_grid, to_blocks

Array = NDArray[np.float32]

every_method = pytest.mark.parametrize("method", METHODS)
every_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
every_bits = pytest.mark.parametrize("bits", PACKED_BITS)


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


values = st.one_of(st.floats(-bound, bound, width=32) for bound in (2.0**126, 2.0, 2.0**-120))
weights = st.tuples(st.integers(1, 3), st.integers(1, 80)).flatmap(lambda s: hnp.arrays(np.float32, s, elements=values))


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from(PACKED_BITS), st.sampled_from((16, 64)), st.sampled_from([*METHODS]), st.booleans())
def test_any_weight_packs_into_the_layout(
    weight: Array, bits: int, block_size: int, method: str, symmetric: bool
) -> None:
    packed = quantize(weight, bits, block_size, method, symmetric=symmetric)
    blocks = -(-weight.shape[1] // block_size)
    assert packed.codes.shape == (len(weight), blocks, block_size * bits // 8)
    assert packed.scales.shape == (len(weight), blocks)
    assert (packed.zero_points is None) == symmetric
    if packed.zero_points is not None:
        assert packed.zero_points.dtype == np.uint8
        assert packed.zero_points.shape == (len(weight), -(-blocks * bits // 8))
    restored = dequantize(packed)
    assert restored.shape == weight.shape
    assert np.isfinite(restored).all()
    assert packed.nbytes == sum(
        part.nbytes for part in (packed.codes, packed.scales, packed.zero_points) if part is not None
    )


@every_method
@every_symmetry
@every_bits
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(method: str, symmetric: bool, bits: int, value: float) -> None:
    weight = heavy_tailed(3, 64)
    weight[1, 40] = value
    with pytest.raises(ExportError, match="NaN or infinity"):
        quantize(weight, bits, 32, method, symmetric=symmetric)


@every_symmetry
@every_bits
@pytest.mark.parametrize("block_size", [16, 128])
def test_the_search_lowers_the_squared_error_of_every_block(bits: int, symmetric: bool, block_size: int) -> None:
    blocks = to_blocks(heavy_tailed(40, 300), block_size)

    def errors(grid_of: object) -> Array:
        grid = grid_of(blocks, bits, symmetric)
        return np.square(blocks - grid.values(grid.codes(blocks))).sum(axis=2)

    plain, searched = errors(rtn_grid), errors(mse_grid)
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < 0.99 * plain.sum()


@every_symmetry
@pytest.mark.parametrize("bits", [2, 4])
def test_hqq_lowers_the_error_s_norm(bits: int, symmetric: bool) -> None:
    weight = heavy_tailed(40, 320)

    def norm(method: str) -> float:
        error = np.abs(weight - dequantize(quantize(weight, bits, 64, method, symmetric=symmetric)))
        return float((error**0.7).sum())

    assert norm("hqq") < norm("rtn")


def test_importance_moves_the_error_to_columns_that_do_not_matter() -> None:
    weight = heavy_tailed(64, 64)
    importance = np.full(64, 1e-4, np.float32)
    importance[10:14] = 1.0
    plain = np.square(weight - dequantize(quantize(weight, 2, 64, "mse"))).mean(axis=0)
    weighted = np.square(weight - dequantize(quantize(weight, 2, 64, "mse", importance=importance))).mean(axis=0)
    assert weighted[10:14].sum() < 0.7 * plain[10:14].sum()
    assert weighted.sum() > plain.sum()


@every_bits
def test_asymmetric_rounding_reaches_both_ends_of_a_one_sided_block(bits: int) -> None:
    weight = np.linspace(0, 1, 32, dtype=np.float32)[None]
    error = np.abs(dequantize(quantize_rtn(weight, bits, 32, symmetric=False)) - weight)
    step = 1 / ((1 << bits) - 1)
    assert error.max() <= step / 2 * (1 + 1e-5)
    assert np.abs(dequantize(quantize_rtn(weight, bits, 32)) - weight).max() > step / 2


@every_method
@every_symmetry
@every_bits
def test_what_the_grid_can_say_is_kept(method: str, symmetric: bool, bits: int) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 1 << bits, (8, 2, 32))
    codes[..., 0], codes[..., 1] = 0, (1 << bits) - 1
    zero_point = 1 << (bits - 1) if symmetric else 1
    weight = ((codes - zero_point) * 0.25).reshape(8, 64).astype(np.float32)
    packed = quantize(weight, bits, 32, method, symmetric=symmetric)
    np.testing.assert_allclose(dequantize(packed), weight, rtol=1e-6, atol=1e-6)
