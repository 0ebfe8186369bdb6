"""Threshold splitting and token-wise adaptive bit quantization (TS + TAB-Q).

Source: *Adaptive Split Computing* (arXiv 2511.04002), whose abstract states the two stages: TS keeps the
large activations apart, TAB-Q picks the bits of each token. Its stopping rule and its values are not
public; what we chose is marked so.

Per token ``x`` ``[d_model]``:

1. TS. The ``outliers`` largest magnitudes, or all of ``|x| >= threshold``, go to a sparse part: indices at
   ``ceil(log2(d_model))`` bits and values in float32 (ours: exact whatever their size; the usual choice is
   float16). The rest ``r`` is dense and does not store their places.
2. TAB-Q. Asymmetric integer quantization of ``r`` at ``Q`` bits,
   ``s = (max - min) / (2**Q - 1)``, ``z = round(-min / s)``, ``q = clip(round(r / s) + z, 0, 2**Q - 1)``,
   ``r' = s * (q - z)``, where ``min <= 0 <= max``. Ours: ``s`` is rounded up to bfloat16 before it is used,
   so that two bytes have the range of float32 and the codes know the scale that decodes them.
3. ``Q`` is the smallest in ``[q_min, q_max]`` with ``|r - r'| <= tolerance * |r|`` (Euclidean). Ours: this
   bounds the error itself, where the sister paper's guard (SLICER, arXiv 2511.11608) counts mismatches
   between codes of successive widths.
4. Ours: a token that no ``Q`` can hold within the tolerance (subnormal or beyond 1e36, more than 255
   outliers, or a tolerance finer than ``q_max`` bits) is stored raw, in float32.

Payload: five bytes per token (`_TOKEN`), all outlier indices, all outlier values, all raw tokens, all codes.
Everything else follows from these, so that the size is known before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from .bitpack import pack, pack_rows, packed_bytes, packed_rows_bytes, unpack, unpack_rows
from .checks import check_finite, check_shape, finite_hidden

_RAW = 0  # the width of a raw token: its codes take no bits
_MIN_WIDTH, _MAX_WIDTH = 2, 8
_MAX_OUTLIERS = 255
_MAX_SCALE = 0x7B7A  # as bfloat16, 1.3e36: 255 steps of it are finite in float32
_BLOCK = 2048  # values that are tried at several widths at once: few calls for one token, little memory for many
_TINY = np.float32(1.4e-45)  # the smallest there is: no division by zero where all values are 0

# All that a payload says of one token; the scale is a bfloat16, which is the high half of a float32.
_TOKEN = np.dtype([("width", "u1"), ("outliers", "u1"), ("zero", "u1"), ("scale", "<u2")])

# What the other fields may reach, by width. No zero point is small enough for a width that does not exist.
_LIMIT = np.zeros(256, [("outliers", "i8"), ("zero", "i8"), ("scale", "i8")])
_LIMIT["zero"] = -1
_LIMIT[_RAW] = (0, 0, 0)
for _width in range(_MIN_WIDTH, _MAX_WIDTH + 1):
    _LIMIT[_width] = (_MAX_OUTLIERS, 2**_width - 1, _MAX_SCALE)


@dataclass(frozen=True)
class TabQ:
    """The codec ``tabq``.

    Args:
        outliers: how many of a token's largest magnitudes are kept exact, 0 to 255.
        threshold: if given, every magnitude from here on is kept exact instead of a fixed number.
        tolerance: largest relative Euclidean error of a token's remainder (to float32 rounding). The default
            lets nearly every token of SmolLM2-135M at layer 10 take 4 bits.
        q_min: fewest bits per code, from 2.
        q_max: most bits per code, up to 8.

    Raises:
        CodecError: an option out of range.
    """

    outliers: int = 8
    threshold: float | None = None
    tolerance: float = 0.2
    q_min: int = _MIN_WIDTH
    q_max: int = _MAX_WIDTH

    name: ClassVar[str] = "tabq"

    def __post_init__(self) -> None:
        if not 0 <= self.outliers <= _MAX_OUTLIERS:
            raise CodecError(f"outliers {self.outliers}: a token keeps 0 to {_MAX_OUTLIERS}")
        if self.threshold is not None and not 0 < self.threshold < 1e38:
            raise CodecError(f"threshold {self.threshold}: give a magnitude above 0 and below 1e38, or None")
        if not 0 < self.tolerance < 1:
            raise CodecError(f"tolerance {self.tolerance}: give a relative error above 0 and below 1")
        if not _MIN_WIDTH <= self.q_min <= self.q_max <= _MAX_WIDTH:
            raise CodecError(
                f"q_min {self.q_min}, q_max {self.q_max}: {_MIN_WIDTH} <= q_min <= q_max <= {_MAX_WIDTH} holds"
            )

    def encode(self, hidden: NDArray[np.float32]) -> bytes:
        """Encode hidden states ``[tokens, d_model]`` float32; raises `CodecError` on NaN or infinity."""
        hidden = finite_hidden(hidden)
        sparse = self._outlier_mask(hidden)
        table, codes = self._quantize(hidden * ~sparse)
        outliers = np.add.reduce(sparse, axis=1, dtype=np.int64)
        raw = (table["width"] == _RAW) | (outliers > _MAX_OUTLIERS) | (table["scale"] > _MAX_SCALE)
        table["outliers"] = outliers
        raw_values = b""
        if np.count_nonzero(raw):
            table[raw] = 0
            sparse[raw] = False
            raw_values = hidden[raw].astype("<f4", copy=False).tobytes()
        return b"".join(
            (
                table.tobytes(),
                pack(sparse.nonzero()[1].astype(np.uint32), _index_width(hidden.shape[1])),
                hidden[sparse].astype("<f4", copy=False).tobytes(),
                raw_values,
                pack_rows(codes, table["width"], ~sparse),
            )
        )

    def _outlier_mask(self, hidden: NDArray[np.float32]) -> NDArray[np.bool_]:
        """TS of ``[tokens, d_model]``: true at the outliers."""
        magnitude = np.abs(hidden)
        if self.threshold is not None:
            return magnitude >= self.threshold
        sparse = np.zeros(hidden.shape, np.bool_)
        first = max(hidden.shape[1] - self.outliers, 0)
        if first < hidden.shape[1]:
            largest = magnitude.argpartition(first, axis=1)[:, first:]
            sparse[np.arange(len(hidden))[:, None], largest] = True
        return sparse

    def _quantize(self, rest: NDArray[np.float32]) -> tuple[NDArray[np.void], NDArray[np.uint8]]:
        """TAB-Q of the remainder ``[tokens, d_model]``, zero at the outliers: token table and codes."""
        low = np.minimum.reduce(rest, axis=1, keepdims=True, initial=0)
        high = np.maximum.reduce(rest, axis=1, keepdims=True, initial=0)
        peak: NDArray[np.float32] = np.maximum(np.maximum(high, -low), _TINY)
        # In units of the peak nothing overflows or vanishes when it is squared.
        unit, low, high = rest / peak, low / peak, high / peak

        # [widths, tokens, 1]: the scale as bits of a float32, the peak in steps, the zero point and the largest
        # step above it. The zero point is rounded as the values are, so that no code falls below 0.
        levels = _LIMIT["zero"][self.q_min : self.q_max + 1, None, None].astype(np.float32)
        scale = np.maximum((high - low) * (peak / levels), _TINY).view(np.uint32)
        scale = (scale + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
        gain: NDArray[np.float32] = np.divide(peak, scale.view(np.float32))
        zero = -np.rint(low * gain)
        top = levels - zero
        allowed: NDArray[np.float32] = np.add.reduce(unit * unit, axis=1, keepdims=True) * np.square(gain)
        allowed *= np.float32(self.tolerance**2)

        choice = _first_within(allowed, unit, gain, top)
        chosen = choice, np.arange(len(rest))
        zero = zero[chosen]
        table = np.zeros(len(rest), _TOKEN)
        table["width"] = np.array([*range(self.q_min, self.q_max + 1), _RAW])[choice]
        table["zero"] = zero[:, 0]
        table["scale"] = scale[chosen][:, 0] >> np.uint32(16)
        codes = np.minimum(np.rint(unit * gain[chosen]), top[chosen]) + zero
        return table, codes.astype(np.uint8)

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Decode hidden states ``[tokens, d_model]`` float32.

        The result takes at most 16 times the payload's size, and the payload's size is checked first.

        Raises:
            CodecError: wrong length, a field or an index out of range, a value that is not finite.
        """
        check_shape(tokens, d_model)
        table = _read_table(payload, tokens, d_model)
        widths, outliers = table["width"], table["outliers"].astype(np.int64)
        raw = widths == _RAW
        total, raw_total = int(outliers.sum()), d_model * int(np.count_nonzero(raw))
        index_width = _index_width(d_model)

        values_at = table.nbytes + packed_bytes(total, index_width)
        raw_at = values_at + 4 * total
        codes_at = raw_at + 4 * raw_total
        expected = codes_at + packed_rows_bytes(d_model - outliers, widths)
        if len(payload) != expected:
            raise CodecError(
                f"tabq payload of {len(payload)} bytes: its token table makes {expected}; send the frame again"
            )
        view = memoryview(payload)
        indices = unpack(view[table.nbytes : values_at], total, index_width, np.uint32)
        sparse = _sparse_mask(indices, outliers, d_model)
        codes = unpack_rows(view[codes_at:], widths, ~sparse)

        hidden = codes.astype(np.float32)
        hidden -= table["zero"][:, None]
        hidden *= (table["scale"].astype(np.uint32) << np.uint32(16)).view(np.float32)[:, None]
        hidden[sparse] = np.frombuffer(payload, "<f4", total, values_at)
        if raw_total:
            hidden[raw] = np.frombuffer(payload, "<f4", raw_total, raw_at).reshape(-1, d_model)
        check_finite(hidden)
        return hidden


def _first_within(
    allowed: NDArray[np.float32], unit: NDArray[np.float32], gain: NDArray[np.float32], top: NDArray[np.float32]
) -> NDArray[np.intp]:
    """Of each token ``[tokens]`` the first width whose squared error, in steps, is ``allowed``; -1 if none is.

    Args:
        allowed: ``[widths, tokens, 1]``.
        unit: values ``[tokens, d_model]``.
        gain: what turns ``unit`` into steps, ``[widths, tokens, 1]``.
        top: the largest step, ``[widths, tokens, 1]``.
    """
    choice = np.empty(len(unit), np.intp)
    choice.fill(-1)
    pending = np.arange(len(unit))
    start = 0
    while start < len(gain):
        stop = start + max(1, _BLOCK // unit.size)
        error = unit * gain[start:stop]
        error -= np.minimum(np.rint(error), top[start:stop])
        error *= error
        within = np.add.reduce(error, axis=2) <= allowed[start:stop, :, 0]
        found = np.logical_or.reduce(within)
        count = np.count_nonzero(found)
        if count:
            choice[pending[found]] = start + within.argmax(axis=0)[found]
            if count == len(pending):
                break
            left = ~found
            pending, unit = pending[left], unit[left]
            allowed, gain, top = allowed[:, left], gain[:, left], top[:, left]
        start = stop
    return choice


def _index_width(d_model: int) -> int:
    return (d_model - 1).bit_length()


def _read_table(payload: bytes, tokens: int, d_model: int) -> NDArray[np.void]:
    """The token table ``[tokens]`` of a payload, every field in range."""
    if len(payload) < tokens * _TOKEN.itemsize:
        raise CodecError(
            f"tabq payload of {len(payload)} bytes: the table of {tokens} tokens alone takes "
            f"{tokens * _TOKEN.itemsize}; send the frame again"
        )
    table: NDArray[np.void] = np.frombuffer(payload, _TOKEN, tokens)
    limit = _LIMIT[table["width"]]
    valid = (table["outliers"] <= np.minimum(limit["outliers"], d_model)) & (table["zero"] <= limit["zero"])
    valid &= table["scale"] <= limit["scale"]
    if not valid.all():
        row = int(valid.argmin())
        raise CodecError(
            f"tabq token {row} has width, outliers, zero point, scale {table[row].item()}: the width is 0 with the "
            f"rest 0, or {_MIN_WIDTH} to {_MAX_WIDTH} with at most d_model {d_model} outliers, a zero point below "
            f"2**width and a scale up to {_MAX_SCALE}; send the frame again"
        )
    return table


def _sparse_mask(indices: NDArray[np.uint32], outliers: NDArray[np.int64], d_model: int) -> NDArray[np.bool_]:
    """True at the outliers; ``indices`` hold those of one token after the other, each token's rising."""
    tokens = len(outliers)
    place = np.arange(0, tokens * d_model, d_model).repeat(outliers) + indices
    rising = place[1:] > place[:-1]
    if not (rising.all() and (indices < d_model).all()):
        raise CodecError(
            f"tabq outlier indices must rise within a token and stay below d_model {d_model}; send the frame again"
        )
    sparse = np.zeros((tokens, d_model), np.bool_)
    sparse.ravel()[place] = True
    return sparse
