"""The bundle: what export writes and what both runtimes open.

A bundle is a folder with ``device/`` and ``server/``. Each half holds the same ``manifest.json`` and the
segment files that run there. The manifest's own SHA-256 identifies the export in the handshake.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..devices.backend import processor_key
from ..errors import BundleError
from ..quant.kv import KV_BITS

logger = logging.getLogger(__name__)

SCHEMA = 3
MANIFEST_NAME = "manifest.json"
INSTALLED = "installed"  # folder in a half: the graphs with packed weights, see `isthmus.runtime.install`
INSTALL_RECORD = "install.json"
FFN_SIMILARITY = "ffn_similarity"  # a block's input, where rows may leave feed-forward networks out
FFN_ALL = 2.0  # a value of it that no cosine reaches: all run
FFN_NONE = -2.0  # one that all reach: none runs but the first
SPARE_ROWS = 2  # positions of a KV cache behind the last: the graphs' dummy row, and a filled-up one (`RowRule`)

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
    """One file of a bundle half, as it was when it was written."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Describe a file."""
        return cls(path.name, path.stat().st_size, sha256_file(path))


@dataclass(frozen=True)
class TensorRecord:
    """How one weight is stored.

    Attributes:
        bits: 2, 4 or 8 packed, 16 or 32 as floats.
        block_size: weights that share a scale.
        method: how its codes were found: ``rtn``, ``mse``, ``hqq``, ``gptq``, or ``copied`` from a source that is
            quantized already; ``float`` at 16 and 32 bits.
        symmetric: whether the zero point is the middle code everywhere.
        bytes: codes, scales and zero points.
    """

    bits: int
    block_size: int
    method: str
    symmetric: bool
    bytes: int


@dataclass(frozen=True)
class Segment:
    """One ONNX graph, or the embedding table, with the layers ``[first_layer, last_layer)`` in it.

    ``ragged_graph_file`` is a second graph over the same weights, for sessions that advance together, if there is one.
    ``skips_ffn`` tells that rows may leave feed-forward networks out, by the input `FFN_SIMILARITY`.
    ``bits`` and ``block_size`` are those of the recipe; ``tensors`` tells what each weight got, by a name such as
    ``layers.0.down``. The embedding has no graph: its rows are read from ``data_file`` at ``codes_offset`` (packed
    codes, one row after the other), ``scales_offset`` (float32, ``d_model / block_size`` a row) and, if it is not
    symmetric, ``zero_points_offset`` (packed like the codes, each row filled up to whole bytes).
    """

    name: str
    kind: SegmentKind
    half: Half
    bits: int
    block_size: int
    first_layer: int = 0
    last_layer: int = 0
    graph_file: str = ""
    ragged_graph_file: str = ""
    skips_ffn: bool = False
    data_file: str = ""
    codes_offset: int = 0
    scales_offset: int = 0
    zero_points_offset: int = 0
    tensors: dict[str, TensorRecord] = field(default_factory=dict)


def precisions(segments: Iterable[Segment]) -> frozenset[tuple[int, int]]:
    """The ``(bits, block_size)`` of all weights in some segments."""
    return frozenset((tensor.bits, tensor.block_size) for segment in segments for tensor in segment.tensors.values())


@dataclass(frozen=True)
class KVSpec:
    """Layout of one half's KV cache: `shape` of `dtype` for each layer's keys and for its values.

    Attributes:
        bits: 32 (float32), 8 (int8 codes) or 4 (codes two a byte); the scales lie in the graphs.
        spare_rows: rows beyond the capacity, see `SPARE_ROWS`.
    """

    bits: int
    kv_heads: int
    head_dim: int
    spare_rows: int = SPARE_ROWS

    def __post_init__(self) -> None:
        if self.bits not in KV_BITS:
            raise BundleError(
                f"KV cache of {self.bits} bits: must be one of {', '.join(map(str, KV_BITS))}; export the bundle again"
            )

    @property
    def dtype(self) -> str:
        """NumPy's name of what is stored."""
        return {32: "float32", 8: "int8", 4: "uint8"}[self.bits]

    @property
    def row_width(self) -> int:
        """Stored elements of a position's head."""
        return self.head_dim // 2 if self.bits == 4 else self.head_dim

    def shape(self, capacity: int) -> tuple[int, int, int, int]:
        """``(1, kv_heads, rows, row_width)`` for so many positions."""
        return 1, self.kv_heads, capacity + self.spare_rows, self.row_width

    def cache_bytes(self, layers: int, capacity: int) -> int:
        """Bytes that keys and values of so many layers take, the spare rows included."""
        return 2 * layers * math.prod(self.shape(capacity)) * max(self.bits // 8, 1)

    def token_bytes(self, layers: int) -> int:
        """Bytes that one more position takes in so many layers."""
        return self.cache_bytes(layers, 1) - self.cache_bytes(layers, 0)


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
    weights: str
    symmetric: bool
    max_length: int
    segments: tuple[Segment, ...]
    kv: dict[Half, KVSpec]
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

    @property
    def whole_on_device(self) -> bool:
        """Whether the device holds every layer, be it that the server has a half, too: the same bytes."""
        return self.device_only or set(self.files["server"]) <= set(self.files["device"])

    @property
    def server_only(self) -> bool:
        """Whether the whole model lies on the server, embedding included: the device sends token ids."""
        return self.split == 0

    @property
    def skips_ffn(self) -> bool:
        """Whether a generation can leave feed-forward networks out."""
        return any(segment.skips_ffn for segment in self.segments)

    def half_layers(self, half: Half) -> int:
        """Layers of one half."""
        return self.split if half == "device" else self.architecture.layers - self.split

    def to_json(self) -> str:
        """Serialise with sorted keys, so that equal manifests have equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Bundle:
    """One opened half of a bundle.

    Attributes:
        manifest_sha256: of the manifest's file.
        installed: whether `INSTALLED` holds its graphs with weights packed for this processor and onnxruntime.
    """

    folder: Path
    half: Half
    manifest: Manifest
    manifest_sha256: str
    installed: bool = False

    def own_back(self) -> Bundle:
        """The server half as the device's folder holds it.

        Raises:
            BundleError: the bundle was exported without it.
        """
        if self.manifest.device_only or not self.manifest.whole_on_device:
            raise BundleError(
                f"{self.folder}: holds no layers of the server half; export with `--split N --device-layers all`"
            )
        return dataclasses.replace(self, half="server")

    def with_own_back(self) -> tuple[Bundle, ...]:
        """All that may be opened from this folder: the half, and the device's copy of the server's if it has one."""
        copied = self.half == "device" and self.manifest.whole_on_device and not self.manifest.device_only
        return (self, self.own_back()) if copied else (self,)

    def segments(self, kind: SegmentKind | None = None) -> list[Segment]:
        """Segments of this half in execution order, all or of one kind."""
        return [s for s in self.manifest.segments if s.half == self.half and kind in (None, s.kind)]

    @property
    def kv(self) -> KVSpec:
        """Layout of this half's KV cache."""
        return self.manifest.kv[self.half]

    def path(self, name: str) -> Path:
        """Absolute path of a file of this half."""
        return self.folder / name

    def graph_path(self, segment: Segment) -> Path:
        """The file that a segment's graph is opened from."""
        return (self.folder / INSTALLED if self.installed else self.folder) / segment.graph_file


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bundle(
    folder: str | Path, half: Half | None = None, *, verify: bool = True, use_installed: bool = True
) -> Bundle:
    """Read a bundle half and check it against its manifest.

    Args:
        folder: the half's folder (``OUT/device``), or the bundle's, whose half is then taken.
        half: which half the caller runs; None takes the one that the folder holds.
        verify: compare every file's SHA-256, not only its size.
        use_installed: look for packed weights.

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
        check_file(root / entry.name, entry, verify)
    digest = hashlib.sha256(text).hexdigest()
    return Bundle(root, half, manifest, digest, use_installed and _is_installed(root, digest, verify))


def _is_installed(root: Path, manifest_sha256: str, verify: bool) -> bool:
    """Whether there is an installation of this export for this processor; warns where there is another one."""
    folder = root / INSTALLED
    if not folder.is_dir():
        return False
    try:
        record = json.loads((folder / INSTALL_RECORD).read_bytes())
        found, processor = record["manifest_sha256"], record["processor"]
        entries = [FileEntry(**entry) for entry in record["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{folder}: no readable {INSTALL_RECORD} ({error}); run `isthmus install` again or remove the folder"
        ) from error
    if (found, processor) != (manifest_sha256, processor_key()):
        logger.warning("%s is of another export, processor or onnxruntime; run `isthmus install` again", folder)
        return False
    for entry in entries:
        check_file(folder / Path(entry.name).name, entry, verify)
    return True


def _choose_half(root: Path, manifest: Manifest, wanted: Half | None) -> Half:
    """The half to open, once it is clear that the folder is that one."""
    if wanted and wanted not in manifest.files:
        raise BundleError(f"{root}: this export keeps the whole model on the device, there is no {wanted} half")
    names = {half: {file.name for file in files} for half, files in manifest.files.items()}
    # What both hold tells nothing: a codec's tables, or all that the server has if the device has it, too.
    shared = set.intersection(*names.values()) if len(names) > 1 else set()
    held = [half for half in names if any((root / name).exists() for name in names[half] - shared)]
    if not held and manifest.whole_on_device and any((root / name).exists() for name in shared):
        held = ["server"]
    if wanted and held and wanted not in held:
        raise BundleError(f"{root} is the {held[0]} half; give the {wanted} half")
    half = wanted or next(iter(held), None)
    if half is None:
        raise BundleError(f"{root}: holds a {MANIFEST_NAME} and no segment; copy or export the bundle again")
    return half


def check_file(path: Path, entry: FileEntry, verify: bool) -> None:
    """Raise `BundleError` unless a file has the entry's size and, if that is to be verified, its hash."""
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
                "segments": tuple(map(read_segment, data["segments"])),
                "kv": {half: KVSpec(**data["kv"][half]) for half in data["files"]},
                "codecs": tuple(data["codecs"]),
                "end_tokens": tuple(data["end_tokens"]),
                "files": {half: tuple(FileEntry(**f) for f in files) for half, files in data["files"].items()},
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{origin}: {error}; not a manifest of schema {SCHEMA}, export the bundle again") from error


def read_segment(data: dict[str, Any]) -> Segment:
    """A segment from its JSON form; raises `KeyError` or `TypeError` if it is none."""
    return Segment(**data | {"tensors": {name: TensorRecord(**record) for name, record in data["tensors"].items()}})
