"""The bundle: what export writes and what both runtimes open.

A bundle is a folder with ``device/`` and ``server/``. Each half holds the same ``manifest.json`` and the
segment files that run there. The manifest's own SHA-256 identifies the export in the handshake.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import BundleError

SCHEMA = 1
MANIFEST_NAME = "manifest.json"

Half = Literal["device", "server"]
SegmentKind = Literal["embed", "block", "head"]


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder-only transformer that graphs and caches depend on."""

    family: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle half, as it was when export wrote it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Segment:
    """One ONNX graph, or the embedding table, with the layers ``[first_layer, last_layer)`` in it.

    ``tensors`` tells what each weight got, for example ``{"layers.0.down_proj": 4}`` (bits).
    The embedding has no graph: its rows are read from ``data_file`` at ``codes_offset`` (packed codes,
    one row after the other) and ``scales_offset`` (float32, ``d_model / block_size`` a row).
    """

    name: str
    kind: SegmentKind
    half: Half
    bits: int
    block_size: int
    first_layer: int = 0
    last_layer: int = 0
    graph_file: str = ""
    data_file: str = ""
    codes_offset: int = 0
    scales_offset: int = 0
    tensors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class KVSpec:
    """Layout of the KV cache: ``[1, kv_heads, capacity, head_dim]`` for each of keys and values."""

    dtype: str
    kv_heads: int
    head_dim: int
    spare_rows: int = 1


@dataclass(frozen=True)
class Source:
    """Where the weights came from, and the hashes of the files that were read."""

    name: str
    format: str
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything that a runtime must know before it opens a segment."""

    schema: int
    isthmus: str
    source: Source
    architecture: Architecture
    split: int
    front_bits: int
    back_bits: int
    embed_bits: int
    head_bits: int
    block_size: int
    max_length: int
    segments: tuple[Segment, ...]
    kv: KVSpec
    codecs: tuple[str, ...]
    end_tokens: tuple[int, ...]
    bos_token: int | None
    chat_template: str | None
    special_tokens: dict[str, str]
    minimum_onnxruntime: str
    files: dict[Half, tuple[FileEntry, ...]]
    validation: dict[str, Any]

    @property
    def device_only(self) -> bool:
        """Whether the whole model lies on the device."""
        return self.split == self.architecture.layers

    def to_json(self) -> str:
        """Serialise with sorted keys, so that equal manifests have equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Bundle:
    """One opened half of a bundle: its folder, its manifest and the manifest's SHA-256."""

    folder: Path
    half: Half
    manifest: Manifest
    manifest_sha256: str

    def segments(self, kind: SegmentKind | None = None) -> list[Segment]:
        """Segments of this half in execution order, all or of one kind."""
        return [s for s in self.manifest.segments if s.half == self.half and kind in (None, s.kind)]

    def path(self, name: str) -> Path:
        """Absolute path of a file of this half."""
        return self.folder / name


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bundle(folder: str | Path, half: Half | None = None, *, verify: bool = True) -> Bundle:
    """Read a bundle half and check it against its manifest.

    Args:
        folder: the half's folder (``OUT/device``), or the bundle's, whose half is then taken.
        half: which half the caller runs; None takes the one that the folder holds.
        verify: compare every file's SHA-256, not only its size.

    Raises:
        BundleError: no bundle there, another schema, another half, a missing, truncated or altered file.
    """
    root = Path(folder)
    if half and not (root / MANIFEST_NAME).is_file():
        # The other half's manifest tells whether this one is missing or was never made.
        halves = (root / name for name in (half, "device", "server"))
        root = next((folder for folder in halves if (folder / MANIFEST_NAME).is_file()), root)
    manifest_path = root / MANIFEST_NAME
    if not manifest_path.is_file():
        raise BundleError(f"{folder}: no {MANIFEST_NAME} there; give the folder that `isthmus export` wrote")
    text = manifest_path.read_bytes()
    manifest = parse_manifest(text, manifest_path)
    half = _choose_half(root, manifest, half)
    for entry in manifest.files[half]:
        _check_file(root / entry.name, entry, verify)
    return Bundle(root, half, manifest, hashlib.sha256(text).hexdigest())


def _choose_half(root: Path, manifest: Manifest, wanted: Half | None) -> Half:
    """The half to open, once it is clear that the folder is that one."""
    if wanted and wanted not in manifest.files:
        raise BundleError(f"{root}: this export keeps the whole model on the device, there is no {wanted} half")
    held = [half for half, files in manifest.files.items() if any((root / file.name).exists() for file in files)]
    if wanted and held and wanted not in held:
        raise BundleError(f"{root} is the {held[0]} half; give the {wanted} half")
    half = wanted or next(iter(held), None)
    if half is None:
        raise BundleError(f"{root}: holds a {MANIFEST_NAME} and no segment; copy or export the bundle again")
    return half


def _check_file(path: Path, entry: FileEntry, verify: bool) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing; the bundle is incomplete, copy or export it again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(f"{path}: {size} bytes where the manifest says {entry.bytes}; copy or export it again")
    if verify and sha256_file(path) != entry.sha256:
        raise BundleError(f"{path}: its SHA-256 is not the manifest's; the file was altered, copy or export it again")


def parse_manifest(text: bytes, origin: Path) -> Manifest:
    """Build a manifest from JSON.

    Raises:
        BundleError: not JSON, another schema version, or fields missing or unknown.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{origin}: not JSON ({error}); copy or export the bundle again") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise BundleError(f"{origin}: schema {found!r} where this version reads {SCHEMA}; export the bundle again")
    try:
        return Manifest(
            **data
            | {
                "source": Source(**data["source"]),
                "architecture": Architecture(**data["architecture"]),
                "segments": tuple(Segment(**segment) for segment in data["segments"]),
                "kv": KVSpec(**data["kv"]),
                "codecs": tuple(data["codecs"]),
                "end_tokens": tuple(data["end_tokens"]),
                "files": {half: tuple(FileEntry(**f) for f in files) for half, files in data["files"].items()},
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{origin}: {error}; not a manifest of schema {SCHEMA}, export the bundle again") from error
