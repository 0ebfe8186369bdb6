"""Calibrating a bundle's codecs on what its own front makes of the calibration text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ..errors import CodecError
from ..quant.klt import KLTTables
from ..quant.opsc import Recipe
from ..quant.tabq_rans import TabQTables
from ..quant.trellis import Floats, native
from ..runtime.bundle import Architecture, Segment
from .checkpoint import Checkpoint
from .families.common import EMBEDDING
from .float_gradients import gradients_at
from .front_states import hidden_states, typical_states
from .klt_fit import GRADIENT_SHARE, CalibrationStates, fit_klt
from .progress import Progress
from .tabq_fit import fit_tabq

TABQ_SHARE = 4  # one text in so many: eight histograms need few
LEAST_TOKENS = 256
SHORT_TEXTS, SHORT_TEXT_TOKENS = 4, 16

logger = logging.getLogger(__name__)

UNCALIBRATED: tuple[str, ...] = ("raw32", "raw16", "tabq")


def calibrate_codecs(
    root: Path,
    segments: Sequence[Segment],
    checkpoint: Checkpoint,
    family: ModuleType,
    arch: Architecture,
    recipe: Recipe,
    windows: Sequence[Sequence[int]],
    progress: Progress,
) -> tuple[str, ...]:
    """Fit the calibrated codecs to a staged bundle and write their tables into both halves.

    Args:
        root: the staging folder.
        segments: what was written there.
        windows: token ids of the calibration texts; with fewer than `LEAST_TOKENS` nothing is fitted.

    Returns:
        The names of all codecs that the bundle has.
    """
    if sum(map(len, windows)) < LEAST_TOKENS:
        return UNCALIBRATED
    try:
        native()
    except CodecError as error:
        logger.warning("the calibrated codecs are left out: %s", error)
        return UNCALIBRATED
    hidden = hidden_states(root, segments, checkpoint, arch, recipe, windows, progress=progress)
    gradients = gradients_at(
        checkpoint, recipe.split, windows[::GRADIENT_SHARE], start=hidden[::GRADIENT_SHARE], progress=progress
    )
    klt, tabq = fit_codecs(
        windows,
        hidden,
        gradients,
        checkpoint.tensor(EMBEDDING),
        typical_states(checkpoint, family, arch, recipe, short_texts(windows), progress=progress),
        progress,
    )
    for half in ("device", "server"):
        klt.save(root / half)
        tabq.save(root / half)
    return (*UNCALIBRATED, "tabq-rans", "klt")


def fit_codecs(
    windows: Sequence[Sequence[int]],
    hidden: Sequence[Floats],
    gradients: Sequence[Floats],
    embedding: Floats,
    typical: Floats,
    progress: Progress,
) -> tuple[KLTTables, TabQTables]:
    """Fit the calibrated codecs to hidden states at a split.

    Args:
        windows: token ids of the calibration texts.
        hidden: their hidden states, ``[tokens, d_model]`` each.
        gradients: of the loss at those of every text of ``GRADIENT_SHARE``, ``[tokens, d_model]`` each.
        embedding: ``[vocab_size, d_model]``.
        typical: ``[vocab_size, d_model]``, see `isthmus.export.front_states.typical_states`.
        progress: called as steps are done.
    """
    states = CalibrationStates(windows, hidden, gradients, embedding, typical)
    return fit_klt(states, progress), fit_tabq(hidden[::TABQ_SHARE])


def short_texts(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """What tokens are put behind to see their typical states: windows' first tokens, each with the window's end."""
    chosen = [windows[number * (len(windows) - 1) // (SHORT_TEXTS - 1)] for number in range(SHORT_TEXTS)]
    return [[*window[:1], *window[1:][1 - SHORT_TEXT_TOKENS :]] for window in chosen]
