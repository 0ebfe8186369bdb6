"""Trellis-coded quantization of rows of numbers, and their entropy coding with tables fixed beforehand.

Sources: trellis-coded quantization over Ungerboeck's 8-state trellis (Marcellin and Fischer, 1990; JPEG 2000 part 2),
with zero in both union quantizers and the path chosen by distortion plus rate, as in dependent quantization (VVC);
the coder is range asymmetric numeral systems (Duda, arXiv 1311.2540) with 14-bit frequencies and bytes out. On
Gaussian numbers this stays within 0.5 to 0.7 dB of the rate-distortion bound where scalar quantization with the same
coder is 1.2 to 1.5 dB away. Ours: the coder begins in a state that the caller chooses, so that what would be waste
carries a token's id, and that decoding must end in.

A row's path begins in state 0 and its numbers are coded in order, so that rows do not depend on each other. An index
of magnitude above 15 is an escape and its excess in Elias' gamma code.

Rows spread unlike each other (hidden states of a language model by a deviation of 0.4 nepers): a row's *gain*, which
the decoder has to be told, moves all its numbers to the tables of wider or narrower ones, for 4 to 7 % of the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError

LIMIT = 15  # largest magnitude of an index with a symbol of its own
SYMBOLS = 2 * LIMIT + 2
FREQUENCIES = 1 << 14  # what a table's frequencies sum to
MAX_SEED = 1 << 23
GAINS = 16
_PER_OCTAVE = 4  # contexts, and gains
_ORIGIN = 14  # context and gain of numbers that deviate by one step; with the two above as in _native.c
_MAX_CONTEXT = 30
MAX_VALUE = float(1 << 19)  # in steps; larger ones have no index

# Squared steps that a bit is worth to the path search; between 0.4 and 1 the rate-distortion curve hardly moves.
BIT_PRICE = 0.6

Floats = NDArray[np.float32]


def native() -> ModuleType:
    """The compiled part; raises `CodecError` if the installation has none."""
    try:
        from . import _native
    except ImportError as error:
        raise CodecError(
            "this installation has no compiled coder, which codecs with tables need: install a C compiler and "
            "install isthmus again, or choose raw16 or tabq"
        ) from error
    return _native


def has_native() -> bool:
    """Whether the compiled part is there."""
    try:
        native()
    except CodecError:
        return False
    return True


def coder_output(indices: int) -> bytearray:
    """Room for so many coded indices."""
    return bytearray(8 * indices + 16)  # an escape takes at most 58 bits


@dataclass(frozen=True)
class TrellisTables:
    """What encoder and decoder share for rows of ``width`` numbers, all counted in steps.

    Attributes:
        contexts: uint8 ``[width]``; with its row's gain, which table a number uses: see `contexts_of`.
        cumulative: uint16 ``[tables, 2, SYMBOLS + 1]``, running sums of frequencies, for both union quantizers.
        offsets: float32 ``[tables, 2, SYMBOLS - 1]``, from a quantizer's point to the mean of what it stands for.
    """

    contexts: NDArray[np.uint8]
    cumulative: NDArray[np.uint16]
    offsets: Floats

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return len(self.contexts)

    @cached_property
    def bits(self) -> Floats:
        """Bits of each symbol, ``[tables, 2, SYMBOLS]``."""
        frequencies = np.diff(self.cumulative.astype(np.int64), axis=-1)
        return (np.log2(FREQUENCIES) - np.log2(frequencies)).astype(np.float32)

    @cached_property
    def points(self) -> Floats:
        """What each symbol stands for, ``[tables, 2, SYMBOLS]``; the escape's is not used."""
        return np.pad(_points() + self.offsets, ((0, 0), (0, 0), (0, 1)))

    @cached_property
    def coder(self) -> tuple[NDArray[np.uint8], NDArray[np.uint16], Floats, Floats, float]:
        """What the compiled path search takes besides its values."""
        return self.contexts, self.cumulative, self.points, (BIT_PRICE * self.bits).astype(np.float32), BIT_PRICE

    def gains(self, values: Floats) -> NDArray[np.uint8]:
        """The gain of each row of float32 ``[rows, width]`` in steps."""
        found = np.empty(len(values), np.uint8)
        native().gains(values, self.contexts, found)
        return found

    def quantize(self, values: Floats, gains: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Indices ``[rows, width]`` that make squared error + `BIT_PRICE` x bits least, row by row.

        Args:
            values: float32 ``[rows, width]`` in steps, of magnitudes up to `MAX_VALUE`.
            gains: of the rows.
        """
        contexts, cumulative, *rest = self.coder
        indices = np.empty(values.shape, np.int32)
        native().quantize(values, contexts, cumulative, gains, *rest, indices)
        return indices

    def encode(self, indices: NDArray[np.int32], gains: NDArray[np.uint8], seed: int) -> bytes:
        """Code rows of indices; `decode` gives ``seed`` back, which is below `MAX_SEED`."""
        output = coder_output(indices.size)
        start = native().encode(indices, self.contexts, self.cumulative, gains, seed, output, True)
        return bytes(memoryview(output)[start:])

    def decode(self, payload: bytes | memoryview, gains: NDArray[np.uint8]) -> tuple[Floats, int]:
        """Values ``[rows, width]`` in steps, and the seed; ``gains`` are those of the rows.

        Raises:
            CodecError: the payload is longer or shorter than what `encode` wrote, or holds an impossible escape.
        """
        values = np.empty((len(gains), self.width), np.float32)
        seed = native().decode(payload, self.contexts, self.cumulative, gains, self.points, values, True)
        if seed < 0:
            raise CodecError(f"{len(payload)} coded bytes that are not {len(gains)} rows; send the frame again")
        return values, seed

    @classmethod
    def fit(cls, values: Floats, contexts: NDArray[np.uint8], rounds: int = 4) -> TrellisTables:
        """Tables for numbers like ``values`` ``[rows, width]``, by turns of quantizing and counting.

        Source: entropy-constrained trellis-coded quantization (Fischer and Wang, 1992). Frequencies and offsets are
        made symmetric in the sign.
        """
        values = np.ascontiguousarray(values, np.float32)
        spread = 0.8 * 2.0 ** ((np.arange(int(contexts.max()) + GAINS) - _ORIGIN) / _PER_OCTAVE) + 0.05
        points = _points()
        frequencies = np.exp(-np.abs(points) / spread[:, None, None])
        frequencies = np.concatenate([frequencies, 1e-3 * frequencies.sum(-1, keepdims=True)], axis=-1)
        offsets = np.zeros((*frequencies.shape[:-1], SYMBOLS - 1), np.float32)
        tables = cls(contexts, running_sums(frequencies), offsets)
        gains = tables.gains(values)
        for _ in range(rounds):
            indices = tables.quantize(values, gains)
            counts = np.zeros(frequencies.shape, np.int64)
            sums = np.zeros(offsets.shape, np.float64)
            native().count(values, indices, contexts, gains, counts, sums)
            seen = counts.astype(np.float64)
            seen[..., :-1] += seen[..., -2::-1]
            prior = frequencies / frequencies.sum(-1, keepdims=True)
            frequencies = seen + _PRIOR_COUNT * prior
            means = (sums - sums[..., ::-1]) / (seen[..., :-1] + _PRIOR_COUNT)
            tables = cls(contexts, running_sums(frequencies), means.astype(np.float32))
        return tables


_PRIOR_COUNT = 20.0


def contexts_of(deviations: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """The contexts of numbers that deviate so far, in steps, in rows of the middle gain: a quarter of an octave each.

    Those of context 0 deviate by a third of a step or less.
    """
    octaves = np.log2(np.maximum(deviations, 1e-9))
    contexts = np.rint(_PER_OCTAVE * octaves) + _ORIGIN - GAINS // 2
    return np.clip(contexts, 0, _MAX_CONTEXT).astype(np.uint8)


def _points() -> Floats:
    """Points of both union quantizers, ``[2, SYMBOLS - 1]``: even multiples, or zero and the odd ones."""
    index = np.arange(-LIMIT, LIMIT + 1)
    return np.stack([2 * index, 2 * index - np.sign(index)]).astype(np.float32)


def running_sums(frequencies: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Running sums of integer frequencies, each at least 1, that sum to `FREQUENCIES`."""
    shares = frequencies / frequencies.sum(-1, keepdims=True)
    counts = np.maximum(np.rint(shares * FREQUENCIES).astype(np.int64), 1)
    largest = counts.argmax(-1)[..., None]
    missing = FREQUENCIES - counts.sum(-1, keepdims=True)
    np.put_along_axis(counts, largest, np.take_along_axis(counts, largest, -1) + missing, -1)
    return np.concatenate([np.zeros_like(largest), counts.cumsum(-1)], axis=-1).astype(np.uint16)
