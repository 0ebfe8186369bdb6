"""How many rows matrix products must have so that each row gets the same bits whatever rows lie beside it.

onnxruntime chooses its kernels by the processor. In some of them a row alone, or the last of an odd number of rows,
goes another way than all others and comes out different in its last bits. Measured, onnxruntime 1.32: on x86 with AVX2
a single row at 4 bits, and the odd row at 2 bits in blocks of 64; with AVX512-VNNI the odd row at 4 bits in blocks of
64 and 128 and at 8 bits in blocks of 128; the odd row of float products. So graphs leave the number of rows open, and
the runtime finds out what this processor needs and fills up with rows that nobody reads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from .backend import Graph
from .kernels import product_chain

_WIDTHS = (512, 96)  # of the products that are compared
_ROWS = 8


class RowRule(IntEnum):
    """Which numbers of rows give the same bits; a greater rule includes the smaller ones."""

    ANY = 0
    TWO_OR_MORE = 1
    EVEN = 2

    def fill(self, rows: int) -> int:
        """The least such number that is not below ``rows``: at most one more."""
        if self is RowRule.EVEN:
            return rows + rows % 2
        return max(rows, 2) if self is RowRule.TWO_OR_MORE else rows


def row_rule(precisions: Iterable[tuple[int, int]]) -> RowRule:
    """The rule of a graph on this processor.

    Args:
        precisions: ``(bits, block_size)`` of its weights: 2, 4 or 8 bits packed, 16 or 32 as floats.
    """
    return max((_measured(*precision) for precision in precisions), default=RowRule.ANY)


def filled_up(rows: NDArray[np.float32], rule: RowRule) -> NDArray[np.float32]:
    """Rows ``[tokens, width]`` and the zero rows that the rule asks for: ``[1, rows, width]``, as graphs take them."""
    return np.pad(rows, ((0, rule.fill(len(rows)) - len(rows)), (0, 0)))[None]


@functools.cache
def _measured(bits: int, block_size: int) -> RowRule:
    if bits > 8:
        return RowRule.EVEN
    chain = product_chain(bits, _WIDTHS, 1, block_size)
    graph = Graph(chain.graph, 1)
    rows = np.random.default_rng(0).standard_normal((1, _ROWS, chain.width), np.float32)
    whole = graph.run({"x": rows}, "y")

    def differs(count: int) -> bool:
        parts = [slice(first, first + count) for first in range(_ROWS - count + 1)]
        return any(not np.array_equal(graph.run({"x": rows[:, part].copy()}, "y"), whole[:, part]) for part in parts)

    if differs(3):
        return RowRule.EVEN
    return RowRule.TWO_OR_MORE if differs(1) else RowRule.ANY
