"""The graphs of a Llama-like decoder: blocks of layers and the head.

Any cut of the layers into blocks computes the same bits. Two things make it so. The norm that opens a block
adds a zero (``x - x``) to its input, because onnxruntime's fused add-and-norm and its plain norm differ in the
last bit. And the attention always sees at least two rows, because its one-row path differs from all others: it gets
the tokens and one dummy row, whose keys and values land one row beyond the valid ones, where the next step
overwrites them; the cache keeps a spare row for that. What numbers of rows matrix products need is the processor's
matter, and so the runtime's (`isthmus.devices.row_rule`).

A server's block has a second graph over the same weights, the `RAGGED` variant, in which sequences advance together,
each by rows of its own number over a past of its own length. The rows of all lie packed in one matrix; only the
attention sees them by sequence, padded to the longest, with a dummy row behind each sequence's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..quant.kv import KVScales
from ..quant.nbits import PackedWeight
from ..quant.offsets import OffsetWeight, block_summing_weight
from ..runtime.bundle import FFN_SIMILARITY, SPARE_ROWS, Architecture, KVSpec, TensorRecord
from .families.common import LayerTensors
from .feed_forward import SkippableNetworks, feed_forward
from .graph import CONTRIB, PLAIN, GraphWriter
from .rope import rope_tables
from .weights import Weights

CACHE_TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
RAGGED = "ragged"  # name of the variant, see `build_block`
ACCURACY_LEVEL = 4  # int8 activations inside MatMulNBits; every other level is several times slower on a CPU


@dataclass
class SegmentBuilder:
    """Writes one segment's graph.

    Attributes:
        batched: many sequences advance together by one token each, where export calibrates: the graph's first dimension
            is free, and there is no dummy row, because nothing there needs the same bits in every chunk.
        ragged: whether a block gets its `RAGGED` variant, too.
        tensors: how each was stored, for the manifest.
    """

    writer: GraphWriter
    arch: Architecture
    weights: Weights
    batched: bool = False
    ragged: bool = False
    tensors: dict[str, TensorRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._summed: dict[str, str] = {}

    @property
    def batch(self) -> int | str:
        """First dimension of every input and output but the total length."""
        return "batch" if self.batched else 1

    def linear(
        self,
        hidden: str,
        name: str,
        tensors: Sequence[str],
        bias: NDArray[np.float32] | None = None,
        *,
        output: str | None = None,
    ) -> str:
        """``hidden @ weight.T + bias`` for a weight ``[N, K]``, stacked from tensors; returns the output's name."""
        precision = self.weights.precision(name)
        if precision.packed:
            stored, self.tensors[name] = self.weights.packed(name, tensors)
            if isinstance(stored, OffsetWeight):
                hidden, stored = self._with_block_sums(hidden, stored), stored.packed
            return self._packed_linear(hidden, name, stored, bias, output)
        weight = self.weights.read(tensors)
        dtype = np.float16 if precision.bits == 16 else np.float32
        self.tensors[name] = TensorRecord(precision.bits, 0, "float", True, weight.size * precision.bits // 8)
        values = self.writer.weight(f"{name}.weight", weight.T.astype(dtype))
        if precision.bits == 16:
            values = self.writer.node("Cast", [values], to=TensorProto.FLOAT)
        if bias is None:
            return self.writer.node("MatMul", [hidden, values], output=output)
        product = self.writer.node("MatMul", [hidden, values])
        return self.writer.node("Add", [product, self.writer.weight(f"{name}.bias", bias)], output=output)

    def _packed_linear(
        self,
        hidden: str,
        name: str,
        packed: PackedWeight,
        bias: NDArray[np.float32] | None = None,
        output: str | None = None,
    ) -> str:
        # In the data file whatever their size: the embedding may be read from there.
        inputs = [hidden]
        for part, array in packed.arrays().items():
            inputs.append(self.writer.constant(f"{name}.{part}", array, external=True))
        if bias is not None:
            inputs += [""] * (5 - len(inputs)) + [self.writer.weight(f"{name}.bias", bias)]
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

    def _with_block_sums(self, hidden: str, weight: OffsetWeight) -> str:
        """The input of an `OffsetWeight`, made once for all weights with that input."""
        if hidden not in self._summed:
            summing = block_summing_weight(weight.columns, weight.sums, weight.packed.block_size)
            sums = self._packed_linear(hidden, f"sums.{weight.columns}", summing)
            self._summed[hidden] = self.writer.node("Concat", [hidden, sums], axis=2)
        return self._summed[hidden]

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

    def rows_to_attend(self, qkv: str) -> str:
        """The rows ``[1, tokens, width]`` and the dummy row."""
        if self.batched:
            return qkv
        width = (self.arch.heads + 2 * self.arch.kv_heads) * self.arch.head_dim
        zero = self.writer.constant(f"zeros.{width}", np.zeros((1, 1, width), np.float32))
        return self.writer.node("Concat", [qkv, zero], axis=1)

    def rows_attended(self, attended: str) -> str:
        """Undo `rows_to_attend`."""
        if self.batched:
            return attended
        bounds = {"zero": 0, "minus_one": -1, "one": 1}
        return self.writer.node(
            "Slice", [attended, *(self.writer.constant(name, np.array([n], np.int64)) for name, n in bounds.items())]
        )

    def rows_by_sequence(self, qkv: str) -> str:
        """Packed rows ``[1, rows, width]`` as ``[sequences, queries, width]``, padding and dummies included."""
        width = (self.arch.heads + 2 * self.arch.kv_heads) * self.arch.head_dim
        rows = self._unstack(qkv, width)
        return self.writer.shape(
            self.writer.node("Gather", [rows, "packed_rows"], axis=0), ["sequences", "queries", width]
        )

    def rows_packed(self, attended: str, output: str) -> str:
        """Undo `rows_by_sequence`."""
        width = self.arch.heads * self.arch.head_dim
        rows = self._unstack(attended, width)
        return self.writer.node("Gather", [rows, "padded_rows"], output=output, axis=0)

    def _unstack(self, rows: str, width: int) -> str:
        """``[..., width]`` as ``[rows, width]``."""
        shape = self.writer.constant(f"rows.{width}", np.array([-1, width], np.int64))
        return self.writer.node("Reshape", [rows, shape])


def build_block(
    builder: SegmentBuilder,
    layers: dict[int, LayerTensors],
    max_length: int,
    kv: KVSpec,
    kv_scales: Mapping[int, KVScales],
    *,
    input_map: str | None = None,
    skippable: range = range(0),
) -> None:
    """Write the graph of consecutive layers.

    Inputs: ``hidden`` float32 ``[1, tokens, d_model]``; ``seqlens_k`` int32 ``[1]`` and
    ``total_sequence_length`` int32 scalar, both counting the dummy row (``length + tokens`` and one more), where there
    is one (in a batched graph 1 is ``batch``, and they are one less);
    ``past_key.i`` and ``past_value.i`` in ``kv``'s layout for each layer. Outputs: ``hidden_out`` like ``hidden``;
    ``present_key.i`` and ``present_value.i``, to be bound to the past's memory.

    In the ragged variant ``hidden`` and ``hidden_out`` hold the rows of all sequences, one sequence after the other
    (``[1, rows, d_model]``), ``seqlens_k`` and the caches have ``sequences`` in place of 1, and
    ``total_sequence_length`` is the greatest of all. Further inputs: ``query_seqlens`` int32 ``[sequences]``, the
    number of each sequence's rows with the dummy counted, 0 for a sequence that rests; ``packed_rows`` int64
    ``[sequences, queries]``, which row of ``hidden`` stands at each place of the padded layout (any may stand for a
    dummy or padding); ``padded_rows`` int64 ``[1, rows]``, the flattened place of each row of ``hidden``.

    Args:
        builder: of the segment.
        layers: the checkpoint's names of each layer's tensors.
        max_length: most positions that a token can have.
        kv: layout of the KV cache.
        kv_scales: of each layer, if the cache is quantized.
        input_map: name of a square matrix that hidden states pass before the first layer, as a draft's do.
        skippable: layers whose networks rows may leave out, see `isthmus.export.feed_forward`. Then there is a further
            input: ``ffn_similarity`` float32 ``[1, tokens, 1]``, each row's threshold.
    """
    writer, arch = builder.writer, builder.arch
    residual = writer.input("hidden", [builder.batch, "tokens", arch.d_model])
    writer.input("total_sequence_length", [], TensorProto.INT32)
    with writer.only(PLAIN):
        writer.input("seqlens_k", [builder.batch], TensorProto.INT32)
    if builder.ragged:
        with writer.only(RAGGED):
            for lengths in ("seqlens_k", "query_seqlens"):
                writer.input(lengths, ["sequences"], TensorProto.INT32)
            writer.input("packed_rows", ["sequences", "queries"], TensorProto.INT64)
            writer.input("padded_rows", [1, "tokens"], TensorProto.INT64)
    for table, values in zip(("cos", "sin"), rope_tables(arch, max_length + SPARE_ROWS), strict=True):
        writer.weight(table, values)
    if input_map is not None:
        residual = builder.linear(residual, input_map, [input_map])
    branch = builder.zero_like(residual)
    networks = None
    if skippable:
        similarity = writer.input(FFN_SIMILARITY, [builder.batch, "tokens", 1])
        networks = SkippableNetworks(builder, branch, similarity, skippable)
    for layer, names in layers.items():
        _cache(builder, layer, kv)
        branch, residual = _layer(builder, layer, names, residual, branch, kv_scales.get(layer), networks)
    writer.node("Add", [residual, branch], output="hidden_out")
    writer.output("hidden_out", [builder.batch, "tokens", arch.d_model])
    writer.save()


def _cache(builder: SegmentBuilder, layer: int, kv: KVSpec) -> None:
    """Declare a layer's keys and values, as input and as output."""
    for variant, sequences in ((PLAIN, builder.batch), (RAGGED, "sequences"))[: 1 + builder.ragged]:
        with builder.writer.only(variant):
            for side in ("key", "value"):
                shape: list[int | str] = [sequences, kv.kv_heads, "capacity", kv.row_width]
                builder.writer.input(f"past_{side}.{layer}", shape, CACHE_TYPES[kv.dtype])
                builder.writer.output(f"present_{side}.{layer}", shape, CACHE_TYPES[kv.dtype])


def _layer(
    builder: SegmentBuilder,
    layer: int,
    names: LayerTensors,
    residual: str,
    branch: str,
    kv_scales: KVScales | None = None,
    networks: SkippableNetworks | None = None,
) -> tuple[str, str]:
    """Attention and feed-forward network; takes and gives (last branch, residual before that branch is added)."""
    prefix, read = f"layers.{layer}", builder.weights.read
    normed, residual = builder.add_and_norm(residual, branch, f"{prefix}.input_norm", read([names.input_norm]))
    if networks is not None:
        networks.enter(layer, residual)
    qkv = builder.linear(
        normed,
        f"{prefix}.qkv",
        (names.query, names.key, names.value),
        read(names.qkv_biases) if names.qkv_biases else None,
    )
    attended = _attention(builder, layer, qkv, kv_scales)
    branch = builder.linear(attended, f"{prefix}.attention_output", (names.attention_output,))
    normed, residual = builder.add_and_norm(residual, branch, f"{prefix}.post_norm", read([names.post_norm]))

    def network() -> str:
        return feed_forward(builder, layer, names, normed)

    return (network() if networks is None else networks.branch(layer, residual, network)), residual


def _attention(builder: SegmentBuilder, layer: int, qkv: str, kv_scales: KVScales | None) -> str:
    writer, arch = builder.writer, builder.arch
    attributes: dict[str, int | str] = {"local_window_size": arch.sliding_window} if arch.sliding_window else {}
    scales: list[str] = []
    if kv_scales is not None:
        # Keys are quantized after their rotation, and a chunk attends to its own keys as they are stored: so the bits
        # do not depend on the chunk.
        attributes |= {
            "kv_cache_bit_width": kv_scales.bits,
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
        }
        shape = (1, arch.kv_heads, 1, arch.head_dim)
        scales = [
            *("", "", ""),
            writer.weight(f"layers.{layer}.key_scale", kv_scales.key.reshape(shape)),
            writer.weight(f"layers.{layer}.value_scale", kv_scales.value.reshape(shape)),
        ]

    def attend(rows: str, *query_seqlens: str) -> str:
        inputs = [
            *(rows, "", "", f"past_key.{layer}", f"past_value.{layer}"),
            *("seqlens_k", "total_sequence_length", "cos", "sin"),
            *scales,
        ]
        if query_seqlens:
            inputs += [""] * (16 - len(inputs)) + [*query_seqlens]
        attended, _, _ = writer.node_outputs(
            "GroupQueryAttention",
            inputs,
            [writer.fresh("attended"), f"present_key.{layer}", f"present_value.{layer}"],
            domain=CONTRIB,
            num_heads=arch.heads,
            kv_num_heads=arch.kv_heads,
            do_rotary=1,
            **attributes,
        )
        return attended

    with writer.only(PLAIN):
        attended = builder.rows_attended(attend(builder.rows_to_attend(qkv)))
    if builder.ragged:
        with writer.only(RAGGED):
            builder.rows_packed(attend(builder.rows_by_sequence(qkv), "query_seqlens"), output=attended)
    return attended


def build_head(builder: SegmentBuilder, norm: str, weight: str) -> None:
    """Write the graph of the final norm and the vocabulary: ``hidden`` -> ``logits`` ``[1, tokens, vocab_size]``.

    Args:
        builder: of this segment.
        norm: the checkpoint's name of the norm.
        weight: of the vocabulary's matrix.
    """
    writer, arch = builder.writer, builder.arch
    hidden = writer.input("hidden", [builder.batch, "tokens", arch.d_model])
    gamma = builder.weights.read([norm])
    normed, _ = builder.add_and_norm(hidden, builder.zero_like(hidden), "final_norm", gamma)
    builder.linear(normed, "head", [weight], output="logits")
    writer.output("logits", [builder.batch, "tokens", arch.vocab_size])
    writer.save()
