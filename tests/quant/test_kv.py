"""KV cache formats: scales that cover what was seen, codes that come back within half a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from isthmus.errors import ExportError
from isthmus.quant.kv import absmax_scales, dequantize_rows, quantize, quantize_rows

quantized_bits = pytest.mark.parametrize("bits", [4, 8])


@quantized_bits
@given(values=arrays(np.float32, (5, 2, 3), elements=st.floats(-(2.0**40), 2.0**40, width=32)))
def test_what_the_scales_were_measured_on_comes_back_within_half_a_step(bits: int, values: np.ndarray) -> None:
    scales = absmax_scales(values, bits)
    assert scales.shape == (2, 3)
    assert scales.dtype == np.float32
    error = np.abs(quantize(values, scales, bits) * scales.astype(np.float64) - values)
    assert (error <= 0.501 * scales).all()


@quantized_bits
def test_the_largest_magnitude_gets_the_last_code_and_more_is_clipped(bits: int) -> None:
    values = np.array([[[-1.0, 0.25]], [[0.5, 3.0]]], np.float32)
    scales = absmax_scales(values, bits)
    last = 2 ** (bits - 1) - 1
    assert quantize(100 * values, scales, bits).tolist() == [[[-last - 1, last]], [[last, last]]]
    assert quantize(np.array([[[1.0, 3.0]]], np.float32) * 0.999, scales, bits).tolist() == [[[last, last]]]


def test_a_channel_that_is_always_zero_has_a_scale_and_stays_zero() -> None:
    zeros = np.zeros((4, 1, 2), np.float32)
    scales = absmax_scales(zeros, 4)
    assert (scales > 0).all()
    assert not quantize(zeros, scales, 4).any()


@pytest.mark.parametrize("samples", [np.zeros((0, 1, 2)), [[[1.0, np.nan]]], [[[np.inf, 0.0]]]], ids=str)
def test_samples_without_a_largest_magnitude_are_refused(samples: object) -> None:
    with pytest.raises(ExportError, match="keys or values to calibrate on"):
        absmax_scales(np.array(samples, np.float32), 8)


@given(arrays(np.float32, (2, 3, 4), elements=st.floats(-8e6, 8e6, width=32)))
def test_rows_come_back_within_half_a_step_of_their_own(values: np.ndarray) -> None:
    codes, scales = quantize_rows(values)
    assert (codes.dtype, codes.shape) == (np.int8, values.shape)
    assert (scales.dtype, scales.shape) == (np.float16, values.shape[:-1])
    error = np.abs(dequantize_rows(codes, scales).astype(np.float64) - values)
    assert (error <= 0.501 * scales.astype(np.float64)[..., None]).all()
    # A step is the row's 127th part, to float16's precision.
    largest = np.abs(values).max(-1) / 127
    assert (scales.astype(np.float64) <= largest * 1.002 + 2.0**-24).all()


def test_rows_beyond_what_float16_can_scale_are_told() -> None:
    codes, scales = quantize_rows(np.array([[1e7, 1.0], [1.0, -1.0]], np.float32))
    assert np.isinf(scales).tolist() == [True, False]
    assert codes[1].tolist() == [127, -127]
