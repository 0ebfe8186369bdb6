"""What one layer, the head and a KV cache weigh in bytes and operations, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..devices.budget import StoredWeight
from ..quant.opsc import WEIGHT_BITS, Precision
from ..runtime.bundle import Architecture, KVSpec

OPERATORS_PER_LAYER = 14  # two norms, five products, attention, dummy row in and out, activation, gate, two sums


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model's parts at given precisions."""

    arch: Architecture
    block_size: int = 32

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's matrices."""
        arch = self.arch
        width = arch.heads * arch.head_dim
        return {
            "qkv": (self.qkv_width, arch.d_model),
            "attention_output": (arch.d_model, width),
            "gate": (arch.d_ff, arch.d_model),
            "up": (arch.d_ff, arch.d_model),
            "down": (arch.d_model, arch.d_ff),
        }

    @cached_property
    def qkv_width(self) -> int:
        """Width of queries, keys and values together."""
        return (self.arch.heads + 2 * self.arch.kv_heads) * self.arch.head_dim

    @cached_property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        return sum(rows * columns for rows, columns in self.matrices.values())

    @cached_property
    def layer_weights(self) -> dict[int, tuple[StoredWeight, ...]]:
        """A layer's weights as a bundle stores them, by their bits."""
        shapes = self.matrices.values()
        return {bits: tuple(self._stored(bits, *shape) for shape in shapes) for bits in WEIGHT_BITS}

    @cached_property
    def head_weights(self) -> dict[int, tuple[StoredWeight, ...]]:
        """The head's weight, by its bits."""
        shape = self.arch.vocab_size, self.arch.d_model
        return {bits: (self._stored(bits, *shape),) for bits in WEIGHT_BITS}

    @cached_property
    def layer_bytes(self) -> dict[int, int]:
        """Stored bytes of one layer."""
        return {bits: sum(weight.bytes for weight in weights) for bits, weights in self.layer_weights.items()}

    def kv_bytes(self, layers: int, bits: int, positions: int) -> int:
        """Bytes of the KV cache of so many layers, as it is allocated."""
        return KVSpec(bits, self.arch.kv_heads, self.arch.head_dim).cache_bytes(layers, positions) if layers else 0

    def _stored(self, bits: int, rows: int, columns: int) -> StoredWeight:
        return StoredWeight(bits, self.block_size, Precision(bits, self.block_size).bytes_for(rows, columns))


def default_head_bits(layer_bits: int) -> int:
    """Bits of the head where none are asked for, by those of the layers before it."""
    return max(8, layer_bits)
