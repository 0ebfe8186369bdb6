"""Writing a draft into a device half: its layer and its head as graphs, its vocabulary, and the record of both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ExportError
from ..quant.opsc import Precision
from ..runtime.bundle import FileEntry, KVSpec, Manifest, Segment
from ..runtime.draft_bundle import DRAFT_FOLDER, DRAFT_RECORD, DRAFT_SCHEMA, VOCABULARY, DraftRecord
from ..runtime.exits import ExitCurve
from .decoder import SegmentBuilder, build_block, build_head
from .draft_costs import BLOCK_SIZE, MAP, OTHERS
from .families.common import LayerTensors
from .graph import GraphWriter
from .weights import Weights

Floats = NDArray[np.float32]

# The names of `isthmus.export.draft_model.DraftModel` are those of the tensors.
_TENSORS = LayerTensors(*("input_norm", "query", "key", "value", "attention_output", "post_norm", "gate", "up", "down"))


@dataclass(frozen=True)
class _Arrays:
    """Weights in memory, in the part of a checkpoint that `Weights` reads."""

    arrays: Mapping[str, Floats]

    def tensor(self, name: str) -> Floats:
        """One of them."""
        return self.arrays[name]


def write_draft(
    device: Path,
    manifest: Manifest,
    weights: Mapping[str, Floats],
    vocabulary: NDArray[np.int64],
    training: dict[str, Any],
    exits: ExitCurve | None = None,
    *,
    bits: int | None = None,
) -> DraftRecord:
    """Write ``draft`` below a device half, in place of the one that may be there.

    Args:
        device: folder of the device half.
        manifest: of the bundle.
        weights: of a `isthmus.export.draft_model.DraftModel`.
        vocabulary: rising, the id of each row of ``head``.
        training: for the record.
        exits: for the record, if it was measured.
        bits: of all weights; by default as `MAP` and `OTHERS` say.

    Raises:
        ExportError: the folder cannot be written; what was there stays.
    """
    return _staged(device / DRAFT_FOLDER, partial(_write, manifest, weights, vocabulary, training, exits, bits))


def _write(
    manifest: Manifest,
    weights: Mapping[str, Floats],
    vocabulary: NDArray[np.int64],
    training: dict[str, Any],
    exits: ExitCurve | None,
    bits: int | None,
    folder: Path,
) -> DraftRecord:
    arch = replace(
        manifest.architecture,
        layers=1,
        d_ff=len(weights["gate"]),
        vocab_size=len(vocabulary),
        qkv_bias=False,
        tied_embeddings=False,
    )
    of_map, others = (MAP, OTHERS) if bits is None else (Precision(bits, BLOCK_SIZE),) * 2
    stored = Weights(
        _Arrays(weights),  # type: ignore[arg-type]
        lambda name: of_map if name == "map" else others,
    )
    layer = GraphWriter(folder, "layer")
    block = SegmentBuilder(layer, arch, stored)
    kv = KVSpec(32, arch.kv_heads, arch.head_dim)
    build_block(block, {0: _TENSORS}, manifest.max_length, kv, {}, input_map="map")
    head = GraphWriter(folder, "head")
    vocabulary_builder = SegmentBuilder(head, arch, stored)
    build_head(vocabulary_builder, "final_norm", "head")
    vocabulary.astype("<u4").tofile(folder / VOCABULARY)

    def segment(kind: Any, builder: SegmentBuilder, **fields: Any) -> Segment:
        writer = builder.writer
        return Segment(
            name=f"draft-{writer.graph_path.stem}",
            kind=kind,
            half="device",
            bits=others.bits,
            block_size=BLOCK_SIZE,
            graph_file=writer.graph_path.name,
            data_file=writer.data_path.name,
            tensors=builder.tensors,
            **fields,
        )

    record = DraftRecord(
        schema=DRAFT_SCHEMA,
        source=manifest.source,
        split=manifest.split,
        d_model=arch.d_model,
        segments=(segment("block", block, first_layer=0, last_layer=1), segment("head", vocabulary_builder)),
        vocabulary=len(vocabulary),
        files=tuple(FileEntry.of(path) for path in sorted(folder.iterdir())),
        training=training,
        exits=exits,
    )
    (folder / DRAFT_RECORD).write_text(record.to_json(), encoding="utf-8")
    return record


def _staged(target: Path, write: Callable[[Path], DraftRecord]) -> DraftRecord:
    """Write beside ``target`` and put it in its place when it is whole."""
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        staging.mkdir()
        record = write(staging)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
    except OSError as error:
        raise ExportError(f"{target}: {error.strerror or error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record
