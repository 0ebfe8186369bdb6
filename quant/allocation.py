"""Which weight gets how many bytes: a rule of thumb, and the best use of a budget."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .opsc import Precision, Recipe

_MORE = {2: 4, 4: 8}


@dataclass(frozen=True)
class Choice:
    """One way to store a weight: the bytes that it takes and the loss that it causes."""

    precision: Precision
    bytes: int
    cost: float


def mixed(recipe: Recipe) -> dict[str, Precision]:
    """Twice the bits for ``qkv`` and ``down`` in the first and last eighth of the layers and every third between.

    llama.cpp's rule for ``Q4_K_M``, with one change: there the value projection gets more, which is one product with
    query and key here.
    """
    eighth = recipe.layers // 8
    chosen = {}
    for layer in range(recipe.layers):
        bits = recipe.layer_bits(layer)
        if bits in _MORE and (layer < eighth or layer >= recipe.layers - eighth or (layer - eighth) % 3 == 2):
            for role in ("qkv", "down"):
                name = f"layers.{layer}.{role}"
                chosen[name] = replace(recipe.precision(name), bits=_MORE[bits])
    return chosen


def allocate(choices: Mapping[str, list[Choice]], budget: int) -> dict[str, Choice]:
    """The choices of least total cost, one for each weight, that take no more bytes than the budget.

    Every weight starts at its fewest bytes; then the step that lowers the cost most for a byte is taken, as long as it
    fits. Steps follow each weight's lower convex hull, so that this is the Lagrangian optimum up to the last step.

    Raises:
        ValueError: the fewest bytes are more than the budget.
    """
    hulls = {name: _hull(list(ways)) for name, ways in choices.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].bytes for hull in hulls.values())
    if spent > budget:
        raise ValueError(f"{spent} bytes at least, {budget} allowed")
    steps = sorted(
        (
            (-(before.cost - after.cost) / (after.bytes - before.bytes), name, index)
            for name, hull in hulls.items()
            for index, (before, after) in enumerate(itertools.pairwise(hull))
        ),
    )
    for _, name, index in steps:
        hull = hulls[name]
        extra = hull[index + 1].bytes - hull[index].bytes
        if at[name] == index and spent + extra <= budget:
            at[name], spent = index + 1, spent + extra
    return {name: hulls[name][index] for name, index in at.items()}


def _hull(ways: list[Choice]) -> list[Choice]:
    """The choices worth considering, by rising bytes: cost falls, and ever less for a byte."""
    hull: list[Choice] = []
    for way in sorted(ways, key=lambda choice: (choice.bytes, choice.cost)):
        if hull and way.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], way):
            hull.pop()
        hull.append(way)
    return hull


def _slope(before: Choice, after: Choice) -> float:
    """Cost saved for a byte."""
    if after.bytes == before.bytes:
        return float("inf")
    return (before.cost - after.cost) / (after.bytes - before.bytes)
