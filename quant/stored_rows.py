"""Rows of a large array that stays in its file."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class StoredRows:
    """A C-ordered array of a file, whose rows are read when they are asked for.

    Not mapped: each look-up would make 64 KiB around its row resident, 400 tokens a small model's whole table.

    Args:
        path: the file, which stays open.
        dtype: of the array's elements.
        offset: of the array in the file, in bytes.
        shape: rows and columns.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is too short.
    """

    def __init__(self, path: Path, dtype: Any, offset: int, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._dtype, self._offset = np.dtype(dtype), offset
        self._row_bytes = shape[1] * self._dtype.itemsize
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size < offset + shape[0] * self._row_bytes:
            raise ValueError(f"{path} has {size} bytes, too few for {shape[0]} rows of {self._row_bytes}")

    @classmethod
    def of_npy(cls, path: Path) -> Self:
        """Those of a file that `numpy.save` wrote; raises `ValueError` if it has no such array."""
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 2 or by_columns or dtype.hasobject:
                raise ValueError(f"{path} has an array {shape} of {dtype}, not rows of numbers")
            return cls(path, dtype, file.tell(), shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Sequence[int]) -> NDArray[Any]:
        """The rows of these indices, each from 0 on, ``[indices, columns]``."""
        size = self._row_bytes
        read = b"".join([os.pread(self._file, size, self._offset + index * size) for index in indices])
        return np.frombuffer(read, self._dtype).reshape(len(indices), self.shape[1])
