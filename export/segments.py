"""Writing a bundle's segments: the embedding table, the blocks of layers, the head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quant.nbits import PACKED_BITS, quantize_rtn
from ..quant.opsc import Recipe
from ..runtime.bundle import Architecture, Half, Segment
from .checkpoint import Checkpoint
from .decoder import SegmentBuilder, build_block, build_head
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .graph import ALIGNMENT, GraphWriter
from .progress import Progress


@dataclass(frozen=True)
class SegmentWriter:
    """Writes the segments of one export below ``root/device`` and ``root/server``."""

    root: Path
    checkpoint: Checkpoint
    family: ModuleType
    arch: Architecture
    recipe: Recipe
    layers_per_block: int
    max_length: int

    def write(self, progress: Progress) -> list[Segment]:
        """Write every segment; one weight, or one stacked pair, is in memory at a time."""
        for half in ("device", "server") if self.recipe.split < self.recipe.layers else ("device",):
            (self.root / half).mkdir()
        blocks = self._block_ranges()
        steps = len(blocks) + 2
        segments = []
        for index, (half, layers) in enumerate(blocks):
            progress(f"layers {layers.start}–{layers.stop - 1}", index, steps)
            segments.append(self._block(half, layers))
        progress("head", steps - 2, steps)
        head = self._head()
        progress("embedding", steps - 1, steps)
        embedding = self._embedding(head)
        progress("segments written", steps, steps)
        return [embedding, *segments, head]

    def _block_ranges(self) -> list[tuple[Half, range]]:
        """Halves cut into runs of at most ``layers_per_block``; a block never crosses the split."""
        split, layers = self.recipe.split, self.recipe.layers
        halves: list[tuple[Half, range]] = [("device", range(split)), ("server", range(split, layers))]
        return [
            (half, range(first, min(first + self.layers_per_block, span.stop)))
            for half, span in halves
            for first in range(span.start, span.stop, self.layers_per_block)
        ]

    def _block(self, half: Half, layers: range) -> Segment:
        bits = self.recipe.layer_bits(layers.start)
        name = f"block-{layers.start:02d}-{layers.stop - 1:02d}"
        writer = GraphWriter(self.root / half, name)
        builder = SegmentBuilder(writer, self.arch, bits, self.recipe.block_size)
        names = {layer: self.family.tensors(self.arch, layer) for layer in layers}
        build_block(builder, self.checkpoint.tensor, names, self.max_length)
        return self._segment("block", half, builder, first_layer=layers.start, last_layer=layers.stop)

    def _head(self) -> Segment:
        half: Half = "device" if self.recipe.split == self.recipe.layers else "server"
        writer = GraphWriter(self.root / half, "head")
        builder = SegmentBuilder(writer, self.arch, self.recipe.head_bits, self.recipe.block_size)
        build_head(builder, self.checkpoint.tensor(FINAL_NORM), self.checkpoint.tensor(self._head_tensor()))
        offsets = {
            "codes_offset": writer.offsets.get("head.codes", 0),
            "scales_offset": writer.offsets.get("head.scales", 0),
        }
        return self._segment("head", half, builder, **offsets)

    def _head_tensor(self) -> str:
        return EMBEDDING if self.arch.tied_embeddings else HEAD

    def _embedding(self, head: Segment) -> Segment:
        """The embedding table, or a pointer into the head's file where both are the same packed bytes."""
        recipe = self.recipe
        shared = self.arch.tied_embeddings and head.half == "device" and recipe.embed_bits == recipe.head_bits
        common: dict[str, Any] = {
            "name": "embed",
            "kind": "embed",
            "half": "device",
            "bits": recipe.embed_bits,
            "block_size": recipe.block_size,
            "tensors": {"embedding": recipe.embed_bits},
        }
        if shared and recipe.embed_bits in PACKED_BITS:
            return Segment(
                data_file=head.data_file,
                codes_offset=head.codes_offset,
                scales_offset=head.scales_offset,
                **common,
            )
        with (self.root / "device" / "embed.data").open("wb") as file:
            codes, scales = self._embedding_arrays(self.checkpoint.tensor(EMBEDDING))
            file.write(codes.data)
            scales_offset = -(-codes.nbytes // ALIGNMENT) * ALIGNMENT
            if scales is not None:
                file.seek(scales_offset)
                file.write(scales.data)
        return Segment(data_file="embed.data", scales_offset=scales_offset, **common)

    def _embedding_arrays(self, table: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        if self.recipe.embed_bits in PACKED_BITS:
            packed = quantize_rtn(table, self.recipe.embed_bits, self.recipe.block_size)
            return packed.codes, packed.scales
        return np.ascontiguousarray(table, np.float16 if self.recipe.embed_bits == 16 else np.float32), None

    def _segment(self, kind: Any, half: Half, builder: SegmentBuilder, **fields: int) -> Segment:
        writer = builder.writer
        return Segment(
            name=writer.graph_path.stem,
            kind=kind,
            half=half,
            bits=builder.bits,
            block_size=builder.block_size,
            graph_file=writer.graph_path.name,
            data_file=writer.data_path.name,
            tensors=builder.tensors,
            **fields,
        )
