"""Calibration of the codec ``tabq-rans`` (`isthmus.quant.tabq_rans`): classes of components and their tables.

A component's spread is the root mean square of its steps relative to its token's range. Classes divide the spreads
evenly on a logarithmic scale; frequencies are counted at all tolerances that a bundle offers, with few counts of a
Laplacian of the class' spread added, which is all that a width has that did not occur.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..quant.tabq import TOLERANCES, TabQ
from ..quant.tabq_front import MAX_WIDTH, MIN_WIDTH
from ..quant.tabq_rans import CLASSES, TabQTables
from ..quant.trellis import LIMIT, SYMBOLS, Floats, running_sums

_PRIOR_COUNT = 20.0
_EXTREMES = 0.02, 0.98  # quantiles of the spreads between which classes are divided
_SMALLEST_SPREAD = 1e-4  # of a token's range


def fit_tabq(hidden: Sequence[Floats]) -> TabQTables:
    """Fit the tables to hidden states at a split, ``[tokens, d_model]`` a text."""
    d_model = hidden[0].shape[1]
    squares, seen = np.zeros(d_model), np.zeros(d_model)
    counts = np.zeros((MAX_WIDTH - MIN_WIDTH + 1, d_model, SYMBOLS))
    for tolerance in TOLERANCES:
        for text in hidden:
            quantized = TabQ(tolerance=tolerance).quantize(np.ascontiguousarray(text, np.float32))
            coded, widths = quantized.coded, quantized.head[:, 0]
            steps = np.where(coded, quantized.codes - quantized.head[:, 2:3].astype(np.int64), 0)
            relative = steps / (2.0 ** widths[:, None] - 1).clip(1)
            squares += np.square(relative).sum(axis=0)
            seen += coded.sum(axis=0)
            symbols = np.where(np.abs(steps) <= LIMIT, steps + LIMIT, SYMBOLS - 1)
            token, component = coded.nonzero()
            np.add.at(counts, (widths[token] - MIN_WIDTH, component, symbols[coded]), 1)
    spreads = np.sqrt(squares / seen.clip(1)).clip(_SMALLEST_SPREAD)
    classes = _classes(np.log2(spreads))
    frequencies = np.zeros((len(counts), CLASSES, SYMBOLS))
    for number in range(CLASSES):
        members = classes == number
        spread = float(np.sqrt(np.square(spreads[members]).mean())) if members.any() else _SMALLEST_SPREAD
        for index, width in enumerate(range(MIN_WIDTH, MAX_WIDTH + 1)):
            prior = _laplacian(spread * (2**width - 1))
            frequencies[index, number] = counts[index, members].sum(axis=0) + _PRIOR_COUNT * prior
    return TabQTables(classes, running_sums(frequencies))


def _classes(spreads: NDArray[np.float64]) -> NDArray[np.uint8]:
    low, high = np.quantile(spreads, _EXTREMES)
    return np.clip(CLASSES * (spreads - low) / max(high - low, 1e-9), 0, CLASSES - 1).astype(np.uint8)


def _laplacian(deviation: float) -> NDArray[np.float64]:
    """Shares of the symbols of a rounded Laplacian; the last is all that has no symbol of its own."""
    steps = np.arange(2**MAX_WIDTH)
    shares = np.exp(-steps / (deviation / np.sqrt(2) + 0.1))
    shares[1:] *= 2
    shares /= shares.sum()
    sides = shares[1 : LIMIT + 1] / 2
    return np.concatenate([sides[::-1], shares[:1], sides, [shares[LIMIT + 1 :].sum()]])
