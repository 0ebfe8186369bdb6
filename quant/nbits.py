"""Blockwise weight quantization in the layout of ONNX Runtime's ``MatMulNBits``.

A weight ``[N, K]`` is cut along K into blocks of ``block_size``; each block holds unsigned codes, packed
little-endian (lowest code in the lowest bits), and one float32 scale. The zero point is the middle code,
``2 ** (bits - 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ExportError

PACKED_BITS = (2, 4, 8)


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight ``[N, K]``.

    Attributes:
        codes: uint8 ``[N, ceil(K / block_size), block_size * bits / 8]``.
        scales: float32 ``[N, ceil(K / block_size)]``.
        columns: K.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    columns: int
    bits: int
    block_size: int


def quantize_rtn(weight: NDArray[np.float32], bits: int, block_size: int) -> PackedWeight:
    """Round a float32 weight ``[N, K]`` to nearest, symmetric, one signed scale a block.

    The value of largest magnitude maps to the lowest code, ``-2 ** (bits - 1)``, so that no code is wasted:
    the scale takes that value's opposite sign and divides by 8 at 4 bits, not by 7.5 (llama.cpp's ``Q4_0`` rule).

    Raises:
        ExportError: the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    if blocks * block_size != columns:
        weight = np.pad(weight, ((0, 0), (0, blocks * block_size - columns)))
    grouped = weight.reshape(rows, blocks, block_size)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    extreme = np.where(-low > high, low, high)
    middle = 1 << (bits - 1)
    scales = (extreme / -middle).astype(np.float32)
    if not np.isfinite(scales).all():
        raise ExportError("a weight holds NaN or infinity; the checkpoint may be damaged: fetch it again")
    scales[np.abs(scales) < np.finfo(np.float32).tiny] = 0.0  # a subnormal scale may have no finite inverse
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(grouped * inverse[..., None])
    codes += middle
    np.clip(codes, 0, 2 * middle - 1, out=codes)
    return PackedWeight(_pack(codes.astype(np.uint8), bits), scales, columns, bits, block_size)


def dequantize(packed: PackedWeight) -> NDArray[np.float32]:
    """Float32 ``[N, K]`` that a packed weight stands for."""
    rows, blocks, _ = packed.codes.shape
    codes = unpack(packed.codes, packed.bits).astype(np.float32) - (1 << (packed.bits - 1))
    values = codes * packed.scales[..., None]
    return values.reshape(rows, blocks * packed.block_size)[:, : packed.columns]


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes below ``2 ** bits`` along the last axis, lowest code in the lowest bits."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    lanes = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = lanes[..., 0].copy()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << np.uint8(lane * bits)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of a packed array; the last axis grows by ``8 / bits``."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)
