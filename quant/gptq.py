"""GPTQ: codes that make up for each other's errors on the inputs that a weight really sees.

Source: Frantar et al., arXiv 2210.17323, algorithm 1, with the columns in the order of falling input energy
(``act-order``) over blocks whose grids are fixed beforehand (``static groups``): of what was tried on SmolLM2-135M at 4
bits, KL 0.117 against 0.162 for columns in order. Ours: the grids minimise the squared error weighted by the inputs'
energy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .grids import mse_grid
from .nbits import PackedWeight, pack, to_blocks
from .opsc import Precision

Floats = NDArray[np.float32]

DAMPING = 0.01  # of the mean input energy, added to each column's
LAZY_COLUMNS = 128  # columns whose errors reach the later ones together


def gptq(weight: Floats, energy: Floats, precision: Precision) -> PackedWeight:
    """Quantize a weight ``[N, K]`` so that its products with the calibration inputs change least.

    Args:
        weight: float32.
        energy: sum over inputs ``x`` of ``x x.T``, ``[K, K]``.
        precision: bits, block size and symmetry.

    Raises:
        ExportError: the weight holds NaN or infinity.
    """
    columns, size = weight.shape[1], precision.block_size
    diagonal = np.diag(energy).astype(np.float32)
    damped = diagonal / max(float(diagonal.mean()), 1e-30) + np.float32(DAMPING)
    importance = to_blocks(damped[None], size)[0]
    blocks = to_blocks(weight, size)
    grid = mse_grid(blocks, precision.bits, precision.symmetric, importance)
    order = np.argsort(-diagonal, kind="stable")
    propagation = _propagation(energy, order)

    rest = np.ascontiguousarray(weight.T[order])
    scales = np.ascontiguousarray(grid.scales.T[order // size])
    offsets = np.ascontiguousarray(np.broadcast_to(grid.offsets, grid.scales.shape).T[order // size])
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    highest = (1 << precision.bits) - 1
    codes = np.empty_like(rest)
    for first in range(0, columns, LAZY_COLUMNS):
        last = min(first + LAZY_COLUMNS, columns)
        errors = np.empty((last - first, len(weight)), np.float32)
        for column in range(first, last):
            code = np.clip(np.rint(rest[column] * inverse[column]) + offsets[column], 0, highest)
            codes[column] = code
            error = rest[column] - (code - offsets[column]) * scales[column]
            error /= propagation[column, column]
            errors[column - first] = error
            rest[column + 1 : last] -= propagation[column, column + 1 : last, None] * error
        rest[last:] -= propagation[first:last, last:].T @ errors
    placed = np.broadcast_to(grid.offsets, grid.scales.shape)[..., None].repeat(size, axis=2).reshape(len(weight), -1)
    placed = np.ascontiguousarray(placed)  # the padding of the last block stands for zero
    placed[:, order] = codes.T
    return pack(placed.reshape(blocks.shape), grid, columns)


def _propagation(energy: Floats, order: NDArray[np.intp]) -> Floats:
    """How a column's error moves the columns after it: the upper Cholesky factor of the inverse energy."""
    damped = energy[np.ix_(order, order)].astype(np.float64)
    mean = float(np.trace(damped)) / len(damped)
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    factor: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped))
    return np.ascontiguousarray(factor.T, dtype=np.float32)
