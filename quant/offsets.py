"""Blocks with offsets that are not multiples of their scale: ``w = scale * code + offset``, llama.cpp's ``Q4_1``.

``MatMulNBits`` keeps its int8 path for whole zero points only. But the offsets' share of a product is the sum of each
block of inputs times its offset: so the weight gets further columns, which hold the offsets, and the input gets the
sums of its blocks. Offsets are written in digits of the weight's own bits, each digit in blocks of its own: two digits
of 4 bits tell an offset to 1/256 of the largest of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .nbits import Grid, PackedWeight, dequantize, pack, rtn_grid, to_blocks

DIGITS = 2

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class OffsetWeight:
    """A quantized weight ``[N, K]`` whose blocks have offsets.

    Attributes:
        packed: ``[N, K + DIGITS * padded]``: the codes, then each digit of the offsets.
        columns: K.
    """

    packed: PackedWeight
    columns: int

    @property
    def sums(self) -> int:
        """Columns of one digit: the number of blocks, rounded up to whole blocks."""
        return (self.packed.columns - self.columns) // DIGITS


def with_offsets(codes: Floats, scales: Floats, offsets: Floats, bits: int) -> OffsetWeight:
    """Pack ``scale * code + offset``.

    Args:
        codes: whole numbers ``[N, blocks, block_size]``.
        scales: ``[N, blocks]``.
        offsets: ``[N, blocks]``.
        bits: of the codes.
    """
    rows, blocks, size = codes.shape
    rest = offsets + scales * np.float32(1 << (bits - 1))  # what a code of zero stands for beyond the middle code
    parts, part_scales = [codes], [scales]
    for _ in range(DIGITS):
        digit = to_blocks(rest, size)
        grid = rtn_grid(digit, bits, symmetric=True)
        digit_codes = grid.codes(digit)
        parts.append(digit_codes)
        part_scales.append(grid.scales)
        rest = rest - grid.values(digit_codes).reshape(rows, -1)[:, :blocks]
    grid = Grid(np.concatenate(part_scales, axis=1), None, bits)
    columns = blocks * size
    padded = -(-blocks // size) * size
    return OffsetWeight(pack(np.concatenate(parts, axis=1), grid, columns + DIGITS * padded), columns)


def block_summing_weight(columns: int, sums: int, block_size: int) -> PackedWeight:
    """The weight ``[DIGITS * sums, K]`` of ones that makes an `OffsetWeight`'s further inputs of the first K."""
    blocks = columns // block_size
    chosen = np.zeros((DIGITS, sums, blocks, block_size), np.float32)
    chosen[:, np.arange(blocks), np.arange(blocks)] = 1
    grid = Grid(np.ones((DIGITS * sums, blocks), np.float32), None, 2)
    return pack(chosen.reshape(DIGITS * sums, blocks, block_size) + 2, grid, columns)


def dequantize_offsets(weight: OffsetWeight) -> Floats:
    """Float32 ``[N, K]`` that the weight stands for."""
    values = dequantize(weight.packed)
    size = weight.packed.block_size
    digits = values[:, weight.columns :].reshape(len(values), DIGITS, weight.sums)
    offsets = digits.sum(axis=1)[:, : weight.columns // size]
    return values[:, : weight.columns] + np.repeat(offsets, size, axis=1)
