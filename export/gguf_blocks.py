"""GGUF tensors whose blocks of 32 weights `MatMulNBits` can hold as they are, so that they are not rounded twice.

``Q4_0`` and ``Q8_0`` (``w = scale * code``) keep every value bit for bit. ``Q4_1`` (``w = scale * code + offset``)
keeps codes and scales; its offsets are told to 1/256, see `quant.offsets`. For SmolLM2-135M's own file that is
KL 0.003, all of it from the activations, where rounding it again to 4 bits has 0.26; it takes 15 % more time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from ..quant.nbits import Grid, PackedWeight, pack
from ..quant.offsets import OffsetWeight, with_offsets

BLOCK_SIZE = 32
BLOCK_BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q4_1: 4, GGMLQuantizationType.Q8_0: 8}
WITH_OFFSETS = (GGMLQuantizationType.Q4_1,)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SourceBlocks:
    """A tensor's blocks as its file holds them.

    Attributes:
        codes: unsigned whole numbers, float32 ``[N, blocks, 32]``.
        scales: ``[N, blocks]``.
        offsets: ``[N, blocks]``, or None where the middle code stands for zero.
    """

    codes: Floats
    scales: Floats
    offsets: Floats | None
    bits: int

    def reordered(self, rows: NDArray[np.intp]) -> SourceBlocks:
        """The same with rows in another order."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return SourceBlocks(self.codes[rows], self.scales[rows], offsets, self.bits)


def parse_blocks(stored: Bytes, kind: GGMLQuantizationType) -> SourceBlocks:
    """Blocks of rows ``[N, row_bytes]`` of a type in `BLOCK_BITS`."""
    rows = len(stored)
    if kind == GGMLQuantizationType.Q8_0:
        blocks = stored.reshape(rows, -1, 34)
        signed = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
        return SourceBlocks(signed.astype(np.float32) + 128, _half(blocks, 0), None, 8)
    if kind == GGMLQuantizationType.Q4_0:
        blocks = stored.reshape(rows, -1, 18)
        return SourceBlocks(_nibbles(blocks[..., 2:]), _half(blocks, 0), None, 4)
    blocks = stored.reshape(rows, -1, 20)
    return SourceBlocks(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2), 4)


def pack_blocks(parts: list[SourceBlocks]) -> PackedWeight | OffsetWeight:
    """Tensors of one type, one below the other, as one weight."""
    bits = parts[0].bits
    codes, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    offsets = [part.offsets for part in parts if part.offsets is not None]
    if offsets:
        return with_offsets(codes, scales, np.concatenate(offsets), bits)
    return pack(codes, Grid(scales, None, bits), codes.shape[1] * BLOCK_SIZE)


def _half(blocks: Bytes, start: int) -> Floats:
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0].astype(np.float32)


def _nibbles(packed: Bytes) -> Floats:
    """Codes of 16 bytes: the low halves first, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)
