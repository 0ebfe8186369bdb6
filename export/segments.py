"""Writing a bundle's segments: the embedding table, the blocks of layers, the head."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quant.kv import KVScales
from ..quant.opsc import Recipe
from ..runtime.bundle import Architecture, Half, KVSpec, Segment, TensorRecord
from .decoder import RAGGED, SegmentBuilder, build_block, build_head
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .feed_forward import skippable_layers
from .graph import ALIGNMENT, GraphWriter
from .progress import Progress
from .weights import Weights


def block_ranges(split: int, layers: int, layers_per_block: int) -> list[tuple[Half, range]]:
    """Halves cut into runs of at most ``layers_per_block``; a block never crosses the split."""
    halves: list[tuple[Half, range]] = [("device", range(split)), ("server", range(split, layers))]
    return [
        (half, range(first, min(first + layers_per_block, span.stop)))
        for half, span in halves
        for first in range(span.start, span.stop, layers_per_block)
    ]


@dataclass(frozen=True)
class SegmentWriter:
    """Writes the segments of one export below ``root/device`` and ``root/server``."""

    root: Path
    weights: Weights
    family: ModuleType
    arch: Architecture
    recipe: Recipe
    layers_per_block: int
    max_length: int
    kv_scales: Mapping[int, KVScales] = field(default_factory=dict)
    whole_on_device: bool = False
    ffn_skip: bool = False

    def write(self, progress: Progress) -> list[Segment]:
        """Write every segment; one weight, or one stacked pair, is in memory at a time.

        With ``whole_on_device`` the device half gets copies of what the server half has.
        """
        for half in ("device", "server") if self.recipe.split < self.recipe.layers else ("device",):
            (self.root / half).mkdir()
        blocks = block_ranges(self.recipe.split, self.recipe.layers, self.layers_per_block)
        steps = len(blocks) + 2
        segments = []
        for index, (half, layers) in enumerate(blocks):
            progress(f"layers {layers.start}–{layers.stop - 1}", index, steps)
            segments.append(self._block(half, layers))
        progress("head", steps - 2, steps)
        head = self._head()
        if self.whole_on_device and head.half == "server":
            for path in sorted((self.root / "server").iterdir()):
                shutil.copyfile(path, self.root / "device" / path.name)
        progress("embedding", steps - 1, steps)
        embedding = self._embedding(head)
        progress("segments written", steps, steps)
        return [embedding, *segments, head]

    def _block(self, half: Half, layers: range) -> Segment:
        name = f"block-{layers.start:02d}-{layers.stop - 1:02d}"
        writer = GraphWriter(self.root / half, name)
        ragged = half == "server"  # where sessions of many devices meet
        builder = SegmentBuilder(writer, self.arch, self.weights, ragged=ragged)
        names = {layer: self.family.tensors(self.arch, layer) for layer in layers}
        kv = KVSpec(self.recipe.kv_bits(layers.start), self.arch.kv_heads, self.arch.head_dim)
        skippable = skippable_layers(layers, self.arch.layers) if self.ffn_skip else range(0)
        build_block(builder, names, self.max_length, kv, self.kv_scales, skippable=skippable)
        bits = self.recipe.layer_bits(layers.start)
        return self._segment(
            "block",
            half,
            bits,
            builder,
            first_layer=layers.start,
            last_layer=layers.stop,
            ragged_graph_file=writer.variant_path(RAGGED).name if ragged else "",
            skips_ffn=bool(skippable),
        )

    def _head(self) -> Segment:
        half: Half = "device" if self.recipe.split == self.recipe.layers else "server"
        writer = GraphWriter(self.root / half, "head")
        builder = SegmentBuilder(writer, self.arch, self.weights)
        build_head(builder, FINAL_NORM, EMBEDDING if self.arch.tied_embeddings else HEAD)
        offsets = {
            f"{part}_offset": writer.offsets.get(f"head.{part}", 0) for part in ("codes", "scales", "zero_points")
        }
        return self._segment("head", half, self.recipe.head_bits, builder, **offsets)

    def _embedding(self, head: Segment) -> Segment:
        """The embedding table, or a pointer into the head's file where both are the same packed bytes."""
        recipe = self.recipe
        half: Half = "device" if recipe.split else "server"
        head_is_near = head.half == half or self.whole_on_device
        shared = self.arch.tied_embeddings and head_is_near and recipe.embed_bits == recipe.head_bits
        common: dict[str, Any] = {
            "name": "embed",
            "kind": "embed",
            "half": half,
            "bits": recipe.embed_bits,
            "block_size": recipe.block_size,
        }
        if shared and recipe.precision("embedding").packed:
            return Segment(
                data_file=head.data_file,
                codes_offset=head.codes_offset,
                scales_offset=head.scales_offset,
                zero_points_offset=head.zero_points_offset,
                tensors={"embedding": head.tensors["head"]},
                **common,
            )
        offsets = []
        with (self.root / half / "embed.data").open("wb") as file:
            arrays, stored = self._embedding_arrays()
            for array in arrays:
                file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                offsets.append(file.tell())
                file.write(array.data)
        _, scales_offset, zero_points_offset = (*offsets, 0, 0)[:3]
        return Segment(
            data_file="embed.data",
            scales_offset=scales_offset,
            zero_points_offset=zero_points_offset,
            tensors={"embedding": stored},
            **common,
        )

    def _embedding_arrays(self) -> tuple[list[NDArray[Any]], TensorRecord]:
        """What is written of the table: codes, scales and perhaps zero points, or floats."""
        precision = self.recipe.precision("embedding")
        if precision.packed:
            packed, stored = self.weights.packed_table("embedding", EMBEDDING)
            return list(packed.arrays().values()), stored
        dtype = np.float16 if precision.bits == 16 else np.float32
        table = np.ascontiguousarray(self.weights.read([EMBEDDING]), dtype)
        return [table], TensorRecord(precision.bits, 0, "float", True, table.nbytes)

    def _segment(self, kind: Any, half: Half, bits: int, builder: SegmentBuilder, **fields: Any) -> Segment:
        writer = builder.writer
        return Segment(
            name=writer.graph_path.stem,
            kind=kind,
            half=half,
            bits=bits,
            block_size=self.recipe.block_size,
            graph_file=writer.graph_path.name,
            data_file=writer.data_path.name,
            tensors=builder.tensors,
            **fields,
        )
