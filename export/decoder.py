"""The graphs of a Llama-like decoder: blocks of layers and the head.

Any cut of the layers into blocks computes the same bits. Two things make it so. The norm that opens a block
adds a zero (``x - x``) to its input, because onnxruntime's fused add-and-norm and its plain norm differ in the
last bit. And the attention always sees at least two rows, because its one-row path differs from all others: a
block with packed weights appends a dummy row inside the attention only, a block with float weights carries it
through, because the one-row float product differs too. The dummy row's keys and values land one row beyond the
valid ones, where the next step overwrites them; the cache keeps a spare row for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..quant.nbits import PACKED_BITS, PackedWeight, quantize_rtn
from ..runtime.bundle import Architecture
from .families.common import LayerTensors
from .graph import CONTRIB, GraphWriter
from .rope import rope_tables

ACCURACY_LEVEL = 4  # int8 activations inside MatMulNBits; every other level is several times slower on a CPU


@dataclass
class SegmentBuilder:
    """Writes one segment's graph at one weight precision.

    Attributes:
        tensors: bits that each weight got, for the manifest.
    """

    writer: GraphWriter
    arch: Architecture
    bits: int
    block_size: int
    tensors: dict[str, int] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether weights go through ``MatMulNBits``."""
        return self.bits in PACKED_BITS

    def linear(
        self,
        hidden: str,
        name: str,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32] | None = None,
        *,
        output: str | None = None,
    ) -> str:
        """``hidden @ weight.T + bias`` for a weight ``[N, K]``; returns the output's name."""
        self.tensors[name] = self.bits
        if self.packed:
            packed = quantize_rtn(weight, self.bits, self.block_size)
            return self._packed_linear(hidden, name, packed, bias, output)
        dtype = np.float16 if self.bits == 16 else np.float32
        stored = self.writer.weight(f"{name}.weight", weight.T.astype(dtype))
        if self.bits == 16:
            stored = self.writer.node("Cast", [stored], to=TensorProto.FLOAT)
        if bias is None:
            return self.writer.node("MatMul", [hidden, stored], output=output)
        product = self.writer.node("MatMul", [hidden, stored])
        return self.writer.node("Add", [product, self.writer.weight(f"{name}.bias", bias)], output=output)

    def _packed_linear(
        self,
        hidden: str,
        name: str,
        packed: PackedWeight,
        bias: NDArray[np.float32] | None,
        output: str | None,
    ) -> str:
        inputs = [
            hidden,
            self.writer.weight(f"{name}.codes", packed.codes),
            self.writer.weight(f"{name}.scales", packed.scales),
        ]
        if bias is not None:
            inputs += ["", "", self.writer.weight(f"{name}.bias", bias)]
        return self.writer.node(
            "MatMulNBits",
            inputs,
            output=output,
            domain=CONTRIB,
            K=packed.columns,
            N=packed.codes.shape[0],
            bits=packed.bits,
            block_size=packed.block_size,
            accuracy_level=ACCURACY_LEVEL,
        )

    def add_and_norm(self, hidden: str, branch: str, name: str, gamma: NDArray[np.float32]) -> tuple[str, str]:
        """Residual sum and its RMS norm; returns (normed, sum)."""
        normed, total = self.writer.fresh(f"{name}.normed"), self.writer.fresh(f"{name}.sum")
        self.writer.node_outputs(
            "SkipSimplifiedLayerNormalization",
            [hidden, branch, self.writer.weight(f"{name}.gamma", gamma)],
            [normed, "", "", total],
            domain=CONTRIB,
            epsilon=self.arch.norm_epsilon,
        )
        return normed, total

    def zero_like(self, hidden: str) -> str:
        """A zero of the hidden state's shape, the neutral branch of `add_and_norm`."""
        return self.writer.node("Sub", [hidden, hidden])

    def append_row(self, rows: str, width: int) -> str:
        """``[1, tokens, width]`` with one zero row after the last."""
        zero = self.writer.constant(f"zero_row.{width}", np.zeros((1, 1, width), np.float32))
        return self.writer.node("Concat", [rows, zero], axis=1)

    def drop_last_row(self, rows: str, output: str | None = None) -> str:
        """``[1, tokens, width]`` without its last row."""
        bounds = [
            self.writer.constant(name, np.array([value], np.int64))
            for name, value in (("row_start", 0), ("row_end", -1), ("row_axis", 1))
        ]
        return self.writer.node("Slice", [rows, *bounds], output=output)


Read = Callable[[str], NDArray[np.float32]]  # a checkpoint's tensor by name


def build_block(builder: SegmentBuilder, read: Read, layers: dict[int, LayerTensors], max_length: int) -> None:
    """Write the graph of consecutive layers.

    Inputs: ``hidden`` float32 ``[1, tokens, d_model]``; ``seqlens_k`` int32 ``[1]`` and
    ``total_sequence_length`` int32 scalar, both counting the dummy row (``length + tokens`` and one more);
    ``past_key.i`` and ``past_value.i`` float32 ``[1, kv_heads, capacity, head_dim]`` for each layer. Outputs:
    ``hidden_out`` like ``hidden``; ``present_key.i`` and ``present_value.i``, to be bound to the past's memory.
    """
    writer, arch = builder.writer, builder.arch
    cache_shape: list[int | str] = [1, arch.kv_heads, "capacity", arch.head_dim]
    residual = writer.input("hidden", [1, "tokens", arch.d_model])
    writer.input("seqlens_k", [1], TensorProto.INT32)
    writer.input("total_sequence_length", [], TensorProto.INT32)
    for table, values in zip(("cos", "sin"), rope_tables(arch, max_length + 1), strict=True):
        writer.weight(table, values)
    if not builder.packed:
        residual = builder.append_row(residual, arch.d_model)
    branch = builder.zero_like(residual)
    for layer, names in layers.items():
        for side in ("key", "value"):
            writer.input(f"past_{side}.{layer}", cache_shape)
            writer.output(f"present_{side}.{layer}", cache_shape)
        branch, residual = _layer(builder, layer, names, read, residual, branch)
    if builder.packed:
        writer.node("Add", [residual, branch], output="hidden_out")
    else:
        builder.drop_last_row(writer.node("Add", [residual, branch]), output="hidden_out")
    writer.output("hidden_out", [1, "tokens", arch.d_model])
    writer.save()


def _layer(
    builder: SegmentBuilder, layer: int, names: LayerTensors, read: Read, residual: str, branch: str
) -> tuple[str, str]:
    """Attention and gated MLP; takes and gives (last branch, residual before that branch is added)."""
    writer, prefix = builder.writer, f"layers.{layer}"
    normed, residual = builder.add_and_norm(residual, branch, f"{prefix}.input_norm", read(names.input_norm))
    qkv = builder.linear(
        normed,
        f"{prefix}.qkv",
        np.concatenate([read(name) for name in (names.query, names.key, names.value)]),
        np.concatenate([read(name) for name in names.qkv_biases]) if names.qkv_biases else None,
    )
    attended = _attention(builder, layer, qkv)
    branch = builder.linear(attended, f"{prefix}.attention_output", read(names.attention_output))
    normed, residual = builder.add_and_norm(residual, branch, f"{prefix}.post_norm", read(names.post_norm))
    gate = builder.linear(normed, f"{prefix}.gate", read(names.gate))
    up = builder.linear(normed, f"{prefix}.up", read(names.up))
    activated = writer.node("QuickGelu", [gate], domain=CONTRIB, alpha=1.0)  # x * sigmoid(x): silu in one kernel
    gated = writer.node("Mul", [activated, up])
    return builder.linear(gated, f"{prefix}.down", read(names.down)), residual


def _attention(builder: SegmentBuilder, layer: int, qkv: str) -> str:
    writer, arch = builder.writer, builder.arch
    if builder.packed:
        qkv = builder.append_row(qkv, (arch.heads + 2 * arch.kv_heads) * arch.head_dim)
    attributes = {"local_window_size": arch.sliding_window} if arch.sliding_window else {}
    attended, _, _ = writer.node_outputs(
        "GroupQueryAttention",
        [
            *(qkv, "", "", f"past_key.{layer}", f"past_value.{layer}"),
            *("seqlens_k", "total_sequence_length", "cos", "sin"),
        ],
        [writer.fresh("attended"), f"present_key.{layer}", f"present_value.{layer}"],
        domain=CONTRIB,
        num_heads=arch.heads,
        kv_num_heads=arch.kv_heads,
        do_rotary=1,
        **attributes,
    )
    return builder.drop_last_row(attended) if builder.packed else attended


def build_head(builder: SegmentBuilder, norm: NDArray[np.float32], weight: NDArray[np.float32]) -> None:
    """Write the graph of the final norm and the vocabulary: ``hidden`` -> ``logits`` ``[1, tokens, vocab_size]``."""
    writer, arch = builder.writer, builder.arch
    hidden = writer.input("hidden", [1, "tokens", arch.d_model])
    if not builder.packed:
        hidden = builder.append_row(hidden, arch.d_model)
    normed, _ = builder.add_and_norm(hidden, builder.zero_like(hidden), "final_norm", norm)
    if builder.packed:
        builder.linear(normed, "head", weight, output="logits")
    else:
        builder.drop_last_row(builder.linear(normed, "head", weight), output="logits")
    writer.output("logits", [1, "tokens", arch.vocab_size])
    writer.save()
