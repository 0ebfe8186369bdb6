"""A draft: what a device half may have beside its manifest, in the folder ``draft``.

A draft changes no output, so that the server need not know of it, and one can be trained, added or removed without a
new export: it is not part of the manifest that both halves share, and names what it belongs to itself.
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
from .bundle import Bundle, FileEntry, KVSpec, Segment, Source, check_file, read_segment
from .exits import ExitCurve

DRAFT_FOLDER = "draft"
DRAFT_RECORD = "draft.json"
VOCABULARY = "vocabulary.bin"  # uint32, little endian, rising: the id of each row of the draft's head
DRAFT_SCHEMA = 1


@dataclass(frozen=True)
class DraftRecord:
    """What ``draft.json`` says.

    Attributes:
        source: of the model that it was trained for.
        split: whose hidden states it reads.
        d_model: their width.
        segments: one ``block`` with one layer, and one ``head``.
        vocabulary: ids that it can draft.
        files: beside the record.
        training: how it was made and what it reached, for people.
        exits: how often it is right, by its confidence; None if that was not measured.
    """

    schema: int
    source: Source
    split: int
    d_model: int
    segments: tuple[Segment, ...]
    vocabulary: int
    files: tuple[FileEntry, ...]
    training: dict[str, Any]
    exits: ExitCurve | None = None

    def to_json(self) -> str:
        """Serialise with sorted keys."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Draft:
    """An opened draft.

    Attributes:
        bundle: its layer and head, in the form of a bundle whose device half they are.
        vocabulary: int64, the id of each row of its head.
    """

    record: DraftRecord
    bundle: Bundle
    vocabulary: NDArray[np.int64]


def open_draft(bundle: Bundle, *, verify: bool = True) -> Draft | None:
    """The draft of a device half; None if it has none.

    Raises:
        BundleError: it is damaged, or belongs to another model or split.
    """
    folder = bundle.folder / DRAFT_FOLDER
    if not folder.is_dir():
        return None
    path, manifest = folder / DRAFT_RECORD, bundle.manifest
    remedy = f"train one with `isthmus distill`, or remove {folder}"
    try:
        record = read_draft_record(path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: no readable draft ({error}); {remedy}") from error
    if record.source.files != manifest.source.files or record.d_model != manifest.architecture.d_model:
        raise BundleError(f"{folder}: a draft of {record.source.name}, not of {manifest.source.name}; {remedy}")
    if record.split != manifest.split:
        raise BundleError(f"{folder}: a draft for split {record.split}, this bundle has {manifest.split}; {remedy}")
    for entry in record.files:
        check_file(folder / Path(entry.name).name, entry, verify)
    vocabulary = np.fromfile(folder / VOCABULARY, "<u4").astype(np.int64)
    if len(vocabulary) != record.vocabulary or (np.diff(vocabulary) <= 0).any():
        raise BundleError(f"{folder / VOCABULARY}: not {record.vocabulary} rising ids; {remedy}")
    if vocabulary[-1] >= manifest.architecture.vocab_size:
        raise BundleError(f"{folder / VOCABULARY}: ids beyond the model's vocabulary; {remedy}")
    arch = dataclasses.replace(manifest.architecture, layers=1, vocab_size=record.vocabulary)
    reduced = dataclasses.replace(
        manifest,
        architecture=arch,
        split=1,
        segments=record.segments,
        kv={"device": KVSpec(32, arch.kv_heads, arch.head_dim)},
        files={"device": record.files},
    )
    return Draft(record, Bundle(folder, "device", reduced, bundle.manifest_sha256), vocabulary)


def read_draft_record(text: bytes) -> DraftRecord:
    """Parse ``draft.json``; raises `ValueError` and other errors of what is not one."""
    data = json.loads(text)
    if data["schema"] != DRAFT_SCHEMA:
        raise ValueError(f"schema {data['schema']!r} where this version reads {DRAFT_SCHEMA}")
    return DraftRecord(
        **data
        | {
            "source": Source(**data["source"]),
            "segments": tuple(map(read_segment, data["segments"])),
            "files": tuple(FileEntry(**entry) for entry in data["files"]),
            "exits": None if data.get("exits") is None else ExitCurve.from_dict(data["exits"]),
        }
    )


def write_exits(bundle: Bundle, exits: ExitCurve) -> DraftRecord:
    """Put a measured curve into the record of a device half's draft, in place of the one that may be there.

    Raises:
        BundleError: there is no draft, or its record cannot be written.
    """
    draft = open_draft(bundle, verify=False)
    if draft is None:
        raise BundleError(f"{bundle.folder} holds no draft to exit with; run `isthmus distill`")
    record = dataclasses.replace(draft.record, exits=exits)
    path = draft.bundle.folder / DRAFT_RECORD
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(record.to_json(), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}; free space or change its permissions") from error
    return record
