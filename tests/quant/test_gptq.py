"""GPTQ: never far from rounding on white inputs, far better on correlated ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.errors import ExportError
from isthmus.quant.gptq import gptq
from isthmus.quant.grids import quantize
from isthmus.quant.nbits import PACKED_BITS, dequantize
from isthmus.quant.opsc import Precision

Array = NDArray[np.float32]
RNG = np.random.default_rng(3)


def correlated_inputs(columns: int, tokens: int = 2000) -> Array:
    """Inputs of a few directions, some columns far larger than others, as a model's are."""
    mixing = RNG.standard_normal((columns // 8, columns)) * RNG.lognormal(0, 1, columns)
    noise = 0.1 * RNG.standard_normal((tokens, columns))
    return (RNG.standard_normal((tokens, columns // 8)) @ mixing + noise).astype(np.float32)


def output_error(weight: Array, rounded: Array, inputs: Array) -> float:
    return float(np.square(inputs @ (weight - rounded).T).sum() / np.square(inputs @ weight.T).sum())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("columns", [96, 320])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_change_less_than_with_rounding(bits: int, block_size: int, columns: int, symmetric: bool) -> None:
    weight = RNG.standard_normal((40, columns), np.float32)
    inputs = correlated_inputs(columns)
    packed = gptq(weight, inputs.T @ inputs, Precision(bits, block_size, "gptq", symmetric))
    assert (packed.bits, packed.block_size, packed.columns) == (bits, block_size, columns)
    plain = quantize(weight, bits, block_size, "mse", symmetric=symmetric)
    assert packed.nbytes == plain.nbytes
    calibrated = output_error(weight, dequantize(packed), inputs)
    assert calibrated < 0.5 * output_error(weight, dequantize(plain), inputs)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_white_inputs_leave_nothing_to_make_up_for(bits: int) -> None:
    weight = RNG.standard_normal((16, 64), np.float32)
    packed = gptq(weight, np.eye(64, dtype=np.float32), Precision(bits, 32, "gptq"))
    assert np.array_equal(packed.codes, quantize(weight, bits, 32, "mse", importance=np.ones(64, np.float32)).codes)


@pytest.mark.parametrize("dead", [slice(0, 5), slice(0, 64)], ids=["some columns", "all columns"])
def test_columns_that_are_never_used_are_rounded_all_the_same(dead: slice) -> None:
    weight = RNG.standard_normal((16, 64), np.float32)
    inputs = RNG.standard_normal((500, 64), np.float32)
    inputs[:, dead] = 0
    rounded = dequantize(gptq(weight, inputs.T @ inputs, Precision(8, 32, "gptq")))
    assert np.abs(rounded - weight).max() < 0.1


def test_the_padding_of_a_short_block_stays_zero() -> None:
    weight = RNG.standard_normal((8, 40), np.float32)
    packed = gptq(weight, np.eye(40, dtype=np.float32), Precision(4, 32, "gptq"))
    assert (packed.codes[:, 1, 4:] == 0x88).all()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = np.full((4, 32), np.nan, np.float32)
    with pytest.raises(ExportError, match="NaN or infinity"):
        gptq(weight, np.eye(32, dtype=np.float32), Precision(4, 32, "gptq"))
