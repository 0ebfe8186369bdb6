"""Quantized GGUF tensors pass into the operator's layout without being rounded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime as ort
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from isthmus.devices.row_rule import row_rule
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.decoder import SegmentBuilder
from isthmus.export.gguf_blocks import pack_blocks, parse_blocks
from isthmus.export.graph import GraphWriter
from isthmus.export.weights import Weights, copies
from isthmus.quant.nbits import PackedWeight, dequantize
from isthmus.quant.offsets import OffsetWeight, dequantize_offsets
from isthmus.quant.opsc import Precision, Recipe

RNG = np.random.default_rng(4)
KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]


def stored(kind: Kind, rows: int = 24, columns: int = 96) -> np.ndarray:
    return gguf.quantize(RNG.standard_normal((rows, columns), np.float32), kind)


def values(packed: PackedWeight | OffsetWeight) -> np.ndarray:
    return dequantize_offsets(packed) if isinstance(packed, OffsetWeight) else dequantize(packed)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_every_value_is_kept_bit_for_bit(kind: Kind) -> None:
    raw = stored(kind)
    assert np.array_equal(values(pack_blocks([parse_blocks(raw, kind)])), gguf.dequantize(raw, kind))


def test_blocks_with_offsets_are_kept_but_for_the_offsets_last_digit() -> None:
    raw = stored(Kind.Q4_1)
    exact = gguf.dequantize(raw, Kind.Q4_1)
    error = values(pack_blocks([parse_blocks(raw, Kind.Q4_1)])) - exact
    assert np.sqrt(np.square(error).mean()) < 0.005 * exact.std()


def test_tensors_are_stacked_in_order() -> None:
    raws = [stored(Kind.Q4_0, rows) for rows in (8, 16)]
    stacked = values(pack_blocks([parse_blocks(raw, Kind.Q4_0) for raw in raws]))
    assert np.array_equal(stacked, np.concatenate([gguf.dequantize(raw, Kind.Q4_0) for raw in raws]))


@pytest.fixture
def quantized_gguf(tmp_path: Path, source_tiny_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a tiny file whose matrices have a type."""
    add = gguf.GGUFWriter.add_tensor

    def write(architecture: str, kinds: Kind | dict[str, Kind]) -> Path:
        def quantized(writer: Any, name: str, tensor: np.ndarray, **options: Any) -> None:
            kind = kinds if isinstance(kinds, Kind) else next(kind for part, kind in kinds.items() if part in name)
            if tensor.ndim == 2:
                add(writer, name, gguf.quantize(tensor, kind), raw_dtype=kind)
            else:
                add(writer, name, tensor, **options)

        monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", quantized)
        return source_tiny_gguf(architecture).write(tmp_path / "tiny.gguf")

    return write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_checkpoint_s_blocks_have_its_tensors_row_order(quantized_gguf: Any, architecture: str, kind: Kind) -> None:
    checkpoint = open_checkpoint(quantized_gguf(architecture, kind))
    for name in checkpoint.names():
        if len(checkpoint.shape(name)) == 2:
            copied = values(pack_blocks([checkpoint.blocks(name)]))
            np.testing.assert_allclose(copied, checkpoint.tensor(name), atol=0.02 if kind == Kind.Q4_1 else 0)


@pytest.mark.parametrize(
    ("kind", "bits", "block_size", "copied"),
    [
        (Kind.Q4_0, 4, 32, True),
        (Kind.Q4_1, 4, 32, True),
        (Kind.Q8_0, 8, 32, True),
        (Kind.Q4_0, 8, 32, False),
        (Kind.Q4_0, 4, 16, False),
        (Kind.Q8_0, 4, 32, False),
        (Kind.Q5_0, 4, 32, False),
        (Kind.F16, 4, 32, False),
    ],
)
def test_blocks_are_copied_where_they_fit_the_recipe(
    quantized_gguf: Any, kind: Kind, bits: int, block_size: int, copied: bool
) -> None:
    checkpoint = open_checkpoint(quantized_gguf("llama", kind))
    recipe = Recipe(1, 1, bits, bits, bits, bits, block_size)
    tensors = {
        "layers.0.qkv": [f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkv"],
        "head": ["model.embed_tokens.weight"],
    }
    recipe = replace(recipe, exceptions=copies(recipe, checkpoint, tensors))
    weights = Weights(checkpoint, recipe.precision)
    packed, record = weights.packed("layers.0.qkv", tensors["layers.0.qkv"])
    assert (record.method, record.bits, record.block_size) == ("copied" if copied else "rtn", bits, block_size)
    assert record.symmetric == (kind != Kind.Q4_1)
    inner = packed.packed if isinstance(packed, OffsetWeight) else packed
    assert record.bytes == inner.nbytes
    tolerance = (0.02 if kind == Kind.Q4_1 else 0) if copied else 0.5
    np.testing.assert_allclose(values(packed), weights.read(tensors["layers.0.qkv"]), atol=tolerance)
    table, record = weights.packed_table("head", tensors["head"][0])
    assert isinstance(table, PackedWeight)
    assert (record.method == "copied") == (copied and kind != Kind.Q4_1)


def test_tensors_of_different_types_are_not_copied_together(quantized_gguf: Any) -> None:
    checkpoint = open_checkpoint(quantized_gguf("llama", {"attn_v": Kind.Q8_0, "": Kind.Q4_0}))
    recipe = Recipe(1, 1, 4, 4, 4, 4, 32)
    tensors = {
        "layers.0.qkv": [f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkv"],
        "layers.0.up": ["model.layers.0.mlp.up_proj.weight"],
    }
    assert list(copies(recipe, checkpoint, tensors)) == ["layers.0.up"]


def test_the_graph_multiplies_with_offsets_and_keeps_a_row_s_bits(quantized_gguf: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized_gguf("llama", Kind.Q4_1))
    weights = Weights(checkpoint, lambda name: Precision(4, 32, "copied", symmetric=False))
    writer = GraphWriter(tmp_path, "products")
    builder = SegmentBuilder(writer, None, weights)  # type: ignore[arg-type]
    hidden = writer.input("hidden", [1, "tokens", 32])
    for role in ("gate", "up"):
        builder.linear(hidden, f"layers.0.{role}", [f"model.layers.0.mlp.{role}_proj.weight"], output=role)
        writer.output(role, [1, "tokens", 64])
    writer.save()
    session = ort.InferenceSession(writer.graph_path, providers=["CPUExecutionProvider"])
    inputs = RNG.standard_normal((1, 9, 32), np.float32)
    results = session.run(None, {"hidden": inputs})
    for role, result in zip(("gate", "up"), results, strict=True):
        expected = inputs @ checkpoint.tensor(f"model.layers.0.mlp.{role}_proj.weight").T
        # Inputs are rounded to 127 steps of their largest, 2 to 3 here.
        assert np.abs(result - expected).max() < 0.02 * np.abs(expected).max()
    rule = row_rule([(4, 32)])
    for tokens in sorted({rule.fill(tokens) for tokens in (1, 2, 3, 8)}):
        part = session.run(None, {"hidden": inputs[:, :tokens]})
        assert all(np.array_equal(p, whole[:, :tokens]) for p, whole in zip(part, results, strict=True))
