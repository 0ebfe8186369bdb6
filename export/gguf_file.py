"""The GGUF container: metadata and tensor table, with every length checked before it is used.

Not `gguf.GGUFReader`: on a corrupt count it loops without bound, and it makes three arrays for every token
of the vocabulary (2.2 s and 167 MB for the 98 MB file of SmolLM2-135M). Types and block sizes are gguf's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray

from ..errors import ModelError

T = TypeVar("T")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# Elements dequantized at a time, which bounds the temporaries.
_CHUNK_ELEMENTS = 1 << 20

_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape (row-major, slowest first), its type, and its first byte in the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the last dimension."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(self.shape[-1] // block * block_bytes)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """A memory-mapped GGUF file.

    Args:
        path: the file.

    Attributes:
        metadata: the key-value pairs; arrays of numbers are NumPy arrays, arrays of strings are lists.
        tensors: the tensor table.

    Raises:
        ModelError: not a GGUF file, another version, truncated, corrupt, or a tensor type that gguf cannot
            dequantize.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size < len(_MAGIC):
            raise ModelError(f"{path}: {path.stat().st_size} bytes are no GGUF file; fetch it again")
        self._data = np.memmap(path, np.uint8, mode="r")
        cursor = _Cursor(path, self._data.data)
        if cursor.take(4) != _MAGIC:
            raise ModelError(f"{path}: does not start with GGUF; give a .gguf file or a checkpoint directory")
        version = cursor.number(GGUFValueType.UINT32)
        if version not in _VERSIONS:
            raise ModelError(f"{path}: GGUF version {version}, or big-endian; supported are versions 2 and 3")
        tensor_count, pair_count = cursor.number(GGUFValueType.UINT64), cursor.number(GGUFValueType.UINT64)
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number(GGUFValueType.UINT32))
        self.tensors: dict[str, TensorInfo] = dict(_tensor_info(cursor) for _ in range(tensor_count))
        if len(self.tensors) != tensor_count:
            raise cursor.corrupt("two tensors of one name")
        self._place(cursor.offset)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """A metadata value, or `default` where the file has none.

        Raises:
            ModelError: the value is not a `kind`.
        """
        value = self.metadata.get(key, default)
        if value is None or isinstance(value, kind):
            return value
        raise ModelError(
            f"{self.path}: {key} is a {type(value).__name__}, not a {kind.__name__}; corrupt, fetch it again"
        )

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Dequantize one tensor to float32, a few rows at a time."""
        info, stored = self.tensors[name], self.stored(name)
        result = np.empty((info.rows, info.shape[-1]), np.float32)
        step = max(1, _CHUNK_ELEMENTS // info.shape[-1])
        for first in range(0, info.rows, step):
            result[first : first + step] = dequantize(np.array(stored[first : first + step]), info.type)
        return result.reshape(info.shape)

    def stored(self, name: str) -> NDArray[np.uint8]:
        """One tensor's bytes, a row of it for each row: a view of the file."""
        info = self.tensors[name]
        return self._data[info.start : info.start + info.rows * info.row_bytes].reshape(info.rows, info.row_bytes)

    def _place(self, header_end: int) -> None:
        """Turn offsets into the data section into offsets into the file, and check that all data is there."""
        alignment = self.get("general.alignment", int, _DEFAULT_ALIGNMENT) or 0
        if alignment <= 0:
            raise ModelError(f"{self.path}: general.alignment is {alignment!r}; corrupt, fetch it again")
        data_start = -(-header_end // alignment) * alignment
        for name, info in self.tensors.items():
            placed = TensorInfo(info.shape, info.type, data_start + info.start)
            end = placed.start + placed.rows * placed.row_bytes
            if end > self._data.size:
                raise ModelError(
                    f"{self.path}: {name} ends at byte {end} of {self._data.size}; truncated, fetch it again"
                )
            self.tensors[name] = placed
        for kind in {info.type for info in self.tensors.values()}:
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError as error:
                raise ModelError(
                    f"{self.path}: holds {kind.name} tensors, which gguf cannot dequantize; "
                    "give another quantization of the model"
                ) from error


class _Cursor:
    """Reads the header front to back and never past the end."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path = path
        self.offset = 0
        self._view = view

    def take(self, count: int) -> bytes:
        return bytes(self._advance(count))

    def number(self, kind: GGUFValueType) -> Any:
        # The shortest decimal that a float32 stands for is what was meant: 1e-05, not 9.999999747378752e-06.
        value = self._array(_SCALARS[kind], 1)[0]
        return float(str(value)) if kind == GGUFValueType.FLOAT32 else value.item()

    def string(self) -> str:
        raw = self.take(int.from_bytes(self._advance(8), "little"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"text that is not UTF-8 ({error.reason})") from error

    def value(self, raw_kind: int) -> Any:
        kind = self._kind(raw_kind)
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(kind)
        item_kind = self._kind(self.number(GGUFValueType.UINT32))
        count = self.number(GGUFValueType.UINT64)
        if item_kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if item_kind == GGUFValueType.ARRAY:
            raise self.corrupt("an array of arrays")
        return self._array(_SCALARS[item_kind], count)

    def corrupt(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what} before byte {self.offset}; corrupt, fetch it again")

    def _kind(self, raw: int) -> GGUFValueType:
        try:
            return GGUFValueType(raw)
        except ValueError as error:
            raise self.corrupt(f"value type {raw}") from error

    def _array(self, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        return np.frombuffer(self._advance(count * dtype.itemsize), dtype).copy()

    def _advance(self, count: int) -> memoryview:
        end = self.offset + count
        if end > len(self._view):
            raise ModelError(
                f"{self.path}: the header asks for byte {end} of {len(self._view)}; truncated, fetch it again"
            )
        part = self._view[self.offset : end]
        self.offset = end
        return part


def _tensor_info(cursor: _Cursor) -> tuple[str, TensorInfo]:
    """One row of the tensor table, its start still relative to the data section."""
    name = cursor.string()
    dimensions = cursor.number(GGUFValueType.UINT32)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.corrupt(f"{name} with {dimensions} dimensions")
    shape = tuple(reversed([cursor.number(GGUFValueType.UINT64) for _ in range(dimensions)]))
    raw_type = cursor.number(GGUFValueType.UINT32)
    try:
        kind = GGMLQuantizationType(raw_type)
    except ValueError as error:
        raise cursor.corrupt(f"{name} of unknown tensor type {raw_type}") from error
    if min(shape) == 0 or shape[-1] % GGML_QUANT_SIZES[kind][0]:
        raise cursor.corrupt(f"{name} with shape {shape}, which {kind.name} cannot hold,")
    return name, TensorInfo(shape, kind, cursor.number(GGUFValueType.UINT64))
