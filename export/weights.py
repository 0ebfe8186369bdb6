"""What each weight of a graph is made of: read from the checkpoint, and quantized as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quant.grids import quantize
from ..quant.nbits import PackedWeight, dequantize
from ..quant.offsets import OffsetWeight
from ..quant.opsc import Precision, Recipe
from ..runtime.bundle import TensorRecord
from .checkpoint import Checkpoint
from .families.common import EMBEDDING
from .gguf_blocks import BLOCK_BITS, BLOCK_SIZE, WITH_OFFSETS, pack_blocks
from .gguf_checkpoint import GGUFCheckpoint

TABLES = ("embedding", "head")  # their rows are read one by one, and perhaps from the same bytes: no offsets

Floats = NDArray[np.float32]
Solve = Callable[[str], PackedWeight]


@dataclass(frozen=True)
class Weights:
    """The weights of an export.

    Attributes:
        checkpoint: where they come from.
        precision: what each gets, by its name in the graph (``layers.3.qkv``, ``head``, ``embedding``).
        calibrated: gives the weights whose method is ``gptq``, asked for layer by layer; None if there are none.
    """

    checkpoint: Checkpoint
    precision: Callable[[str], Precision]
    calibrated: Solve | None = None

    @classmethod
    def floats(cls, checkpoint: Checkpoint) -> Weights:
        """The checkpoint's weights as they are, in float32."""
        return cls.uniform(checkpoint, 32, 0)

    @classmethod
    def uniform(cls, checkpoint: Checkpoint, bits: int, block_size: int) -> Weights:
        """All weights rounded to nearest, or as floats of 16 or 32 bits."""
        return cls(checkpoint, lambda name: Precision(bits, block_size))

    def read(self, tensors: Sequence[str]) -> Floats:
        """Tensors of the checkpoint, one below the other."""
        parts = [self.checkpoint.tensor(tensor) for tensor in tensors]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def packed(self, name: str, tensors: Sequence[str]) -> tuple[PackedWeight | OffsetWeight, TensorRecord]:
        """A packed weight, and how it is stored.

        Raises:
            ExportError: it holds NaN or infinity.
        """
        wanted = self.precision(name)
        if wanted.method == "copied":
            copied = copy_blocks(self.checkpoint, tensors)
            stored = copied.packed if isinstance(copied, OffsetWeight) else copied
            return copied, TensorRecord(stored.bits, stored.block_size, "copied", stored is copied, stored.nbytes)
        if wanted.method == "gptq" and self.calibrated is not None:
            packed = self.calibrated(name)
        else:
            weight, symmetric = self.read(tensors), wanted.symmetric
            packed = quantize(weight, wanted.bits, wanted.block_size, wanted.method, symmetric=symmetric)
        return packed, TensorRecord(packed.bits, packed.block_size, wanted.method, wanted.symmetric, packed.nbytes)

    def packed_table(self, name: str, tensor: str) -> tuple[PackedWeight, TensorRecord]:
        """The embedding or the head, which are never copied with offsets."""
        packed, record = self.packed(name, [tensor])
        assert isinstance(packed, PackedWeight)
        return packed, record

    def embedding(self, ids: Sequence[int] | None = None) -> Floats:
        """Rows ``[rows, d_model]`` of the embedding as the bundle holds them, all by default."""
        rows: Any = slice(None) if ids is None else list(ids)
        precision = self.precision("embedding")
        if precision.packed:
            table, _ = self.packed_table("embedding", EMBEDDING)
            picked: dict[str, Any] = {name: array[rows] for name, array in table.arrays().items()}
            return dequantize(replace(table, **picked))
        values = self.read([EMBEDDING])[rows]
        return values.astype(np.float16).astype(np.float32) if precision.bits == 16 else values


def copies(recipe: Recipe, checkpoint: Checkpoint, tensors: Mapping[str, Sequence[str]]) -> dict[str, Precision]:
    """Precisions of the weights that can be copied from the checkpoint's own blocks, by name.

    Args:
        recipe: a weight is copied where it asks for its bits and block size.
        checkpoint: may be of any format; blocks are in GGUF files only.
        tensors: the checkpoint's tensors of every weight.
    """
    found = {name: copied(checkpoint, parts, recipe.precision(name), name) for name, parts in tensors.items()}
    return {name: precision for name, precision in found.items() if precision is not None}


def copied(checkpoint: Checkpoint, tensors: Sequence[str], wanted: Precision, name: str) -> Precision | None:
    """The wanted precision with ``copied`` for its method, if the checkpoint's blocks have it."""
    if not isinstance(checkpoint, GGUFCheckpoint) or wanted.block_size != BLOCK_SIZE:
        return None
    kinds = {checkpoint.block_kind(tensor) for tensor in tensors}
    kind = kinds.pop()
    if kinds or kind is None or BLOCK_BITS[kind] != wanted.bits or (kind in WITH_OFFSETS and name in TABLES):
        return None
    return replace(wanted, method="copied", symmetric=kind not in WITH_OFFSETS)


def copy_blocks(checkpoint: Checkpoint, tensors: Sequence[str]) -> PackedWeight | OffsetWeight:
    """The weight that `copied` promised."""
    assert isinstance(checkpoint, GGUFCheckpoint)
    return pack_blocks([checkpoint.blocks(tensor) for tensor in tensors])
