"""How much a token's error at the split harms the predictions, foretold from its hidden state.

The loss' curvature at one token's hidden state spreads over the tokens of a text by a deviation of 1 neper; a linear
function of the hidden state foretells about a third of that. Where a token counts ``w`` times as much as another, a
step of ``w ** -0.5`` times its own does the least harm for the bits of both (equal slopes; the reverse water-filling
of `isthmus.export.klt_fit`, along tokens instead of coefficients).

The fit is a gamma regression with logarithmic link by Fisher scoring (McCullagh and Nelder, Generalized Linear Models,
chapter 8), with a ridge: its deviance is, up to constants, just the harm that is left at given bits, and as it is
linear in the importances, single draws of the gradients do for their means.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..quant.trellis import Floats

_RIDGE = 1000.0  # in tokens, for standardized channels
_ITERATIONS = 60
_EXTREME = 200.0  # times the mean importance; more is a single draw's luck
_LIMIT = 6.0  # nepers from the mean


def fit_importance(hidden: Floats, importances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes ``[d_model]`` of the logarithm of a token's importance as a linear function of its hidden state.

    Args:
        hidden: ``[tokens, d_model]``.
        importances: ``[tokens]``, not negative, of expectation proportional to the tokens' importance.
    """
    mean, deviation = hidden.mean(axis=0, dtype=np.float64), hidden.std(axis=0, dtype=np.float64)
    deviation = np.maximum(deviation, 1e-6 * deviation.max() + 1e-30)
    rows = np.concatenate([np.ones((len(hidden), 1)), (hidden - mean) / deviation], axis=1)
    average = float(importances.mean()) or 1.0
    return _gamma_regression(rows, np.minimum(importances / average, _EXTREME))[1:] / deviation


def without_trend(importances: NDArray[np.float64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Importances divided by their mean at such positions.

    A text's first tokens count for more, because more follows them: 4.5 times the mean at positions 1 to 7 of 512.
    Steps that went by that would make short texts dear, whatever follows.

    Args:
        importances: ``[tokens]``.
        positions: ``[tokens]``, from 1; means are those of an octave, the first three octaves together.
    """
    octaves = np.maximum(np.frexp(positions)[1], 3)
    sums = np.bincount(octaves, weights=importances)
    means = sums / np.maximum(np.bincount(octaves), 1)
    return importances / np.where(means > 0, means, 1)[octaves]


def _gamma_regression(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights whose ``sum(values * exp(-rows @ weights) + rows @ weights)`` and ridge are least."""
    penalty = np.full(rows.shape[1], _RIDGE)
    penalty[0] = 0
    information = np.linalg.inv(rows.T @ rows + np.diag(penalty))

    def deviance(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logarithms = np.clip(rows @ weights, -_LIMIT, _LIMIT)
        excess = values * np.exp(-logarithms)
        return float((excess + logarithms).sum() + penalty @ weights**2 / 2), 1 - excess

    weights = np.zeros(rows.shape[1])
    (least, slopes), length = deviance(weights), 1.0
    for _ in range(_ITERATIONS):
        direction = information @ (rows.T @ slopes + penalty * weights)
        while True:
            candidate = weights - length * direction
            reached, slopes_there = deviance(candidate)
            if reached < least or length < 1e-4:
                break
            length /= 2
        if not reached < least - 1e-6 * abs(least):
            break
        weights, least, slopes, length = candidate, reached, slopes_there, min(1.0, 2 * length)
    return weights
