"""A checkpoint in a Hugging Face directory: config.json, safetensors shards, tokenizer.json.

The shards are memory-mapped and their headers parsed here: the safetensors library's NumPy side has no
bfloat16, and a header is 8 bytes of length, then JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import ModelError
from ..runtime.bundle import sha256_file
from .checkpoint import TokenizerFiles, end_token_ids, normalize_config

INDEX_NAME = "model.safetensors.index.json"

# The safetensors library's own limit.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: its shard, the dtype's name, and its bytes in the shard."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class SafetensorsCheckpoint:
    """See `Checkpoint`.

    Args:
        folder: the directory.

    Raises:
        ModelError: a file is missing, truncated, corrupt, or of an unsupported kind.
    """

    format = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = _model_name(folder)
        self._shards = _find_shards(folder)
        self._entries: dict[str, _Entry] = {}
        for shard in self._shards:
            self._entries.update(_read_header(shard))
        self._check_index()
        config = _read_json(folder / "config.json")
        if method := (config.get("quantization_config") or {}).get("quant_method"):
            raise ModelError(f"{folder}: weights are already quantized ({method}); give the float checkpoint")
        config.setdefault("tie_word_embeddings", "lm_head.weight" not in self._entries)
        self.config = normalize_config(config, str(folder / "config.json"))

    def names(self) -> list[str]:
        """Tensor names."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entry(name).shape

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32."""
        entry = self._entry(name)
        dtype = _DTYPES[entry.dtype]
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, np.float32)
        stored = np.memmap(entry.shard, dtype, mode="r", offset=entry.start, shape=entry.shape)
        if entry.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            bits = np.array(stored, np.uint32)
            bits <<= 16
            return bits.view(np.float32)
        return np.array(stored, np.float32)

    def tokenizer(self) -> TokenizerFiles:
        """Read tokenizer.json, and the chat template and special tokens from the files beside it."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{self.folder}: no tokenizer.json; make one where transformers is installed: "
                f"AutoTokenizer.from_pretrained({str(self.folder)!r}).save_pretrained({str(self.folder)!r})"
            )
        try:
            text = path.read_text(encoding="utf-8")
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelError(f"{path}: not a tokenizer ({error}); fetch the checkpoint again") from error
        config = self._read_optional("tokenizer_config.json")
        special_tokens = _special_texts({**self._read_optional("special_tokens_map.json"), **config})
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        generation = self._read_optional("generation_config.json")
        declared = [*_ids(generation.get("eos_token_id")), *_ids(self.config.get("eos_token_id"))]
        bos_ids = _ids(self.config.get("bos_token_id"))
        for key, found in (("eos_token", declared), ("bos_token", bos_ids)):
            if (number := tokenizer.token_to_id(special_tokens.get(key, ""))) is not None:
                found.insert(0, number)
        return TokenizerFiles(
            tokenizer_json=text,
            chat_template=self._chat_template(config),
            end_tokens=end_token_ids(declared, special),
            bos_token=bos_ids[0] if bos_ids else None,
            special_tokens=special_tokens,
        )

    def file_hashes(self) -> dict[str, str]:
        """Hex SHA-256 of each file of the checkpoint."""
        others = [p for pattern in ("*.json", "*.jinja") for p in self.folder.glob(pattern)]
        return {path.name: sha256_file(path) for path in sorted([*others, *self._shards])}

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ModelError(f"{self.folder}: no tensor {name}; incomplete, or of another family")
        return self._entries[name]

    def _check_index(self) -> None:
        """Refuse shards that lack what the index promises."""
        index = self.folder / INDEX_NAME
        if not index.is_file():
            return
        for name, shard in _weight_map(index).items():
            if name not in self._entries or self._entries[name].shard.name != shard:
                raise ModelError(f"{self.folder / shard}: no tensor {name}, which {INDEX_NAME} places there")

    def _read_optional(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return _read_json(path) if path.is_file() else {}

    def _chat_template(self, tokenizer_config: dict[str, Any]) -> str | None:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = tokenizer_config.get("chat_template")
        if isinstance(template, list):
            template = {t.get("name"): t.get("template") for t in template}.get("default")
        return template


def _model_name(folder: Path) -> str:
    """The directory's name, or ``owner/name`` for a snapshot in the hub's cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _find_shards(folder: Path) -> list[Path]:
    """The shards that the index names; without an index, model.safetensors or whatever lies there."""
    index, single = folder / INDEX_NAME, folder / "model.safetensors"
    if index.is_file():
        shards = sorted({folder / name for name in _weight_map(index).values()})
    else:
        shards = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(
            f"{folder}: no *.safetensors; other weight files are not read, save the model with "
            "save_pretrained(..., safe_serialization=True)"
        )
    for shard in shards:
        if not shard.is_file():
            raise ModelError(f"{shard}: missing, yet {INDEX_NAME} names it; fetch the checkpoint again")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ModelError(f"{index}: weight_map does not name files of this directory; fetch it again")
    return weight_map


def _read_header(path: Path) -> dict[str, _Entry]:
    """Parse a shard's header and check that every tensor lies inside the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(
                f"{path}: header length {length} in a file of {size} bytes; truncated or not safetensors, "
                "fetch it again"
            )
        try:
            header = json.loads(file.read(length))
            entries = {
                name: _Entry(path, str(e["dtype"]), tuple(map(int, e["shape"])), 8 + length + int(e["data_offsets"][0]))
                for name, e in header.items()
                if name != "__metadata__"
            }
            ends = {name: 8 + length + int(header[name]["data_offsets"][1]) for name in entries}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: corrupt header ({error!r}); fetch it again") from error
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise ModelError(f"{path}: {name} is {entry.dtype}; supported are {', '.join(_DTYPES)}")
        nbytes = math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize
        if min(entry.shape, default=0) < 0 or entry.start < 8 + length or ends[name] != entry.start + nbytes:
            raise ModelError(f"{path}: {name} has offsets unfit for shape {entry.shape}; fetch it again")
        if ends[name] > size:
            raise ModelError(f"{path}: {name} ends at byte {ends[name]} of {size}; truncated, fetch it again")
    return entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object; fetch the checkpoint again")
    return value


def _special_texts(config: dict[str, Any]) -> dict[str, str]:
    """Texts of the special tokens, which tokenizer_config.json gives as strings or as objects."""
    texts = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[key] = text
    return texts


def _ids(value: Any) -> list[int]:
    """A token id, a list of them, or None, as a list."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if type(v) is int]
