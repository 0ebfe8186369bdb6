"""Threshold splitting and token-wise adaptive bit quantization (TS + TAB-Q).

Source: *Adaptive Split Computing* (arXiv 2511.04002), whose abstract states the two stages: TS keeps the
large activations apart, TAB-Q picks the bits of each token. Its stopping rule and its values are not
public; what we chose is marked so.

Per token ``x`` ``[d_model]``:

1. TS. The ``outliers`` largest magnitudes (less those that tie with the next one), or all of
   ``|x| >= threshold``, go to a sparse part, and so does whatever is beyond 6e35: indices at
   ``ceil(log2(d_model))`` bits and values in float32 (ours: exact whatever their size; the usual choice is
   float16). The rest ``r`` is dense and does not store their places.
2. TAB-Q. Asymmetric integer quantization of ``r`` at ``Q`` bits,
   ``s = (max - min) / (2**Q - 1)``, ``z = round(-min / s)``, ``q = clip(round(r / s) + z, 0, 2**Q - 1)``,
   ``r' = s * (q - z)``, where ``min <= 0 <= max``. Ours: ``s`` is rounded up to bfloat16 before it is used,
   so that two bytes have the range of float32 and the codes know the scale that decodes them.
3. ``Q`` is the smallest in ``[q_min, q_max]`` with ``|r - r'| <= tolerance * |r|`` (Euclidean). Ours: this
   bounds the error itself, where the sister paper's guard (SLICER, arXiv 2511.11608) counts mismatches
   between codes of successive widths.
4. Ours: a token that no ``Q`` can hold within the tolerance (a remainder that is nearly subnormal, more than
   255 outliers, or a tolerance finer than ``q_max`` bits) is stored raw, in float32.

Payload: five bytes per token (`TOKEN`), all outlier indices, all outlier values, all raw tokens, and per
width, rising, the codes of its tokens. Everything else follows from the first part, so that the size is known
before anything is allocated. `isthmus.quant.tabq_rans` has the same but for the codes.

A step of a decode sends one token, whose arrays are so small that the number of NumPy calls is what it costs, most of
all when a model's weights have just passed through the caches. Hence arithmetic whose range is kept by two constants
(`_HUGE`, `_SMALLEST_RANGE`) and not by normalizing, and a compiled form of the whole (`_tabq.c`), a tenth of the time.
Where an installation has none the NumPy form here serves; its sums have another order, so that a token whose error
meets the tolerance to the last bit may get another width, which any decoder takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from .bitpack import pack, packed_bytes, unpack
from .checks import check_finite, check_shape, shaped_hidden
from .tabq_front import MAX_WIDTH, MIN_WIDTH, RAW, TOKEN, Front, Quantized, rows_of

try:
    from . import _tabq
except ImportError:  # no compiler was there at the installation
    _tabq = None  # type: ignore[assignment]

TOLERANCES = (0.05, 0.1, 0.2, 0.3, 0.4)  # those that a bundle's levels have, from the finest

_MAX_OUTLIERS = 255
_BLOCK = 2048  # values that are tried at several widths at once: few calls for one token, little memory for many

# Larger magnitudes are always outliers, so that a scale stays below this (`MAX_SCALE`) and 255 steps of it are finite.
_HUGE = 2.0**119
# A narrower remainder is quantized as if it were this wide: no scale is 0, not even of zeros, and none is subnormal.
_SMALLEST_RANGE = 2.0**-118

_BELOW_BFLOAT16, _BFLOAT16 = np.uint32(0x0000FFFF), np.uint32(0xFFFF0000)
_LEVELS = (2 ** np.arange(MAX_WIDTH + 1) - 1).astype(np.float32)  # by width, the largest code


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
    q_min: int = MIN_WIDTH
    q_max: int = MAX_WIDTH

    name: ClassVar[str] = "tabq"

    def __post_init__(self) -> None:
        if not 0 <= self.outliers <= _MAX_OUTLIERS:
            raise CodecError(f"outliers {self.outliers}: a token keeps 0 to {_MAX_OUTLIERS}")
        if self.threshold is not None and not 0 < self.threshold < 1e38:
            raise CodecError(f"threshold {self.threshold}: give a magnitude above 0 and below 1e38, or None")
        if not 0 < self.tolerance < 1:
            raise CodecError(f"tolerance {self.tolerance}: give a relative error above 0 and below 1")
        if not MIN_WIDTH <= self.q_min <= self.q_max <= MAX_WIDTH:
            raise CodecError(
                f"q_min {self.q_min}, q_max {self.q_max}: {MIN_WIDTH} <= q_min <= q_max <= {MAX_WIDTH} holds"
            )

    def encode(self, hidden: NDArray[np.float32], token_ids: Sequence[int] = ()) -> bytes:
        """Encode hidden states ``[tokens, d_model]`` float32; raises `CodecError` on NaN or infinity."""
        hidden = shaped_hidden(hidden)
        payload = None if _tabq is None else _tabq.encode(hidden, hidden.shape[1], *self._options)
        if payload is None:
            check_finite(hidden)
            payload = self._encode_numpy(hidden)
        return payload

    def _encode_numpy(self, hidden: NDArray[np.float32]) -> bytes:
        """What `encode` gives for finite hidden states."""
        quantized = self._quantize_numpy(hidden)
        widths = quantized.head[:, 0].tolist()
        packed = []
        for width in sorted(set(widths) - {RAW}):
            rows = rows_of(width, widths)
            packed.append(pack(quantized.codes[rows][quantized.coded[rows]], width))
        return b"".join((*quantized.front(), *packed))

    def quantize(self, hidden: NDArray[np.float32]) -> Quantized:
        """TS and TAB-Q of finite hidden states ``[tokens, d_model]`` float32, contiguous."""
        if _tabq is None:
            return self._quantize_numpy(hidden)
        tokens, d_model = hidden.shape
        head = np.empty((tokens, TOKEN.size), np.uint8)
        codes = np.empty((tokens, d_model), np.uint8)
        coded = np.empty((tokens, d_model), np.bool_)
        _tabq.quantize(hidden, d_model, *self._options, head, codes, coded)
        raw = head[:, 0] == RAW
        sparse = ~(coded | raw[:, None])
        return Quantized(head, codes, coded, sparse.nonzero()[1], hidden[sparse], hidden[raw])

    @cached_property
    def _options(self) -> tuple[float, int, float, int, int]:
        """As the compiled form takes them."""
        threshold = -1.0 if self.threshold is None else float(_below(self.threshold))
        return threshold, self.outliers, self.tolerance**2, self.q_min, self.q_max

    def _quantize_numpy(self, hidden: NDArray[np.float32]) -> Quantized:
        """What `quantize` gives."""
        tokens, d_model = hidden.shape
        magnitude = np.abs(hidden)
        dense = magnitude <= self._cutoff(magnitude)
        rest = hidden * dense

        low: NDArray[np.float32] = np.minimum.reduce(rest, axis=1, keepdims=True, initial=0)
        high: NDArray[np.float32] = np.maximum.reduce(rest, axis=1, keepdims=True, initial=_SMALLEST_RANGE)
        scales = (high - low) / _LEVELS[self.q_min : self.q_max + 1]  # [tokens, widths]
        bits = scales.view(np.uint32)
        bits += _BELOW_BFLOAT16
        bits &= _BFLOAT16

        outliers = d_model - np.add.reduce(dense, axis=1)
        widths = self._narrowest(rest, scales, outliers.tolist())
        head = np.zeros((tokens, TOKEN.size), np.uint8)
        codes = np.empty((tokens, d_model), np.uint8)
        raw: slice | list[int] = []
        for width in set(widths):
            rows = rows_of(width, widths)
            if width == RAW:
                raw = rows
                continue
            scale = scales[rows, width - self.q_min : width - self.q_min + 1]
            zero = np.rint(low[rows] / scale)  # rounded as the values are, so that no code falls below 0
            steps = np.rint(rest[rows] / scale)
            steps -= zero
            codes[rows] = np.minimum(steps, _LEVELS[width])
            head[rows, 0] = width
            head[rows, 1] = outliers[rows]
            head[rows, 2:3] = -zero
            head[rows, 3:] = scale.astype("<f4", copy=False).view(np.uint8)[:, 2:]

        dense[raw] = True
        sparse = ~dense
        dense[raw] = False
        return Quantized(head, codes, dense, sparse.nonzero()[1], hidden[sparse], hidden[raw])

    def _cutoff(self, magnitude: NDArray[np.float32]) -> NDArray[np.float32] | np.float32:
        """TS of ``[tokens, d_model]``: the largest magnitude that is not an outlier, one or ``[tokens, 1]``."""
        if self.threshold is not None:
            return _below(self.threshold)
        rank = magnitude.shape[1] - self.outliers - 1
        if rank < 0:
            return np.float32(-1)
        ordered = magnitude.copy()
        ordered.partition(rank, axis=1)
        return np.minimum(ordered[:, rank : rank + 1], np.float32(_HUGE))

    def _narrowest(self, rest: NDArray[np.float32], scales: NDArray[np.float32], outliers: list[int]) -> list[int]:
        """TAB-Q: of each token the narrowest width that keeps the tolerance, `RAW` if none does.

        Args:
            rest: the remainder ``[tokens, d_model]``, zero at the outliers.
            scales: ``[tokens, widths]`` from ``q_min`` on.
            outliers: how many outliers each token has.
        """
        widths = [RAW] * len(rest)
        pending = [row for row, count in enumerate(outliers) if count <= _MAX_OUTLIERS]
        start = 0
        while pending and start < scales.shape[1]:
            stop = start + max(1, _BLOCK // (len(pending) * rest.shape[1]))
            if len(pending) < len(rest):
                steps = rest[pending, None] / scales[pending, start:stop, None]
            else:
                steps = rest[:, None] / scales[:, start:stop, None]
            # In steps no square overflows or vanishes. A code that is clipped lay half way between two, and errs alike.
            allowed = np.vecdot(steps, steps)
            allowed *= self.tolerance**2
            steps -= np.rint(steps)
            for row, within in zip(pending, (np.vecdot(steps, steps) <= allowed).tolist(), strict=True):
                if True in within:
                    widths[row] = self.q_min + start + within.index(True)
            pending = [row for row in pending if widths[row] == RAW]
            start = stop
        return widths

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Decode hidden states ``[tokens, d_model]`` float32.

        The result takes at most 16 times the payload's size, and the payload's size is checked first.

        Raises:
            CodecError: wrong length, a field or an index out of range, a value that is not finite.
        """
        check_shape(tokens, d_model)
        # A value takes two bits at least.
        if _tabq is not None and len(payload) >= tokens * TOKEN.size + tokens * d_model // 4:
            hidden = np.empty((tokens, d_model), np.float32)
            if _tabq.decode(payload, tokens, hidden):
                return hidden
        return _decode_numpy(payload, tokens, d_model)


def _below(threshold: float) -> np.float32:
    """The largest magnitude that is no outlier."""
    return np.nextafter(np.float32(min(threshold, _HUGE)), np.float32(0))


def _decode_numpy(payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
    """What `TabQ.decode` gives, and every complaint about a payload."""
    front = Front.read(payload, tokens, d_model)
    expected = front.size + sum(packed_bytes(count, width) for width, count in front.counts.items())
    if len(payload) != expected:
        raise CodecError(
            f"tabq payload of {len(payload)} bytes: its token table makes {expected}; send the frame again"
        )
    coded, start = front.coded(), front.size
    codes = np.zeros((tokens, d_model), np.uint8)
    for width, count in front.counts.items():
        stop = start + packed_bytes(count, width)
        members = coded
        if len(front.counts) > 1:
            rows = rows_of(width, front.widths)
            members = np.zeros_like(coded)
            members[rows] = coded[rows]
        codes[members] = unpack(payload[start:stop], count, width, np.uint8)
        start = stop
    return front.reconstruct(np.subtract(codes, front.head[:, 2:3], dtype=np.float32))
