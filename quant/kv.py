"""KV cache formats: keys and values as signed integers, one static scale for each channel of each head.

What onnxruntime's ``GroupQueryAttention`` stores is ``round(x * (1 / scale))``, clipped to ``[-2^(b-1), 2^(b-1) - 1]``:
at 8 bits as int8, at 4 bits two codes a byte, the even channel in the low nibble, each plus 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ExportError

KV_BITS = (4, 8, 32)  # 32 is float32, without scales
SMALLEST_SCALE = np.float32(1e-12)  # of a channel that is always zero


@dataclass(frozen=True)
class KVScales:
    """Scales of one layer's cache: ``key`` and ``value`` float32 ``[kv_heads, head_dim]``."""

    bits: int
    key: NDArray[np.float32]
    value: NDArray[np.float32]


def absmax_scales(samples: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Scales ``[...]`` at which the largest magnitude of ``samples`` ``[tokens, ...]`` lies half a step beyond a code.

    It is clipped by that half step, as much as any other value is rounded, and the steps are 7 % finer at 4 bits.

    Raises:
        ExportError: there are no samples, or some are not finite.
    """
    if not len(samples) or not np.isfinite(samples).all():
        raise ExportError(
            f"{len(samples)} keys or values to calibrate on, all finite: {bool(np.isfinite(samples).all())}; "
            "give at least one token, and check the checkpoint's weights"
        )
    largest = np.abs(samples).max(axis=0)
    return np.maximum(largest / np.float32(2 ** (bits - 1) - 0.5), SMALLEST_SCALE)


def quantize(values: NDArray[np.float32], scales: NDArray[np.float32], bits: int) -> NDArray[np.int8]:
    """Codes of ``values``, one a byte, with scales that broadcast to them, rounded and clipped as onnxruntime does."""
    limit = 1 << (bits - 1)
    return np.clip(np.rint(values * (np.float32(1) / scales)), -limit, limit - 1).astype(np.int8)


def quantize_rows(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes of finite ``values`` ``[..., head_dim]`` at 8 bits, for the wire: each row, a position's head, has a scale.

    The scale is the row's largest magnitude by 127, rounded up to float16, so that no value is clipped.

    Returns:
        Codes ``[..., head_dim]``, and scales ``[...]``: infinite where magnitudes pass what float16 can scale (8e6).
    """
    largest = np.abs(values).max(axis=-1).astype(np.float64) / 127
    with np.errstate(over="ignore"):
        scales = largest.astype(np.float16)
    scales = np.where(scales < largest, np.nextafter(scales, np.float16(np.inf)), scales)
    steps = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)[..., None]
    return np.rint(values / steps).astype(np.int8), scales


def dequantize_rows(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """Values ``[..., head_dim]`` of codes and scales, see `quantize_rows`."""
    return codes.astype(np.float32) * scales.astype(np.float32)[..., None]
