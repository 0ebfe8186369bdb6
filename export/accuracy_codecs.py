"""The codecs' part of an accuracy table: fitted at several splits, and run over the text that is measured on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import CodecError
from ..quant.codec import Codec, Raw16
from ..quant.klt import KLT
from ..quant.opsc import Recipe
from ..quant.tabq import TOLERANCES, TabQ
from ..quant.tabq_rans import TabQRans
from ..quant.trellis import native
from .codec_calibration import fit_codecs, short_texts
from .families.common import EMBEDDING
from .float_gradients import gradients_down_to
from .front_states import NEAR_BLOCK_SIZE, typical_states
from .klt_fit import GRADIENT_SHARE
from .progress import Progress
from .validate import FloatModel, Hidden

FRAME = 128  # tokens of a prefill's frame

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coded:
    """What became of the text's hidden states.

    Attributes:
        received: ``[tokens, d_model]`` of each window; empty if they are those of another codec.
        bits: per element, in frames of `FRAME` tokens.
        decode_bits: in frames of one.
        like: the codec and level that reconstructs the same; empty if it is run itself.
    """

    received: list[Hidden]
    bits: float
    decode_bits: float
    like: str = ""


class CodecBench:
    """Fits and runs codecs on the float model's hidden states.

    Args:
        reference: the float model.
        windows: token ids to fit to.
        splits: where.
        progress: called as the work goes on.
    """

    def __init__(
        self, reference: FloatModel, windows: Sequence[Sequence[int]], splits: Sequence[int], progress: Progress
    ) -> None:
        self._float, self._windows, self._progress = reference, windows, progress
        self._hidden: dict[int, list[Hidden]] = {}
        self._gradients: dict[int, list[Hidden]] = {}
        self._embedding = reference.checkpoint.tensor(EMBEDDING)
        try:
            native()
        except CodecError as error:
            logger.warning("the calibrated codecs are left out: %s", error)
            return
        states = [reference.embed(ids) for ids in windows]
        for layer in range(splits[-1] + 1):
            progress("hidden states for the codecs", layer, splits[-1])
            if layer in splits:
                self._hidden[layer] = states
            states = reference.layer_of_texts(layer, states) if layer < splits[-1] else states
        for layer, gradients in gradients_down_to(
            reference.checkpoint,
            splits[0],
            windows[::GRADIENT_SHARE],
            start=self._hidden[splits[0]][::GRADIENT_SHARE],
            progress=progress,
        ):
            if layer in splits:
                self._gradients[layer] = [gradient for window in gradients for gradient in window]

    def code(self, split: int, states: Sequence[Hidden], windows: Sequence[Sequence[int]]) -> dict[str, Coded]:
        """Put hidden states through every codec and level.

        Args:
            split: where they are.
            states: ``[tokens, d_model]`` of each window.
            windows: token ids.

        Returns:
            By codec and level, as in ``klt 2``.
        """
        codecs: dict[str, Codec] = {"raw16": Raw16()}
        codecs |= {f"tabq {level}": TabQ(tolerance=tolerance) for level, tolerance in enumerate(TOLERANCES)}
        if split in self._hidden:
            codecs |= self._fitted(split, windows)
        coded = {}
        for step, (name, codec) in enumerate(codecs.items()):
            self._progress(f"coding at split {split}", step, len(codecs))
            like = name.replace("tabq-rans", "tabq") if name.startswith("tabq-rans") else ""
            coded[name] = _coded(codec, states, windows, like)
        return coded

    def _fitted(self, split: int, windows: Sequence[Sequence[int]]) -> dict[str, Codec]:
        arch, checkpoint, family = self._float.arch, self._float.checkpoint, self._float.family
        seen = np.unique(np.concatenate([np.asarray(ids) for ids in [*self._windows, *windows]]))
        typical = typical_states(
            checkpoint,
            family,
            arch,
            Recipe(arch.layers, split, 8, 8, 8, 8, NEAR_BLOCK_SIZE),
            short_texts(self._windows),
            tokens=seen,
            progress=self._progress,
        )
        klt, tabq = fit_codecs(
            self._windows, self._hidden[split], self._gradients[split], self._embedding, typical, self._progress
        )
        codecs: dict[str, Codec] = {
            f"tabq-rans {level}": TabQRans(tabq, TabQ(tolerance=tolerance))
            for level, tolerance in enumerate(TOLERANCES)
        }
        return codecs | {f"klt {level}": KLT(klt, level) for level in range(len(klt.levels))}


def _coded(codec: Codec, states: Sequence[Hidden], windows: Sequence[Sequence[int]], like: str) -> Coded:
    """Put hidden states through a codec; a text's first token has no frame of its own: it belongs to a prompt."""
    received, sent, single = [], 0, 0
    for hidden, ids in zip(states, windows, strict=True):
        parts = []
        for first in range(0, len(ids), FRAME):
            rows, tokens = hidden[first : first + FRAME], ids[first : first + FRAME]
            payload = codec.encode(rows, tokens)
            sent += len(payload)
            parts.append(rows if like else codec.decode(payload, *rows.shape))
        single += sum(len(codec.encode(hidden[at : at + 1], ids[at : at + 1])) for at in range(1, len(ids)))
        received.append(np.concatenate(parts))
    elements = sum(hidden.size for hidden in states)
    alone = sum(hidden[1:].size for hidden in states)
    return Coded([] if like else received, 8 * sent / elements, 8 * single / alone, like)
