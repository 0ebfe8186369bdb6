"""OPSC, one-point split compression: which weight gets how many bits.

Source: arXiv 2511.04002, where precision changes at one layer, the split, and the memory of both halves is
``sum of B(i; front bits) over i < l + sum of B(j; back bits) over j >= l``. Ours: the embedding and the head,
which the paper leaves open, have bits of their own, and single weights may be exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ExportError
from .kv import KV_BITS
from .nbits import PACKED_BITS

WEIGHT_BITS = (*PACKED_BITS, 16, 32)

# What ``MatMulNBits`` computes with int8 activations (measured: onnxruntime 1.32, x86); at 2 bits and blocks of 16 it
# computes in float, a hundred times slower.
BLOCK_SIZES = {2: (32, 64, 128), 4: (16, 32, 64, 128), 8: (16, 32, 64, 128)}

# How codes are found for the layers' weights, by the name of the recipe; embedding and head, of which a token needs
# few rows and all at once, are always rounded on their own.
RECIPES = {"rtn": "rtn", "mse": "mse", "hqq": "hqq", "gptq": "gptq", "mixed": "gptq", "auto": "gptq"}
CALIBRATED = tuple(name for name, method in RECIPES.items() if method == "gptq")


@dataclass(frozen=True)
class Precision:
    """How one weight is stored.

    Attributes:
        bits: 2, 4 or 8 packed, 16 or 32 as floats.
        block_size: weights that share a scale, along the input axis.
        method: how its codes are found: ``rtn``, ``mse``, ``hqq`` or ``gptq``.
        symmetric: whether the zero point is the middle code everywhere.
    """

    bits: int
    block_size: int
    method: str = "rtn"
    symmetric: bool = True

    @property
    def packed(self) -> bool:
        """Whether the weight goes through ``MatMulNBits``."""
        return self.bits in PACKED_BITS

    def bytes_for(self, rows: int, columns: int) -> int:
        """Bytes of a weight ``[rows, columns]``, scales and zero points included."""
        if not self.packed:
            return rows * columns * self.bits // 8
        blocks = -(-columns // self.block_size)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * (self.block_size * self.bits // 8 + 4) + zero_points)


@dataclass(frozen=True)
class Recipe:
    """Precision of every weight of a model with ``layers`` layers.

    Attributes:
        split: layers ``[0, split)`` get ``front_bits``, the others ``back_bits``.
        front_kv_bits: of the KV cache of layers ``[0, split)``; 32 is float32.
        back_kv_bits: of the other layers' KV cache.
        block_size: weights that share one scale, along the input axis; one that `BLOCK_SIZES` lists for every
            packed precision of layers and head.
        weights: how the layers' codes are found, a key of `RECIPES`.
        symmetric: whether zero points are the middle code.
        exceptions: precision of single weights of the layers, by name (``layers.3.down``).
    """

    layers: int
    split: int
    front_bits: int
    back_bits: int
    embed_bits: int
    head_bits: int
    block_size: int
    front_kv_bits: int = 32
    back_kv_bits: int = 32
    weights: str = "rtn"
    symmetric: bool = True
    exceptions: Mapping[str, Precision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.split <= self.layers:
            raise ExportError(
                f"split {self.split}: must lie between 0 and {self.layers}, the model's number of layers; 0 keeps the "
                "whole model on the server, `--split all` on the device"
            )
        if self.weights not in RECIPES:
            raise ExportError(f"weights={self.weights!r}: must be one of {', '.join(RECIPES)}")
        for name in ("front_bits", "back_bits", "embed_bits", "head_bits"):
            if getattr(self, name) not in WEIGHT_BITS:
                raise ExportError(f"{name}={getattr(self, name)}: must be one of {', '.join(map(str, WEIGHT_BITS))}")
        for name in ("front_kv_bits", "back_kv_bits"):
            if getattr(self, name) not in KV_BITS:
                raise ExportError(f"{name}={getattr(self, name)}: must be one of {', '.join(map(str, KV_BITS))}")
        if self.block_size not in (16, 32, 64, 128):
            raise ExportError(f"block_size={self.block_size}: must be 16, 32, 64 or 128")
        for name in ("front_bits", "back_bits", "head_bits"):
            sizes = BLOCK_SIZES.get(getattr(self, name), ())
            if sizes and self.block_size not in sizes:
                raise ExportError(
                    f"block_size={self.block_size}: with {name}={getattr(self, name)} must be one of "
                    f"{', '.join(map(str, sizes))}: onnxruntime is a hundred times slower there"
                )

    def layer_bits(self, layer: int) -> int:
        """Weight bits of one layer, exceptions aside."""
        return self.front_bits if layer < self.split else self.back_bits

    def precision(self, name: str) -> Precision:
        """Precision of a weight: ``embedding``, ``head``, or one of a layer, such as ``layers.3.down``."""
        if name in self.exceptions:
            return self.exceptions[name]
        method = RECIPES[self.weights]
        if name in ("embedding", "head"):
            bits = self.embed_bits if name == "embedding" else self.head_bits
            return Precision(bits, self.block_size, "rtn" if method == "gptq" else method, self.symmetric)
        return Precision(self.layer_bits(int(name.split(".")[1])), self.block_size, method, self.symmetric)

    def kv_bits(self, layer: int) -> int:
        """Bits of one layer's KV cache."""
        return self.front_kv_bits if layer < self.split else self.back_kv_bits
