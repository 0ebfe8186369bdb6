"""Grids that fit a weight better than its extremes do, from the weight alone: searched scales, and HQQ.

Both start from blocks ``[N, blocks, block_size]`` and give a `Grid`; rounding to it is the same for all. Work goes
on in blocks divided by their largest magnitude, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .nbits import Grid, PackedWeight, pack, rtn_grid, to_blocks, without_subnormals

Floats = NDArray[np.float32]
Method = Callable[[Floats, int, bool], Grid]

_CHUNK_ELEMENTS = 1 << 19
_SHRINKS = np.linspace(0.36, 1.16, 41, dtype=np.float32)  # steps of 0.02 around 1, where the extremes are covered
_LEAST_SQUARES_ROUNDS = 2
_HQQ_ROUNDS = 20
_HQQ_NORM = 0.7
_HQQ_BETA, _HQQ_BETA_GROWTH = 10.0, 1.01


def quantize(
    weight: Floats,
    bits: int,
    block_size: int,
    method: str = "rtn",
    *,
    symmetric: bool = True,
    importance: Floats | None = None,
) -> PackedWeight:
    """Round a weight ``[N, K]`` to nearest on the grid that a method chooses.

    Args:
        weight: float32.
        bits: 2, 4 or 8.
        block_size: weights that share a scale.
        method: a key of `METHODS`.
        symmetric: whether every zero point is the middle code.
        importance: of each column's error, ``[K]``, for ``mse``; all alike if None.

    Raises:
        ExportError: the weight holds NaN or infinity.
    """
    blocks = to_blocks(weight, block_size)
    choose = METHODS[method]
    if importance is not None and method == "mse":
        choose = partial(mse_grid, importance=to_blocks(importance[None], block_size)[0])
    grid = choose(blocks, bits, symmetric)
    return pack(grid.codes(blocks), grid, weight.shape[1])


def mse_grid(blocks: Floats, bits: int, symmetric: bool, importance: Floats | None = None) -> Grid:
    """The grid of least squared error among shrunken and stretched `rtn_grid`s, its scale then refitted.

    The refit alternates rounding and the least-squares scale for the codes found; neither step can raise the error.

    Args:
        blocks: ``[N, blocks, block_size]``.
        bits: 2, 4 or 8.
        symmetric: whether every zero point is the middle code.
        importance: weights of the squared errors, ``[blocks, block_size]``; all alike if None.
    """
    weights = np.ones((1, *blocks.shape[1:]), np.float32) if importance is None else importance[None]
    return _by_rows(partial(_search, weights=weights), blocks, bits, symmetric)


def hqq_grid(blocks: Floats, bits: int, symmetric: bool) -> Grid:
    """Half-quadratic quantization (Badri and Shaji, "HQQ", 2023): the least ``|error| ** 0.7``, without data.

    Each round splits the error in two: what the shrinkage of the 0.7-norm keeps is taken for outliers, which the
    grid need not follow, and the grid is fitted to the rest. Two things are ours. Errors are measured in steps of
    the grid, because the published shrinkage acts on raw weights and is then zero throughout. And the published
    method moves a float zero point at a fixed scale; zero points are whole here, so that the scale moves, too.
    """
    return _by_rows(_half_quadratic, blocks, bits, symmetric)


METHODS: dict[str, Method] = {"rtn": rtn_grid, "mse": mse_grid, "hqq": hqq_grid}


def _by_rows(fit: Method, blocks: Floats, bits: int, symmetric: bool) -> Grid:
    """Run a method on a few rows at a time, each block divided by its largest magnitude."""
    rtn_grid(blocks, bits, symmetric)  # refuses what is not finite
    step = max(1, _CHUNK_ELEMENTS // blocks[0].size)
    grids = []
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        magnitudes = np.abs(part).max(axis=2)
        unit = np.divide(part, magnitudes[..., None], out=np.zeros_like(part), where=magnitudes[..., None] != 0)
        grid = fit(unit, bits, symmetric)
        grids.append(Grid(without_subnormals(grid.scales * magnitudes), grid.zero_points, bits))
    scales = np.concatenate([grid.scales for grid in grids])
    points = [grid.zero_points for grid in grids if grid.zero_points is not None]
    return Grid(scales, np.concatenate(points) if points else None, bits)


class _Best:
    """The best grid of each block so far."""

    def __init__(self, grid: Grid, cost: Callable[[Floats], Floats], blocks: Floats) -> None:
        self.grid, self._cost, self._blocks = grid, cost, blocks
        self._costs = cost(blocks - grid.values(grid.codes(blocks)))

    def offer(self, grid: Grid) -> Floats:
        """Keep a grid in the blocks where it is better; returns its codes."""
        codes = grid.codes(self._blocks)
        costs = self._cost(self._blocks - grid.values(codes))
        better = costs < self._costs
        self._costs = np.where(better, costs, self._costs)
        self.grid = _choose(better, grid, self.grid)
        return codes


def _choose(mask: NDArray[np.bool_], chosen: Grid, other: Grid) -> Grid:
    points = None
    if chosen.zero_points is not None and other.zero_points is not None:
        points = np.where(mask, chosen.zero_points, other.zero_points)
    return Grid(np.where(mask, chosen.scales, other.scales), points, chosen.bits)


def _search(blocks: Floats, bits: int, symmetric: bool, *, weights: Floats) -> Grid:
    covering = rtn_grid(blocks, bits, symmetric)

    def cost(error: Floats) -> Floats:
        np.square(error, out=error)
        error *= weights
        return error.sum(axis=2)

    best = _Best(covering, cost, blocks)
    for shrink in _SHRINKS:
        for grid in _shrunken(covering, shrink):
            best.offer(grid)
    for _ in range(_LEAST_SQUARES_ROUNDS):
        grid = best.grid
        best.offer(_refit(grid, blocks, grid.codes(blocks), weights))
    return best.grid


def _shrunken(grid: Grid, shrink: np.float32) -> list[Grid]:
    scales = grid.scales * shrink
    if grid.zero_points is None:
        # With few codes the side that has one more may better be the other one.
        return [Grid(scales, None, grid.bits)] + [Grid(-scales, None, grid.bits)] * (grid.bits < 8)
    highest = (1 << grid.bits) - 1
    middle = np.float32(highest / 2)
    # Shrunken around the middle of the block's range, to the whole zero points on both sides of the exact one.
    exact = middle + (grid.zero_points - middle) / shrink
    return [Grid(scales, np.clip(edge(exact), 0, highest), grid.bits) for edge in (np.floor, np.ceil)]


def _refit(grid: Grid, targets: Floats, codes: Floats, weights: Floats) -> Grid:
    """The scales of least squared error for given codes."""
    levels = codes - grid.offsets[..., None]
    weighted = levels * weights
    square = (weighted * levels).sum(axis=2)
    product = (weighted * targets).sum(axis=2)
    scales = np.divide(product, square, out=grid.scales.copy(), where=square > 0)
    return Grid(scales, grid.zero_points, grid.bits)


def _half_quadratic(blocks: Floats, bits: int, symmetric: bool) -> Grid:
    grid = rtn_grid(blocks, bits, symmetric)
    best = _Best(grid, lambda error: (np.abs(error) ** _HQQ_NORM).sum(axis=2), blocks)
    ones = np.ones((1, 1, 1), np.float32)
    beta = _HQQ_BETA
    for _ in range(_HQQ_ROUNDS):
        codes = grid.codes(blocks)
        scales: Floats = np.where(grid.scales == 0, np.float32(1), grid.scales)[..., None]
        error: Floats = (blocks - grid.values(codes)) / scales
        targets = blocks - _shrinkage(error, beta) * scales
        if grid.zero_points is not None:
            points = np.rint((codes - targets / scales).mean(axis=2))
            grid = Grid(grid.scales, np.clip(points, 0, (1 << bits) - 1), bits)
        grid = _refit(grid, targets, codes, ones)
        best.offer(grid)
        beta *= _HQQ_BETA_GROWTH
    return best.grid


def _shrinkage(error: Floats, beta: float) -> Floats:
    """The generalised soft threshold of the p-norm, ``sign(e) relu(|e| - |e| ** (p - 1) / beta)``."""
    magnitude = np.abs(error)
    with np.errstate(divide="ignore"):  # an error of zero has an infinite threshold
        threshold = magnitude ** np.float32(_HQQ_NORM - 1) / np.float32(beta)
    result: Floats = np.sign(error) * np.maximum(magnitude - threshold, 0)
    return result
