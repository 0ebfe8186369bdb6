"""Blockwise weight quantization in the layout of ONNX Runtime's ``MatMulNBits``.

A weight ``[N, K]`` is cut along K into blocks of ``block_size``; each block holds unsigned codes, packed
little-endian (lowest code in the lowest bits), one float32 scale and, if asymmetric, one zero point: a code itself,
packed likewise. Without zero points it is the middle code, ``2 ** (bits - 1)``. The operator takes float zero points
as well, but then leaves its int8 path: measured 60 times slower at 4 bits, and rows depend on their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        zero_points: packed uint8 ``[N, ceil(blocks * bits / 8)]``, or None where all are the middle code.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    columns: int
    bits: int
    block_size: int
    zero_points: NDArray[np.uint8] | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Codes, scales and, if there are any, zero points, in the operator's order."""
        arrays: dict[str, NDArray[Any]] = {"codes": self.codes, "scales": self.scales}
        return arrays if self.zero_points is None else arrays | {"zero_points": self.zero_points}

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(array.nbytes for array in self.arrays().values())


@dataclass(frozen=True)
class Grid:
    """The values that a weight's blocks may take: ``scale * (code - zero_point)`` for the codes of ``bits``.

    Attributes:
        scales: float32 ``[N, blocks]``; zero makes the whole block zero.
        zero_points: codes, float32 ``[N, blocks]``, or None where all are the middle code.
    """

    scales: NDArray[np.float32]
    zero_points: NDArray[np.float32] | None
    bits: int

    @property
    def offsets(self) -> NDArray[np.float32]:
        """Zero points that broadcast over ``[N, blocks]``."""
        middle = np.full((1, 1), 1 << (self.bits - 1), np.float32)
        return middle if self.zero_points is None else self.zero_points

    def codes(self, blocks: NDArray[np.float32]) -> NDArray[np.float32]:
        """The nearest codes, whole numbers, for values ``[N, blocks, block_size]``."""
        inverse = np.divide(1.0, self.scales, out=np.zeros_like(self.scales), where=self.scales != 0)
        codes = np.rint(blocks * inverse[..., None])
        codes += self.offsets[..., None]
        np.clip(codes, 0, (1 << self.bits) - 1, out=codes)
        return codes

    def values(self, codes: NDArray[np.float32]) -> NDArray[np.float32]:
        """What codes ``[N, blocks, block_size]`` stand for."""
        values = codes - self.offsets[..., None]
        values *= self.scales[..., None]
        return values


def quantize_rtn(weight: NDArray[np.float32], bits: int, block_size: int, *, symmetric: bool = True) -> PackedWeight:
    """Round a float32 weight ``[N, K]`` to nearest, its blocks' extremes deciding the scales; see `rtn_grid`.

    Raises:
        ExportError: the weight holds NaN or infinity.
    """
    blocks = to_blocks(weight, block_size)
    grid = rtn_grid(blocks, bits, symmetric)
    return pack(grid.codes(blocks), grid, weight.shape[1])


def rtn_grid(blocks: NDArray[np.float32], bits: int, symmetric: bool) -> Grid:
    """The grid that covers each block ``[N, blocks, block_size]`` from end to end.

    Symmetric: the value of largest magnitude maps to the lowest code, ``-2 ** (bits - 1)``, so that no code is
    wasted: the scale takes that value's opposite sign and divides by 8 at 4 bits, not by 7.5 (llama.cpp's ``Q4_0``
    rule). Asymmetric: the lowest code stands for the minimum and the highest for the maximum, up to the rounding of
    the zero point; zero is always a value.

    Raises:
        ExportError: a value is NaN or infinity.
    """
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ExportError("a weight holds NaN or infinity; the checkpoint may be damaged: fetch it again")
    if symmetric:
        extreme = np.where(-low > high, low, high)
        return Grid(without_subnormals(extreme / -(1 << (bits - 1))), None, bits)
    highest = (1 << bits) - 1
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = without_subnormals(high / highest - low / highest)
    zero_points = np.rint(np.divide(-low, scales, out=np.zeros_like(scales), where=scales != 0))
    return Grid(scales, np.clip(zero_points, 0, highest), bits)


def without_subnormals(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales with zero in place of those that may have no finite inverse."""
    scales = np.asarray(scales, np.float32)
    return np.where(np.abs(scales) < np.finfo(np.float32).tiny, np.float32(0), scales)


def to_blocks(weight: NDArray[np.float32], block_size: int) -> NDArray[np.float32]:
    """A weight ``[N, K]`` as ``[N, blocks, block_size]``, the last block padded with zeros."""
    rows, columns = weight.shape
    padding = -columns % block_size
    if padding:
        weight = np.pad(weight, ((0, 0), (0, padding)))
    return weight.reshape(rows, -1, block_size)


def pack(codes: NDArray[np.float32], grid: Grid, columns: int) -> PackedWeight:
    """Pack whole-numbered codes ``[N, blocks, block_size]`` of a weight with ``columns`` columns."""
    zero_points = None
    if grid.zero_points is not None:
        points = grid.zero_points.astype(np.uint8)
        zero_points = _pack(np.pad(points, ((0, 0), (0, -points.shape[1] % (8 // grid.bits)))), grid.bits)
    return PackedWeight(
        _pack(codes.astype(np.uint8), grid.bits), grid.scales, columns, grid.bits, codes.shape[2], zero_points
    )


def dequantize(packed: PackedWeight) -> NDArray[np.float32]:
    """Float32 ``[N, K]`` that a packed weight stands for."""
    rows, blocks, _ = packed.codes.shape
    values = grid_of(packed).values(unpack(packed.codes, packed.bits).astype(np.float32))
    return values.reshape(rows, blocks * packed.block_size)[:, : packed.columns]


def grid_of(packed: PackedWeight) -> Grid:
    """The grid of a packed weight."""
    if packed.zero_points is None:
        return Grid(packed.scales, None, packed.bits)
    points = unpack(packed.zero_points, packed.bits)[:, : packed.scales.shape[1]]
    return Grid(packed.scales, points.astype(np.float32), packed.bits)


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
