"""OPSC, one-point split compression: which weight gets how many bits.

Source: arXiv 2511.04002, where precision changes at one layer, the split, and the memory of both halves is
``sum of B(i; front bits) over i < l + sum of B(j; back bits) over j >= l``. Ours: the embedding and the head,
which the paper leaves open, have bits of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ExportError
from .nbits import PACKED_BITS

WEIGHT_BITS = (*PACKED_BITS, 16, 32)

# At these, ``MatMulNBits`` gives a row the same bits whatever rows lie beside it (measured: onnxruntime 1.32, x86).
# At others it computes rows in pairs and the odd one by another path, or in float: drafting, batching and resuming
# would then change the text.
BLOCK_SIZES = {2: (32, 64, 128), 4: (16, 32), 8: (16, 32, 64)}


@dataclass(frozen=True)
class Recipe:
    """Precision of every weight of a model with ``layers`` layers.

    Attributes:
        split: layers ``[0, split)`` get ``front_bits``, the others ``back_bits``.
        block_size: weights that share one scale, along the input axis; one that `BLOCK_SIZES` lists for every
            packed precision of layers and head.
    """

    layers: int
    split: int
    front_bits: int
    back_bits: int
    embed_bits: int
    head_bits: int
    block_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.split <= self.layers:
            raise ExportError(
                f"split {self.split}: must lie between 1 and {self.layers}, the model's number of layers; "
                "`--split all` keeps the whole model on the device"
            )
        for name in ("front_bits", "back_bits", "embed_bits", "head_bits"):
            if getattr(self, name) not in WEIGHT_BITS:
                raise ExportError(f"{name}={getattr(self, name)}: must be one of {', '.join(map(str, WEIGHT_BITS))}")
        if self.block_size not in (16, 32, 64, 128):
            raise ExportError(f"block_size={self.block_size}: must be 16, 32, 64 or 128")
        for name in ("front_bits", "back_bits", "head_bits"):
            sizes = BLOCK_SIZES.get(getattr(self, name), ())
            if sizes and self.block_size not in sizes:
                raise ExportError(
                    f"block_size={self.block_size}: with {name}={getattr(self, name)} must be one of "
                    f"{', '.join(map(str, sizes))}, where a token's result does not depend on the tokens beside it"
                )

    def layer_bits(self, layer: int) -> int:
        """Weight bits of one layer."""
        return self.front_bits if layer < self.split else self.back_bits
