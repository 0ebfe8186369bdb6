"""Offsets told in further columns: what they say, and how the input must be made."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.quant.nbits import dequantize
from isthmus.quant.offsets import DIGITS, block_summing_weight, dequantize_offsets, with_offsets

RNG = np.random.default_rng(2)


def random_parts(rows: int, blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = RNG.integers(0, 16, (rows, blocks, 32)).astype(np.float32)
    scales = RNG.uniform(0.01, 0.02, (rows, blocks)).astype(np.float32)
    return codes, scales, (-7 * scales + RNG.normal(0, 0.01, (rows, blocks))).astype(np.float32)


@pytest.mark.parametrize("blocks", [1, 2, 18, 32, 48])
def test_values_are_kept_but_for_the_offsets_last_digit(blocks: int) -> None:
    codes, scales, offsets = random_parts(12, blocks)
    weight = with_offsets(codes, scales, offsets, 4)
    assert weight.columns == 32 * blocks
    assert weight.sums == -(-blocks // 32) * 32
    assert np.array_equal(
        dequantize(weight.packed)[:, : 32 * blocks].reshape(codes.shape), (codes - 8) * scales[..., None]
    )
    expected = (codes * scales[..., None] + offsets[..., None]).reshape(12, -1)
    largest = np.abs(offsets + 8 * scales).max(axis=1, keepdims=True)
    assert (np.abs(dequantize_offsets(weight) - expected) <= largest / 120 + 1e-6).all()


@pytest.mark.parametrize("blocks", [2, 18, 48])
def test_the_sums_of_the_input_make_the_product_whole(blocks: int) -> None:
    weight = with_offsets(*random_parts(12, blocks), 4)
    inputs = RNG.standard_normal((5, weight.columns), np.float32)
    summing = dequantize(block_summing_weight(weight.columns, weight.sums, 32))
    assert summing.shape == (DIGITS * weight.sums, weight.columns)
    assert set(np.unique(summing)) == {0, 1}
    product = np.concatenate([inputs, inputs @ summing.T], axis=1) @ dequantize(weight.packed).T
    np.testing.assert_allclose(product, inputs @ dequantize_offsets(weight).T, rtol=1e-4, atol=1e-4)
