"""Allocation: within the budget, and close to the best of all combinations."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.quant.allocation import Choice, allocate, mixed
from isthmus.quant.opsc import Precision, Recipe

ways = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1, max_size=5)
models = st.lists(ways, min_size=1, max_size=4)


def choices(model: list[list[tuple[int, float]]]) -> dict[str, list[Choice]]:
    return {
        f"w{index}": [Choice(Precision(4, 32), size, cost) for size, cost in ways] for index, ways in enumerate(model)
    }


@settings(deadline=None)
@given(models, st.integers(0, 120))
def test_the_budget_holds_and_the_cost_is_close_to_the_least(model: list[list[tuple[int, float]]], budget: int) -> None:
    least = sum(min(size for size, _ in ways) for ways in model)
    if least > budget:
        with pytest.raises(ValueError, match=f"{least} bytes at least, {budget} allowed"):
            allocate(choices(model), budget)
        return
    chosen = allocate(choices(model), budget)
    assert chosen.keys() == choices(model).keys()
    assert sum(choice.bytes for choice in chosen.values()) <= budget
    cost = sum(choice.cost for choice in chosen.values())
    fitting = [combo for combo in itertools.product(*model) if sum(size for size, _ in combo) <= budget]
    best = min(sum(c for _, c in combo) for combo in fitting)
    # What is lost against the best is less than one step of one weight could bring.
    largest_step = max(max(c for _, c in ways) - min(c for _, c in ways) for ways in model)
    assert best - 1e-9 <= cost <= best + largest_step + 1e-9


def test_bytes_go_where_they_save_most() -> None:
    few, many = Precision(2, 64), Precision(8, 64)
    model = {
        name: [Choice(few, 10, loss), Choice(many, 40, loss / 100)] for name, loss in {"a": 1, "b": 9, "c": 3}.items()
    }
    chosen = allocate(model, 90)
    assert {name: choice.precision for name, choice in chosen.items()} == {"a": few, "b": many, "c": many}
    assert allocate(model, 89)["c"].precision == few


@pytest.mark.parametrize(("front", "back"), [(4, 8), (2, 4), (16, 4)])
def test_the_rule_of_thumb_doubles_bits_at_both_ends_and_every_third_layer(front: int, back: int) -> None:
    recipe = Recipe(16, 8, front, back, 8, 8, 32, weights="mixed")
    chosen = mixed(recipe)
    more = {0, 1, 4, 7, 10, 13, 14, 15}
    expected = {
        f"layers.{layer}.{role}": 2 * recipe.layer_bits(layer)
        for layer in more
        for role in ("qkv", "down")
        if recipe.layer_bits(layer) < 8
    }
    assert {name: precision.bits for name, precision in chosen.items()} == expected
    assert {(precision.block_size, precision.method) for precision in chosen.values()} == {(32, "gptq")}
