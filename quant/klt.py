"""The codec ``klt``: prediction from the token, a calibrated transform, trellis-coded quantization, entropy coding.

A hidden state ``x`` of the token ``t`` is sent as the coefficients ``c = x @ forward - predicted[t]``: what is left of
it after a prediction that both sides know, in the eigenbasis of that remainder's covariance weighted by the back's
sensitivity (a Karhunen–Loève transform; `isthmus.export.klt_fit` makes it). In that basis equal errors do equal harm,
so that one step serves all of a token's coefficients (reverse water-filling), and those that vary by less than it are
not sent. Between tokens the harm differs: a linear function of the hidden state foretells it, and a token's *fineness*,
in quarter octaves of its step, follows that.

A payload says itself how to decode it: a byte with the level and, four bits above, the first coded token's gain; if its
highest bit is set, the tokens that are sent raw (a count, their places, their values as ``raw16`` has them); the ids of
the coded tokens but the first, and their gains and finenesses, packed; and their coefficients, coded by
`isthmus.quant.trellis`, whose seed is the first token's id and fineness. A token is sent raw if it is farther from its
prediction than any in calibration, as attention sinks are, and so every finite input survives.

A token's reconstruction depends on that token alone: rows are multiplied in one order whatever their number, and each
has a trellis path of its own.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from .bitpack import pack, packed_bytes, unpack
from .checks import check_finite, check_shape, shaped_hidden
from .codec import Raw16
from .stored_rows import StoredRows
from .trellis import GAINS, Floats, TrellisTables, coder_output, native

MAX_LEVELS = 8
_RAW_SECTION = 0x80  # of the first byte
GAIN_BITS = 4
FINENESS_BITS = 3
ORDINARY_FINENESS = 3  # of a token whose step is its level's
_GAIN_SHIFT = 3  # in the first byte
_FINENESSES = 1 << FINENESS_BITS  # as in _native.c
_MODE_BITS = GAIN_BITS + FINENESS_BITS
_RAW_HEADER = struct.Struct("<HI")  # tokens, bytes of their values
_PREDICTED = "klt-predicted.npy"
_TABLES = "klt-tables.npz"


def relative_steps() -> Floats:
    """The step of a token of each fineness in those of its level: a quarter of an octave less than the one before."""
    return np.exp2((ORDINARY_FINENESS - np.arange(_FINENESSES)) / 4).astype(np.float32)


@dataclass(frozen=True)
class KLTLevel:
    """One point on the rate-distortion curve.

    Attributes:
        step: of every coefficient of a token of `ORDINARY_FINENESS`.
        bits: per element of the hidden state, as measured in calibration.
        tables: for the leading coefficients; the others are taken as predicted.
    """

    step: float
    bits: float
    tables: TrellisTables


@dataclass(frozen=True)
class KLTTables:
    """What export calibrates for the hidden states at one split.

    Attributes:
        forward: float32 ``[d_model, d_model]``, hidden state to coefficients, the largest variance first.
        inverse: float32 ``[d_model, d_model]``, its inverse.
        predicted: int8 ``[vocab_size, d_model]``, each token's coefficients in units of ``predicted_scale``; in
            memory as they were fitted, or in the file.
        predicted_scale: float32 ``[d_model]``.
        importance: float32 ``[d_model]``; a token's fineness is ``hidden @ importance + importance_bias``, rounded.
        importance_bias: as there.
        limit: largest Euclidean norm of coefficients that are coded.
        levels: from fine to coarse.
    """

    forward: Floats
    inverse: Floats
    predicted: NDArray[np.int8] | StoredRows
    predicted_scale: Floats
    importance: Floats
    importance_bias: float
    limit: float
    levels: tuple[KLTLevel, ...]

    def save(self, folder: Path) -> None:
        """Write the tables as two files of a bundle half."""
        arrays: dict[str, Any] = {
            "forward": self.forward,
            "inverse": self.inverse,
            "predicted_scale": self.predicted_scale,
            "importance": self.importance,
            "importance_bias": self.importance_bias,
            "limit": self.limit,
        }
        for number, level in enumerate(self.levels):
            arrays[f"step.{number}"], arrays[f"bits.{number}"] = level.step, level.bits
            arrays |= {f"{field.name}.{number}": getattr(level.tables, field.name) for field in fields(TrellisTables)}
        np.savez(folder / _TABLES, **arrays)
        np.save(folder / _PREDICTED, self.predicted[range(len(self.predicted))])

    @classmethod
    def load(cls, folder: Path, *, d_model: int, vocab_size: int) -> KLTTables:
        """Read what `save` wrote; the predictions stay in their file.

        Raises:
            CodecError: not there, damaged, or of another model.
        """
        try:
            with np.load(folder / _TABLES, allow_pickle=False) as file:
                arrays = dict(file)
            predicted = StoredRows.of_npy(folder / _PREDICTED)
            levels: list[KLTLevel] = []
            while f"step.{len(levels)}" in arrays:
                number = len(levels)
                tables = TrellisTables(**{f.name: arrays[f"{f.name}.{number}"] for f in fields(TrellisTables)})
                if len(tables.cumulative) != int(tables.contexts.max()) + GAINS:
                    raise ValueError("tables without gains")
                levels.append(KLTLevel(float(arrays[f"step.{number}"]), float(arrays[f"bits.{number}"]), tables))
            if not 1 <= len(levels) <= MAX_LEVELS:
                raise ValueError(f"{len(levels)} levels where 1 to {MAX_LEVELS} fit")
            result = cls(
                arrays["forward"],
                arrays["inverse"],
                predicted,
                arrays["predicted_scale"],
                arrays["importance"],
                float(arrays["importance_bias"]),
                float(arrays["limit"]),
                tuple(levels),
            )
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise CodecError(f"{folder / _TABLES}: no calibrated codec there ({error}); export again") from error
        if result.forward.shape != (d_model, d_model) or predicted.shape != (vocab_size, d_model):
            raise CodecError(
                f"{folder / _TABLES}: for d_model {len(result.forward)} and {len(predicted)} tokens, the bundle has "
                f"{d_model} and {vocab_size}; export again"
            )
        return result


class KLT:
    """The codec ``klt`` at one level, which only encoding needs.

    Raises:
        CodecError: no such level, or the installation has no compiled coder.
    """

    name: ClassVar[str] = "klt"

    def __init__(self, tables: KLTTables, level: int) -> None:
        if not 0 <= level < len(tables.levels):
            raise CodecError(f"level {level}: these tables have levels 0 (finest) to {len(tables.levels) - 1}")
        self._encode = native().encode_hidden
        self._tables = tables
        self._level = level
        self._d_model = len(tables.forward)
        self._width = tables.levels[level].tables.width
        self._id_type = np.dtype("<u2" if len(tables.predicted) <= 1 << 16 else "<u4")
        # 16-bit integers err far less than any step does, and a single token waits for the matrix to be read.
        largest = np.maximum(np.abs(tables.forward).max(axis=1), np.float32(1e-30))
        self._forward_scale = (largest / np.float32(32767)).astype(np.float32)
        self._forward = np.rint(tables.forward / self._forward_scale[:, None]).astype(np.int16)
        self._first_seed = 1 << max(14, FINENESS_BITS + (len(tables.predicted) - 1).bit_length())
        self._steps = [np.float32(level.step) * relative_steps() for level in tables.levels]
        self._constants = (
            self._forward,
            self._forward_scale,
            tables.predicted_scale,
            tables.importance,
            tables.importance_bias,
            tables.limit,
            self._steps[level],
            *tables.levels[level].tables.coder,
            self._first_seed,
        )

    def encode(self, hidden: Floats, token_ids: Sequence[int] = ()) -> bytes:
        """Encode hidden states ``[tokens, d_model]`` float32 of these tokens.

        Raises:
            CodecError: NaN or infinity, another width, or ids that do not fit.
        """
        # A single token comes when the caches hold the front's weights, and each call into NumPy then costs
        # microseconds: so there is none that it can do without.
        hidden = shaped_hidden(hidden)
        tokens, vocabulary = len(token_ids), len(self._tables.predicted)
        if hidden.shape != (tokens, self._d_model) or not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
            raise CodecError(
                f"hidden states {list(hidden.shape)} and {tokens} token ids: klt takes [tokens, {self._d_model}] and "
                f"as many ids below {vocabulary}"
            )
        ordinary, gains, finenesses = bytearray(tokens), bytearray(tokens), bytearray(tokens)
        output = coder_output(tokens * self._width)
        predicted = self._tables.predicted[token_ids]
        ids = array("q", token_ids)
        start = self._encode(hidden, ids, predicted, ordinary, gains, finenesses, output, *self._constants)
        first = self._level | gains[0] << _GAIN_SHIFT
        if tokens == 1 and ordinary[0]:
            return bytes((first,)) + output[start:]
        head, coded = bytes((first,)), np.array(token_ids, self._id_type)
        if not all(ordinary):
            check_finite(hidden)  # a row that is not is not ordinary either
            kept = np.frombuffer(ordinary, np.bool_)
            head = bytes((first | _RAW_SECTION,)) + _raw_section(hidden, ~kept)
            coded = coded[kept]
        modes = [np.frombuffer(each, np.uint8, len(coded))[1:] for each in (gains, finenesses)]
        packed = pack(modes[0] | modes[1] << GAIN_BITS, _MODE_BITS)
        return b"".join((head, coded[1:].tobytes(), packed, memoryview(output)[start:]))

    def decode(self, payload: bytes, tokens: int, d_model: int) -> Floats:
        """Decode hidden states ``[tokens, d_model]``, of any level.

        Raises:
            CodecError: anything that `encode` does not write.
        """
        check_shape(tokens, d_model)
        tables = self._tables
        if d_model != len(tables.forward):
            raise CodecError(f"d_model {d_model}: the tables of this bundle are for {len(tables.forward)}")
        view = memoryview(payload)
        number = view[0] % MAX_LEVELS if len(view) else -1
        if not 0 <= number < len(tables.levels):
            raise CodecError(f"klt payload of level {number}: this bundle has levels 0 to {len(tables.levels) - 1}")
        hidden, rows, at = _read_raw_section(view, tokens, d_model)
        first_gain = (view[0] & ~_RAW_SECTION) >> _GAIN_SHIFT
        if not len(rows):
            if at != len(view) or first_gain:
                raise CodecError(
                    f"klt payload of {len(view)} bytes, all raw, with more than that; send the frame again"
                )
            return hidden
        level = tables.levels[number]
        modes_at = at + (len(rows) - 1) * self._id_type.itemsize
        coded_at = modes_at + packed_bytes(len(rows) - 1, _MODE_BITS)
        if len(view) < coded_at:
            raise CodecError(f"klt payload of {len(view)} bytes: too short for {tokens} tokens; send the frame again")
        modes = np.array([first_gain], np.uint8)
        if len(rows) > 1:
            others = unpack(view[modes_at:coded_at], len(rows) - 1, _MODE_BITS, np.uint8)
            modes = np.concatenate([modes, others])
        values, seed = level.tables.decode(view[coded_at:], modes & np.uint8(GAINS - 1))
        finenesses, ids = modes >> GAIN_BITS, np.empty(len(rows), np.int64)
        ids[0], finenesses[0] = divmod(seed - self._first_seed, _FINENESSES)
        ids[1:] = np.frombuffer(view[at:modes_at], self._id_type)
        if ids.min() < 0 or ids.max() >= len(tables.predicted):
            raise CodecError("klt payload with a token outside the vocabulary; send the frame again")
        coefficients = tables.predicted[ids.tolist()] * tables.predicted_scale
        coefficients[:, : level.tables.width] += values * self._steps[number][finenesses][:, None]
        decoded = hidden if len(rows) == tokens else np.empty((len(rows), d_model), np.float32)
        native().multiply(coefficients, tables.inverse, decoded, d_model, d_model, d_model)
        if decoded is not hidden:
            hidden[rows] = decoded
        return hidden


def _raw_section(hidden: Floats, raw: NDArray[np.bool_]) -> bytes:
    places = raw.nonzero()[0]
    values = Raw16().encode(hidden[places])
    return b"".join((_RAW_HEADER.pack(len(places), len(values)), places.astype("<u2").tobytes(), values))


def _read_raw_section(view: memoryview, tokens: int, d_model: int) -> tuple[Floats, NDArray[np.intp], int]:
    """The frame's hidden states with the raw rows filled in, the other rows, and where the section ends."""
    rows = np.arange(tokens)
    if not view[0] & _RAW_SECTION:
        return np.empty((tokens, d_model), np.float32), rows, 1
    places_at = 1 + _RAW_HEADER.size
    if len(view) < places_at:
        raise CodecError("klt payload that ends in its header; send the frame again")
    count, size = _RAW_HEADER.unpack_from(view, 1)
    values_at = places_at + 2 * count
    if not 1 <= count <= tokens or len(view) < values_at + size:
        raise CodecError(f"klt payload of {len(view)} bytes with {count} of {tokens} tokens raw; send the frame again")
    places = np.frombuffer(view[places_at:values_at], "<u2")
    if places[-1] >= tokens or (places[1:] <= places[:-1]).any():
        raise CodecError("klt payload whose raw tokens are not in order; send the frame again")
    hidden = np.empty((tokens, d_model), np.float32)
    hidden[places] = Raw16().decode(bytes(view[values_at : values_at + size]), count, d_model)
    return hidden, np.delete(rows, places), values_at + size
