"""The codec ``tabq-rans``: `isthmus.quant.tabq` with entropy-coded codes and tables that export fixes.

All is tabq's, and so is the reconstruction bit for bit, but for a payload's last part: the codes of a frame follow each
other in one stream, token by token, each coded as code less zero point by the coder of `isthmus.quant.trellis` (rANS)
without its trellis. Which table codes it depends on the token's width and on the class of its component: how far the
component spreads, in calibration, relative to its token's range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from .checks import check_shape, finite_hidden
from .tabq import TabQ
from .tabq_front import MAX_WIDTH, MIN_WIDTH, Front
from .trellis import FREQUENCIES, SYMBOLS, native

CLASSES = 8  # of components
_TABLES = MAX_WIDTH - MIN_WIDTH + 1, CLASSES, SYMBOLS + 1

_FILE = "tabq-rans.npz"
# Where the coder begins and decoding must end. Two bytes of a frame, by which a damaged one is known: a stream that is
# cut short ends far below.
_SEED = 1 << 15
_NO_OFFSETS = np.empty(0, np.float32)


@dataclass(frozen=True)
class TabQTables:
    """What encoder and decoder share.

    Attributes:
        classes: uint8 ``[d_model]``, the class of each component.
        cumulative: uint16 ``[widths, CLASSES, SYMBOLS + 1]``, running sums of frequencies, from width 2 on.
    """

    classes: NDArray[np.uint8]
    cumulative: NDArray[np.uint16]

    def contexts(self, widths: NDArray[np.uint8], coded: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """The table of each code of a frame, in order.

        Args:
            widths: uint8 ``[tokens, 1]``.
            coded: bool ``[tokens, d_model]``, which values have a code.
        """
        contexts: NDArray[np.uint8] = (CLASSES * (widths - np.uint8(MIN_WIDTH)) + self.classes)[coded]
        return contexts

    def save(self, folder: Path) -> None:
        """Write the tables as a file of a bundle half."""
        np.savez_compressed(folder / _FILE, classes=self.classes, cumulative=self.cumulative)

    @classmethod
    def load(cls, folder: Path, *, d_model: int) -> TabQTables:
        """Read what `save` wrote.

        Raises:
            CodecError: not there, damaged, or of another model.
        """
        try:
            with np.load(folder / _FILE, allow_pickle=False) as file:
                tables = cls(file["classes"], file["cumulative"])
            frequencies = np.diff(tables.cumulative.astype(np.int64), axis=-1)
            if not (
                tables.classes.dtype == np.uint8
                and tables.classes.ndim == 1
                and tables.classes.max(initial=0) < CLASSES
                and tables.cumulative.dtype == np.uint16
                and tables.cumulative.shape == _TABLES
                and (tables.cumulative[..., 0] == 0).all()
                and (frequencies > 0).all()
                and (frequencies.sum(-1) == FREQUENCIES).all()
            ):
                raise ValueError("classes or frequencies out of range")
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise CodecError(f"{folder / _FILE}: no calibrated codec there ({error}); export again") from error
        if len(tables.classes) != d_model:
            raise CodecError(
                f"{folder / _FILE}: for d_model {len(tables.classes)}, the bundle has {d_model}; export again"
            )
        return tables


@dataclass(frozen=True)
class TabQRans:
    """The codec ``tabq-rans``.

    Args:
        tables: of the bundle.
        tabq: what quantizes; only encoding needs its options.

    Raises:
        CodecError: the installation has no compiled coder.
    """

    tables: TabQTables
    tabq: TabQ

    name: ClassVar[str] = "tabq-rans"

    def __post_init__(self) -> None:
        native()

    def encode(self, hidden: NDArray[np.float32], token_ids: Sequence[int] = ()) -> bytes:
        """Encode hidden states ``[tokens, d_model]`` float32; raises `CodecError` on NaN, infinity or another width."""
        hidden = finite_hidden(hidden)
        self._check_width(hidden.shape[1])
        quantized = self.tabq.quantize(hidden)
        head, coded = quantized.head, quantized.coded
        steps = np.subtract(quantized.codes, head[:, 2:3], dtype=np.int32)[coded]
        stream = b""
        if len(steps):
            output = bytearray(4 * len(steps) + 16)  # a code takes at most 30 bits: 14, a sign and an 8-bit excess
            contexts = self.tables.contexts(head[:, :1], coded)
            start = native().encode(steps, contexts, self.tables.cumulative, b"", _SEED, output, False)
            stream = bytes(memoryview(output)[start:])
        return b"".join((*quantized.front(), stream))

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Decode hidden states ``[tokens, d_model]`` float32, of any level.

        Raises:
            CodecError: anything that `encode` does not write.
        """
        check_shape(tokens, d_model)
        self._check_width(d_model)
        front = Front.read(payload, tokens, d_model)
        coded = front.coded()
        stream = memoryview(payload)[front.size :]
        decoded = np.empty(sum(front.counts.values()), np.float32)
        end = _SEED if not stream else -1
        if len(decoded):
            contexts = self.tables.contexts(front.head[:, :1], coded)
            end = native().decode(stream, contexts, self.tables.cumulative, b"", _NO_OFFSETS, decoded, False)
        steps = np.zeros((tokens, d_model), np.float32)
        steps[coded] = decoded
        lowest = -front.head[:, 2:3].astype(np.float32)
        highest = lowest + (2 ** front.head[:, :1].astype(np.float32) - 1)
        if end != _SEED or (steps < lowest).any() or (steps > highest).any():
            raise CodecError(
                f"tabq-rans stream of {len(stream)} bytes that are not {len(decoded)} codes within their widths; "
                "send the frame again"
            )
        return front.reconstruct(steps)

    def _check_width(self, d_model: int) -> None:
        if d_model != len(self.tables.classes):
            raise CodecError(f"d_model {d_model}: the tables of this bundle are for {len(self.tables.classes)}")
