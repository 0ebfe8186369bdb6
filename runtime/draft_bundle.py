"""The trained draft beside a device half: ``device/draft/``, no part of the manifest, as it changes no output.

``draft.json`` names what it was trained for and its files: ``layer.onnx``, a block of one layer numbered 0 over the
front's hidden states; ``head.onnx`` over the tokens of ``vocabulary.bin`` (little-endian uint32, ascending).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError
from .bundle import Bundle, FileEntry, KVSpec, Segment, TensorRecord, sha256_file

DRAFT_FOLDER = "draft"
DRAFT_RECORD = "draft.json"
DRAFT_SCHEMA = 1
LAYER, HEAD, VOCABULARY = "layer.onnx", "head.onnx", "vocabulary.bin"


@dataclass(frozen=True)
class DraftBundle:
    """An intact draft.

    Attributes:
        half: it, in the form of a bundle half with one block of one layer and a head.
        vocabulary: ``[n]`` ids of the head's rows, ascending.
        record: all of ``draft.json``.
    """

    half: Bundle
    vocabulary: NDArray[np.int64]
    record: dict[str, Any]


def open_draft(bundle: Bundle, *, verify: bool = True) -> DraftBundle | None:
    """Read and check the draft of a device half; None if there is none.

    Args:
        bundle: the device half.
        verify: compare every file's SHA-256, not only its size.

    Raises:
        BundleError: the draft is of another model or split, or a file is missing, truncated or altered.
    """
    folder = bundle.folder / DRAFT_FOLDER
    if not folder.is_dir():
        return None
    path = folder / DRAFT_RECORD
    try:
        record = json.loads(path.read_bytes())
        schema, files = record["schema"], [FileEntry(**entry) for entry in record["files"]]
        fitting = {
            "source": (record["source"]["files"], bundle.manifest.source.files),
            "split": (record["split"], bundle.manifest.split),
            "d_model": (record["d_model"], bundle.manifest.architecture.d_model),
        }
        kv = KVSpec(32, record["kv_heads"], record["head_dim"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{path}: no readable record of a draft ({error}); remove {folder} or run `isthmus distill` again"
        ) from error
    if schema != DRAFT_SCHEMA:
        raise BundleError(f"{path}: schema {schema!r} where this version reads {DRAFT_SCHEMA}; distill the draft again")
    for name, (found, expected) in fitting.items():
        if found != expected:
            raise BundleError(
                f"{folder}: a draft for {name} {found}, this bundle has {expected}; remove the folder, or distill a "
                "draft for this bundle"
            )
    for entry in files:
        _check(folder / Path(entry.name).name, entry, verify)
    vocabulary = np.fromfile(folder / VOCABULARY, "<u4").astype(np.int64)
    if (
        not vocabulary.size
        or (np.diff(vocabulary) <= 0).any()
        or vocabulary[-1] >= bundle.manifest.architecture.vocab_size
    ):
        raise BundleError(
            f"{folder / VOCABULARY}: must hold ascending ids below the vocabulary's "
            f"{bundle.manifest.architecture.vocab_size}; distill the draft again"
        )
    return DraftBundle(_as_half(bundle, folder, files, kv, vocabulary.size), vocabulary, record)


def _as_half(bundle: Bundle, folder: Path, files: list[FileEntry], kv: KVSpec, vocab_size: int) -> Bundle:
    sizes = {entry.name: entry.bytes for entry in files}
    layer, head = (
        # For the memory it takes: all of its files, as if they were one weight.
        {name: TensorRecord(4, 32, "rtn", True, sum(size for file, size in sizes.items() if file.startswith(name)))}
        for name in ("layer", "head")
    )
    segments = (
        Segment("draft", "block", "device", 4, 32, 0, 1, graph_file=LAYER, tensors=layer),
        Segment("draft-head", "head", "device", 4, 32, graph_file=HEAD, tensors=head),
    )
    manifest = dataclasses.replace(
        bundle.manifest,
        architecture=dataclasses.replace(bundle.manifest.architecture, layers=1, vocab_size=vocab_size),
        split=1,
        segments=segments,
        kv={"device": kv},
        files={"device": tuple(files)},
    )
    return Bundle(folder, "device", manifest, bundle.manifest_sha256)


def _check(path: Path, entry: FileEntry, verify: bool) -> None:
    remedy = "remove the draft's folder, or copy or distill it again"
    if not path.is_file():
        raise BundleError(f"{path}: missing; {remedy}")
    if path.stat().st_size != entry.bytes:
        raise BundleError(f"{path}: {path.stat().st_size} bytes where {DRAFT_RECORD} says {entry.bytes}; {remedy}")
    if verify and sha256_file(path) != entry.sha256:
        raise BundleError(f"{path}: its SHA-256 is not that of {DRAFT_RECORD}; {remedy}")
