"""Trained drafts that come with the package, and how they are stored: in 8 bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..quant.grids import quantize
from ..quant.nbits import PackedWeight, dequantize
from ..runtime.exits import ExitCurve
from .draft_costs import DraftFigures

Floats = NDArray[np.float32]

_BITS, _BLOCK_SIZE = 8, 32

_FOLDER = Path(__file__).parent / "drafts"

_SMOLLM2_135M = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # SHA-256 of the checkpoint's file

# By checkpoint and split.
_SHIPPED = {
    (_SMOLLM2_135M, 10): "smollm2-135m-instruct-split10.npz",
    (_SMOLLM2_135M, 20): "smollm2-135m-instruct-split20.npz",
}


class StoredDraft(NamedTuple):
    """What `isthmus.export.draft_segment.write_draft` takes."""

    weights: dict[str, Floats]
    vocabulary: NDArray[np.int64]
    training: dict[str, Any]
    exits: ExitCurve | None = None


def shipped_draft(files: Mapping[str, str], split: int) -> StoredDraft | None:
    """The draft that comes with the package for a checkpoint's files and a split, if there is one."""
    if len(files) != 1:
        return None
    name = _SHIPPED.get((next(iter(files.values())), split))
    if name is None:
        return None
    # Beside the weights, so that it can be measured again without them.
    exits = json.loads((_FOLDER / name).with_suffix(".exits.json").read_text(encoding="utf-8"))
    return load_draft(_FOLDER / name)._replace(exits=ExitCurve.from_dict(exits))


def shipped_figures(files: Mapping[str, str]) -> dict[int, DraftFigures]:
    """What the planner needs to know of the drafts that come with the package for a checkpoint's files, by split."""
    return {
        split: DraftFigures.read((_FOLDER / name).with_suffix(".figures.json"))
        for (digest, split), name in _SHIPPED.items()
        if list(files.values()) == [digest]
    }


def save_draft(path: Path, draft: StoredDraft) -> None:
    """Store a draft, its matrices rounded to 8 bits."""
    arrays: dict[str, Any] = {
        "vocabulary": draft.vocabulary.astype(np.uint32),
        "training": np.frombuffer(json.dumps(draft.training).encode(), np.uint8),
    }
    for name, weight in draft.weights.items():
        if weight.ndim == 1:
            arrays[name] = weight
            continue
        packed = quantize(weight, _BITS, _BLOCK_SIZE)
        arrays[f"{name}.codes"], arrays[f"{name}.scales"] = packed.codes, packed.scales
        arrays[f"{name}.columns"] = packed.columns
    np.savez(path, **arrays)


def load_draft(path: Path) -> StoredDraft:
    """Read what `save_draft` stored."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    vocabulary = arrays.pop("vocabulary").astype(np.int64)
    training = json.loads(arrays.pop("training").tobytes())
    weights: dict[str, Floats] = {}
    for key, array in arrays.items():
        name, _, part = key.partition(".")
        if not part:
            weights[name] = array
        elif part == "codes":
            scales, columns = arrays[f"{name}.scales"], int(arrays[f"{name}.columns"])
            weights[name] = dequantize(PackedWeight(array, scales, columns, _BITS, _BLOCK_SIZE))
    return StoredDraft(weights, vocabulary, training)
