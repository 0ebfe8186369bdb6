"""Unsigned codes to bits and back, at one width or at a width that differs from row to row.

The layout is by bit plane: bit 0 of every code, then bit 1 of every code, and so on, without gaps; only
the end of a run is padded to a byte, with zeros. Whole planes are what NumPy moves fastest.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError

Code = TypeVar("Code", np.uint8, np.uint32)

_SHIFT = np.arange(32, dtype=np.uint32)[:, None]
_BIT = np.uint32(1) << _SHIFT


def packed_bytes(count: int, width: int) -> int:
    """Bytes that ``count`` codes of ``width`` bits take."""
    return (count * width + 7) // 8


def pack(codes: NDArray[Code], width: int) -> bytes:
    """Pack codes ``[count]``, each below ``2**width``, into `packed_bytes` bytes."""
    return np.packbits(codes & _BIT[:width].astype(codes.dtype)).tobytes()


def unpack(data: bytes | memoryview, count: int, width: int, dtype: type[Code]) -> NDArray[Code]:
    """Undo `pack`: ``count`` codes of ``width`` bits, ``width`` at most the bits of ``dtype``.

    Raises:
        CodecError: ``data`` has not exactly `packed_bytes` bytes, or its padding is not zero.
    """
    expected = packed_bytes(count, width)
    if len(data) != expected:
        raise CodecError(
            f"{len(data)} bytes of packed codes: {count} of {width} bits take {expected}; send the frame again"
        )
    padding = 8 * expected - count * width
    if padding and data[-1] & ((1 << padding) - 1):
        raise CodecError(
            f"last packed byte is {data[-1]}: its {padding} low bits pad and must be 0; send the frame again"
        )
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width)
    planes = bits.reshape(width, count).astype(dtype, copy=False)
    planes <<= _SHIFT[:width].astype(dtype)
    codes: NDArray[Code] = np.bitwise_or.reduce(planes, axis=0)
    return codes


def packed_rows_bytes(counts: NDArray[np.int64], widths: NDArray[np.uint8]) -> int:
    """Bytes of `pack_rows` for rows that store ``counts[row]`` codes of ``widths[row]`` bits."""
    return sum(packed_bytes(int(counts[widths == width].sum()), width) for width in set(widths.tolist()))


def pack_rows(codes: NDArray[np.uint8], widths: NDArray[np.uint8], stored: NDArray[np.bool_]) -> bytes:
    """Pack the ``stored`` elements of ``codes`` ``[rows, columns]``, row by row at ``widths[row]`` bits.

    Rows of one width form one run, runs go in ascending width, and a row of width 0 takes no bytes.
    """
    runs = sorted(set(widths.tolist()))
    return b"".join(pack(codes[stored & (widths == width)[:, None]], width) for width in runs)


def unpack_rows(data: bytes | memoryview, widths: NDArray[np.uint8], stored: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Undo `pack_rows`; elements that are not stored come back as 0.

    Raises:
        CodecError: ``data`` has not exactly `packed_rows_bytes` bytes, or padding is not zero.
    """
    codes = np.zeros(stored.shape, np.uint8)
    start = 0
    for width in sorted(set(widths.tolist())):
        members = stored & (widths == width)[:, None]
        count = int(np.count_nonzero(members))
        stop = start + packed_bytes(count, width)
        codes[members] = unpack(data[start:stop], count, width, np.uint8)
        start = stop
    if start != len(data):
        raise CodecError(f"{len(data)} bytes of packed rows: their widths take {start}; send the frame again")
    return codes
