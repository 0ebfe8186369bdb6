"""The payload of TS and TAB-Q up to its codes: token table, outliers, raw tokens.

`isthmus.quant.tabq` packs the codes that follow, `isthmus.quant.tabq_rans` entropy codes them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from .bitpack import pack, packed_bytes, unpack
from .checks import check_finite

RAW = 0  # the width of a raw token: its codes take no bits
MIN_WIDTH, MAX_WIDTH = 2, 8
MAX_SCALE = 0x7AFF  # the largest bfloat16 below 2**119, of which 255 are finite

# All that a payload says of one token: width, number of outliers, zero point, scale. The scale is a bfloat16,
# which is the high half of a float32.
TOKEN = struct.Struct("<BBBH")


class Quantized(NamedTuple):
    """What TS and TAB-Q make of hidden states.

    Attributes:
        head: uint8 ``[tokens, 5]``, the token table.
        codes: uint8 ``[tokens, d_model]``; no meaning where nothing is coded.
        coded: bool ``[tokens, d_model]``: neither an outlier nor of a raw token.
        indices: of all outliers within their tokens.
        values: float32, of all outliers.
        raw: float32 ``[raw tokens, d_model]``.
    """

    head: NDArray[np.uint8]
    codes: NDArray[np.uint8]
    coded: NDArray[np.bool_]
    indices: NDArray[np.intp]
    values: NDArray[np.float32]
    raw: NDArray[np.float32]

    def front(self) -> tuple[bytes, ...]:
        """A payload's parts before its codes."""
        return (
            self.head.tobytes(),
            pack(self.indices, index_width(self.codes.shape[1])),
            self.values.astype("<f4", copy=False).tobytes(),
            self.raw.astype("<f4", copy=False).tobytes(),
        )


class Front(NamedTuple):
    """What a payload says before its codes, checked; it takes memory in proportion to the payload.

    Attributes:
        head: uint8 ``[tokens, 5]``, the token table.
        widths: of each token.
        counts: codes of each width, rising; `RAW` has none.
        places: int64, of all outliers in all ``tokens * d_model`` values.
        values: float32, of all outliers.
        raw: float32 ``[raw tokens, d_model]``.
        size: bytes that it takes.
    """

    head: NDArray[np.uint8]
    widths: list[int]
    counts: dict[int, int]
    places: NDArray[np.int64]
    values: NDArray[np.float32]
    raw: NDArray[np.float32]
    size: int

    @classmethod
    def read(cls, payload: bytes, tokens: int, d_model: int) -> Front:
        """Read the front of a payload; raises `CodecError` if it is too short or a field or index is out of range."""
        widths, outliers = _read_table(payload, tokens, d_model)
        counts = {width: d_model * widths.count(width) for width in sorted(set(widths))}
        for width, count in zip(widths, outliers, strict=True):
            counts[width] -= count
        total, index_bits = sum(outliers), index_width(d_model)
        raw_total = counts.pop(RAW, 0)
        indices_at = tokens * TOKEN.size
        values_at = indices_at + packed_bytes(total, index_bits)
        raw_at = values_at + 4 * total
        size = raw_at + 4 * raw_total
        if len(payload) < size:
            raise CodecError(
                f"tabq payload of {len(payload)} bytes: its token table makes {size} before any code; "
                "send the frame again"
            )
        indices = unpack(memoryview(payload)[indices_at:values_at], total, index_bits, np.uint32)
        places = _flat_places(indices, outliers, d_model)
        head = np.frombuffer(payload, np.uint8, indices_at).reshape(tokens, -1)
        values = np.frombuffer(payload, "<f4", total, values_at)
        raw = np.frombuffer(payload, "<f4", raw_total, raw_at).reshape(-1, d_model)
        return cls(head, widths, counts, places, values, raw, size)

    def coded(self) -> NDArray[np.bool_]:
        """Which of ``[tokens, d_model]`` values have a code: neither outliers nor of raw tokens."""
        d_model = (sum(self.counts.values()) + len(self.places) + self.raw.size) // len(self.head)
        coded = np.ones((len(self.head), d_model), np.bool_)
        coded.put(self.places, False)
        if len(self.raw):
            coded[rows_of(RAW, self.widths)] = False
        return coded

    def reconstruct(self, steps: NDArray[np.float32]) -> NDArray[np.float32]:
        """Hidden states from codes less their zero points, float32 ``[tokens, d_model]``, which are overwritten.

        Raises:
            CodecError: an outlier or a raw value that is not finite.
        """
        scale = np.zeros((len(steps), 4), np.uint8)
        scale[:, 2:] = self.head[:, 3:]
        steps *= scale.view("<f4")
        steps.put(self.places, self.values)
        if len(self.raw):
            steps[rows_of(RAW, self.widths)] = self.raw
        check_finite(steps)
        return steps


def index_width(d_model: int) -> int:
    """Bits of an outlier's index."""
    return (d_model - 1).bit_length()


def rows_of(width: int, widths: Sequence[int]) -> slice | list[int]:
    """The rows of one width; a slice, which copies nothing, where it is that of all."""
    if widths.count(width) == len(widths):
        return slice(None)
    return [row for row, other in enumerate(widths) if other == width]


def _read_table(payload: bytes, tokens: int, d_model: int) -> tuple[list[int], list[int]]:
    """Widths and numbers of outliers of the tokens of a payload, whose every field is in range."""
    size = tokens * TOKEN.size
    if len(payload) < size:
        raise CodecError(
            f"tabq payload of {len(payload)} bytes: the table of {tokens} tokens alone takes {size}; "
            "send the frame again"
        )
    widths, counts = [], []
    for row, (width, outliers, zero, scale) in enumerate(TOKEN.iter_unpack(payload[:size])):
        if MIN_WIDTH <= width <= MAX_WIDTH:
            valid = outliers <= d_model and zero < 2**width and scale <= MAX_SCALE
        else:
            valid = width == RAW and outliers == zero == scale == 0
        if not valid:
            raise CodecError(
                f"tabq token {row} has width, outliers, zero point, scale {(width, outliers, zero, scale)}: the width "
                f"is {RAW} with the rest 0, or {MIN_WIDTH} to {MAX_WIDTH} with at most d_model {d_model} outliers, "
                f"a zero point below 2**width and a scale up to {MAX_SCALE}; send the frame again"
            )
        widths.append(width)
        counts.append(outliers)
    return widths, counts


def _flat_places(indices: NDArray[np.uint32], outliers: list[int], d_model: int) -> NDArray[np.int64]:
    """Where the outliers lie in all ``tokens * d_model`` values; ``indices`` rise within a token."""
    places = indices.astype(np.int64)
    if len(outliers) > 1:
        places += np.arange(0, len(outliers) * d_model, d_model).repeat(outliers)
    if not (np.logical_and.reduce(places[1:] > places[:-1]) and np.logical_and.reduce(indices < d_model)):
        raise CodecError(
            f"tabq outlier indices must rise within a token and stay below d_model {d_model}; send the frame again"
        )
    return places
