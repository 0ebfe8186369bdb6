"""A layer's feed-forward network, and networks that single rows leave out.

Source: FFN-SkipLLM (arXiv 2404.03865). Where the cosine of a token's hidden state before and after a network reaches a
threshold, that token leaves the next network out. Attention always runs, so that no key or value is ever missing, and
so do the networks of some layers at either end. Ours: one network at a time is left out (the paper's k is 1), and a
block's first one always runs, so that no graph needs to know what another one found.

Each row decides for itself, whatever rows are beside it: the network runs if any of them wants it, and is zero for the
others. So no bit of a row depends on its chunk, and only where all rows agree is anything saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .families.common import LayerTensors
from .graph import CONTRIB

if TYPE_CHECKING:
    from .decoder import SegmentBuilder

COLD = 0.1  # share of the layers, at either end, whose networks always run


def skippable_layers(block: range, layers: int) -> range:
    """The layers of a block, in a model of so many, whose networks may be left out."""
    cold = max(1, round(COLD * layers))
    return range(max(block.start, cold) + 1, min(block.stop, layers - cold))


def feed_forward(builder: SegmentBuilder, layer: int, names: LayerTensors, normed: str) -> str:
    """The gated network: ``down(silu(gate(x)) * up(x))``."""
    writer, prefix = builder.writer, f"layers.{layer}"
    gate = builder.linear(normed, f"{prefix}.gate", (names.gate,))
    up = builder.linear(normed, f"{prefix}.up", (names.up,))
    activated = writer.node("QuickGelu", [gate], domain=CONTRIB, alpha=1.0)  # x * sigmoid(x): silu in one kernel
    return builder.linear(writer.node("Mul", [activated, up]), f"{prefix}.down", (names.down,))


class SkippableNetworks:
    """The networks of one block, in order: for each layer first `enter`, then `branch`.

    Args:
        builder: of the block.
        zero: a zero of the hidden state's shape.
        similarity: the graph's input that tells each row's threshold, ``[1, rows, 1]``; above 1, nothing is left out.
        layers: whose networks may be left out, see `skippable_layers`.
    """

    def __init__(self, builder: SegmentBuilder, zero: str, similarity: str, layers: range) -> None:
        self._builder, self._zero, self._similarity, self._layers = builder, zero, similarity, layers
        self._before: str | None = None  # the hidden state that the last network's output was added to
        self._leaves: str | None = None  # which rows leave the layer's network out, if any may
        self._runs = ""  # whether any row runs it

    def enter(self, layer: int, hidden: str) -> None:
        """Decide who runs a layer's network, by what the last one did: cos(before, after) >= threshold.

        Args:
            layer: that begins.
            hidden: the state behind the last layer.
        """
        left, self._leaves = self._leaves, None
        if self._before is None or layer not in self._layers:
            return
        writer, before = self._builder.writer, self._before
        width = writer.constant("width_axis", np.array([2], np.int64))
        squares = [writer.node("ReduceSumSquare", [state, width]) for state in (before, hidden)]
        norms = writer.node("Sqrt", [writer.node("Mul", squares)])
        dot = writer.node("ReduceSum", [writer.node("Mul", [before, hidden]), width])
        margin = writer.node("Sub", [dot, writer.node("Mul", [self._similarity, norms])])
        if left is not None:  # what has not run has turned nothing, and tells nothing
            margin = writer.node("Where", [left, writer.constant("short", np.array(-1, np.float32)), margin])
        zero = writer.constant("no_margin", np.array(0, np.float32))
        self._leaves = writer.node("GreaterOrEqual", [margin, zero], output=f"layers.{layer}.leaves")
        self._runs = writer.node("Less", [writer.node("ReduceMin", [margin], keepdims=0), zero])

    def branch(self, layer: int, hidden: str, network: Callable[[], str]) -> str:
        """Append a layer's network, conditionally if it may be left out.

        Args:
            layer: whose it is.
            hidden: the state that the network's output is added to.
            network: appends the network's nodes and returns their output.
        """
        self._before = hidden
        if self._leaves is None:
            return network()
        writer = self._builder.writer
        output = writer.fresh(f"layers.{layer}.ffn")
        shape = [self._builder.batch, writer.fresh("rows"), self._builder.arch.d_model]
        with writer.branch(self._runs, output, self._zero, shape):
            writer.node("Where", [self._leaves, self._zero, network()])
        return output
