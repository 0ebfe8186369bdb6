"""Calibration of the codec ``klt`` (`isthmus.quant.klt`): prediction, transform, steps and tables for one split.

1. Prediction. Ridge regression of the hidden state on what both sides can know of its token: the token's embedding and
   its *typical state*, the mean of the front's outputs for the token after a few short texts. Evaluated once for the
   whole vocabulary, so that predicting is a table look-up.
2. Transform. With ``S`` the covariance of what the prediction leaves over and ``F = L L'`` the back's sensitivity, the
   coefficients are ``x L U`` where ``U`` are the eigenvectors of ``L' S L``. ``F`` is the Fisher information, the mean
   outer product of the loss's gradients at the split for labels drawn from the model; ours: an outer product counts
   inversely to its gradient's norm, which tempers a few extreme tokens, and `_DAMPING` is added.
3. Fineness. How much a token's error counts, see `isthmus.export.token_importance`.
4. Levels. A token's coefficients share one step (reverse water-filling); a level's is the one that meets its bits.

What the prediction leaves over is measured on texts that it was not fitted to, by halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..quant.klt import FINENESS_BITS, GAIN_BITS, ORDINARY_FINENESS, KLTLevel, KLTTables, relative_steps
from ..quant.trellis import MAX_VALUE, Floats, TrellisTables, contexts_of
from .progress import Progress
from .token_importance import fit_importance, without_trend

BITS = (3.05, 2.3, 1.76, 1.44, 1.16, 0.95, 0.76)  # per element of the hidden state, by level
_DAMPING = 0.05  # of the mean sensitivity
# Quarter octaves of a step for a neper of importance: half of what importances that were known would ask for. On text
# unlike the calibration's, and at coarse steps, where harm no longer grows as the square, that is the better trade.
_QUARTER_OCTAVES = 0.5 * 4 / float(np.log(4))
_RIDGE = 1000.0  # in tokens, for standardized features
_MASSIVE = 6.0  # times the median norm: attention sinks, which are sent raw and would spoil every mean
_BEYOND = 1.5  # times the largest norm of coefficients seen
_FIT_ROWS = 8192
_STEP_SEARCHES = 4
GRADIENT_SHARE = 4  # one text in so many has gradients, which cost about six times a text's way through the back
_CLIP = 8.0  # deviations that a prediction may be from the mean; rare tokens have absurd typical states


@dataclass(frozen=True)
class CalibrationStates:
    """What the fit learns from.

    Attributes:
        ids: token ids of each text.
        hidden: the quantized front's hidden states at the split, ``[tokens, d_model]`` a text.
        gradients: of the loss at the hidden states of every text of ``GRADIENT_SHARE``, ``[tokens, d_model]`` each.
        embedding: ``[vocab_size, d_model]``.
        typical: ``[vocab_size, d_model]``, see `isthmus.export.front_states.typical_states`.
    """

    ids: Sequence[Sequence[int]]
    hidden: Sequence[Floats]
    gradients: Sequence[Floats]
    embedding: Floats
    typical: Floats


def fit_klt(states: CalibrationStates, progress: Progress) -> KLTTables:
    """Fit the codec to hidden states at a split; the first token of a text is left out."""
    ids = np.concatenate([np.asarray(text)[1:] for text in states.ids])
    hidden = np.concatenate([text[1:] for text in states.hidden])
    norms = np.linalg.norm(hidden, axis=1)
    massive = _MASSIVE * float(np.median(norms))
    ids, hidden = ids[norms < massive], hidden[norms < massive]
    steps = 3 + len(BITS)

    progress("codec: prediction", 0, steps)
    features = _Features(states.embedding, states.typical, ids)
    rest = np.empty_like(hidden)
    half = np.arange(len(ids)) < len(ids) // 2
    for fitted in (half, ~half):
        rest[~fitted] = hidden[~fitted] - features.predict(ids[~fitted], features.fit(ids[fitted], hidden[fitted]))

    progress("codec: transform", 1, steps)
    gradients = np.concatenate([text[1:] for text in states.gradients])
    forward = _transform(rest, _sensitivity(gradients))
    inverse = np.linalg.inv(forward.astype(np.float64)).astype(np.float32)
    coefficients = rest @ forward

    graded = np.concatenate([text[1:] for text in states.hidden[::GRADIENT_SHARE]])
    usual = np.linalg.norm(graded, axis=1) < massive
    positions = np.concatenate([np.arange(1, len(text)) for text in states.gradients])[usual]
    importances = np.square(gradients[usual] @ inverse.T).sum(axis=1, dtype=np.float64)
    slopes = fit_importance(graded[usual], without_trend(importances, positions))
    importance = (slopes * _QUARTER_OCTAVES).astype(np.float32)
    importance_bias = ORDINARY_FINENESS - float(np.median(hidden @ importance))

    progress("codec: vocabulary", 2, steps)
    weights = features.fit(ids, hidden)
    predicted, scale = _quantized_predictions(features, weights, forward, ids)

    limit = _BEYOND * float(np.linalg.norm(coefficients, axis=1).max())
    finenesses = np.clip(np.rint(hidden @ importance + importance_bias), 0, (1 << FINENESS_BITS) - 1)
    coefficients /= relative_steps()[finenesses.astype(np.intp)][:, None]
    deviations = coefficients.std(axis=0)
    rows = coefficients[np.random.default_rng(0).permutation(len(coefficients))[:_FIT_ROWS]]
    levels = []
    for number, bits in enumerate(BITS):
        progress(f"codec: level {number}", 3 + number, steps)
        levels.append(_fit_level(rows, deviations, bits, limit))
    progress("codec calibrated", steps, steps)
    return KLTTables(forward, inverse, predicted, scale, importance, importance_bias, limit, tuple(levels))


class _Features:
    """What is known of a token: its embedding and its typical state, standardized."""

    def __init__(self, embedding: Floats, typical: Floats, ids: NDArray[np.int64]) -> None:
        self._sources = []
        for source in (embedding, typical):
            seen = source[ids]
            mean, deviation = seen.mean(axis=0), seen.std(axis=0)
            self._sources.append((source, mean, np.maximum(deviation, 1e-6 * deviation.max() + 1e-30)))
        self.vocabulary = len(embedding)

    def rows(self, ids: NDArray[np.int64] | slice) -> Floats:
        """Features ``[tokens, 1 + 2 d_model]`` with a constant in front."""
        parts = [np.clip((source[ids] - mean) / deviation, -_CLIP, _CLIP) for source, mean, deviation in self._sources]
        return np.concatenate([np.ones((len(parts[0]), 1), np.float32), *parts], axis=1)

    def fit(self, ids: NDArray[np.int64], hidden: Floats) -> Floats:
        """Ridge regression of hidden states on the features of their tokens: ``[1 + 2 d_model, d_model]``."""
        rows = self.rows(ids)
        gram = (rows.T @ rows).astype(np.float64)
        penalty = np.full(len(gram), _RIDGE)
        penalty[0] = 0
        return np.linalg.solve(gram + np.diag(penalty), (rows.T @ hidden).astype(np.float64)).astype(np.float32)

    def predict(self, ids: NDArray[np.int64] | slice, weights: Floats) -> Floats:
        """Hidden states ``[tokens, d_model]``."""
        return self.rows(ids) @ weights


def _sensitivity(gradients: Floats) -> NDArray[np.float64]:
    norms = np.linalg.norm(gradients, axis=1)
    rows, norms = gradients[norms > 0], norms[norms > 0]
    weighted = rows / np.sqrt(norms)[:, None]
    fisher = (weighted.T @ weighted).astype(np.float64) / max(len(rows), 1)
    mean = float(np.trace(fisher)) / len(fisher) or 1.0
    return fisher + _DAMPING * mean * np.eye(len(fisher))


def _transform(rest: Floats, sensitivity: NDArray[np.float64]) -> Floats:
    """Coefficients' basis ``[d_model, d_model]``, the largest variance first."""
    root = np.linalg.cholesky(sensitivity)
    weighted = rest @ root.astype(np.float32)
    weighted -= weighted.mean(axis=0)
    _, vectors = np.linalg.eigh((weighted.T @ weighted).astype(np.float64) / len(weighted))
    return np.ascontiguousarray(root @ vectors[:, ::-1], np.float32)


def _quantized_predictions(
    features: _Features, weights: Floats, forward: Floats, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int8], Floats]:
    """Every token's coefficients as int8 ``[vocab_size, d_model]``, and their scales."""
    basis = weights @ forward
    seen = features.predict(np.unique(ids), basis)
    scale = np.maximum(np.abs(seen).max(axis=0) / 127, 1e-30).astype(np.float32)
    vocabulary = features.vocabulary
    predicted = np.empty((vocabulary, len(forward)), np.int8)
    for first in range(0, vocabulary, 4096):
        rows = features.predict(slice(first, first + 4096), basis) / scale
        predicted[first : first + 4096] = np.clip(np.rint(rows), -127, 127)
    return predicted, scale


def _fit_level(rows: Floats, deviations: Floats, bits: float, limit: float) -> KLTLevel:
    """The level whose rows take ``bits`` per element: a doubled step costs about a bit less, or less than that."""
    step = float(np.exp2(np.log2(np.maximum(deviations, 1e-30)).mean() - bits + 1))
    for _ in range(_STEP_SEARCHES):
        step = max(step, 2 * limit / MAX_VALUE)
        level = _level_at(rows, deviations, step)
        step *= 2 ** (1.3 * (level.bits - bits))
    return level


def _level_at(rows: Floats, deviations: Floats, step: float) -> KLTLevel:
    contexts = contexts_of(deviations / step)
    width = max(int(np.count_nonzero(contexts)), 1)
    values = np.ascontiguousarray(rows[:, :width] / np.float32(step))
    tables = TrellisTables.fit(values, contexts[:width])
    gains = tables.gains(values)
    bits = 8 * len(tables.encode(tables.quantize(values, gains), gains, 0))
    bits += (GAIN_BITS + FINENESS_BITS) * len(rows)
    return KLTLevel(step, bits / rows.size, tables)
