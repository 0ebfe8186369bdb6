"""Unsigned codes to bits and back.

The layout is by bit plane: bit 0 of every code, then bit 1 of every code, and so on, without gaps; only
the end of a run is padded to a byte, with zeros. Whole planes are what NumPy moves fastest.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError

Code = TypeVar("Code", np.uint8, np.uint32, np.intp)

# By type of code, as a column to broadcast over the codes: how far each plane is shifted, and its bit.
_SHIFT: dict[type, NDArray[Any]] = {
    t: np.arange(np.iinfo(t).bits, dtype=t)[:, None] for t in (np.uint8, np.uint32, np.intp)
}
_BIT = {t: t(1) << shift for t, shift in _SHIFT.items()}


def packed_bytes(count: int, width: int) -> int:
    """Bytes that ``count`` codes of ``width`` bits take."""
    return (count * width + 7) // 8


def pack(codes: NDArray[Code], width: int) -> bytes:
    """Pack codes ``[count]``, each below ``2**width``, into `packed_bytes` bytes."""
    return np.packbits(codes & _BIT[codes.dtype.type][:width]).tobytes()


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
    planes <<= _SHIFT[dtype][:width]
    codes: NDArray[Code] = np.bitwise_or.reduce(planes, axis=0)
    return codes
