"""KV cache formats: scales that cover what was seen, codes that come back within half a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from isthmus.errors import ExportError
from isthmus.quant.kv import absmax_scales, quantize

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
