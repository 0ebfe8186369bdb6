from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from isthmus.devices import row_rule as module
from isthmus.devices.row_rule import RowRule, filled_up, row_rule


@pytest.mark.parametrize(
    ("rule", "filled"),
    [(RowRule.ANY, [1, 2, 3, 4]), (RowRule.TWO_OR_MORE, [2, 2, 3, 4]), (RowRule.EVEN, [2, 2, 4, 4])],
)
def test_rows_are_filled_up_to_the_next_number_of_the_rule(rule: RowRule, filled: list[int]) -> None:
    assert [rule.fill(rows) for rows in (1, 2, 3, 4)] == filled
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    array = filled_up(rows, rule)
    assert array.shape == (1, filled[2], 2)
    np.testing.assert_array_equal(array[0, :3], rows)
    assert not array[0, 3:].any()


def test_a_graph_has_the_strictest_rule_of_its_weights() -> None:
    packed = [(bits, 32) for bits in (2, 4, 8)]
    assert row_rule([]) is RowRule.ANY
    assert row_rule(packed) is max(row_rule([precision]) for precision in packed)
    assert row_rule([*packed, (16, 0)]) is RowRule.EVEN


@pytest.mark.parametrize(
    ("differs", "rule"),
    [
        (lambda rows: rows == 1, RowRule.TWO_OR_MORE),
        (lambda rows: rows % 2 == 1, RowRule.EVEN),
        (lambda rows: False, RowRule.ANY),
    ],
)
def test_the_rule_follows_from_what_the_kernels_do(
    monkeypatch: pytest.MonkeyPatch, differs: Callable[[int], bool], rule: RowRule
) -> None:
    class OddGraph(module.Graph):
        def run(self, inputs: dict[str, np.ndarray], output: str) -> np.ndarray:
            result = super().run({"x": np.repeat(inputs["x"], 2, axis=1)}, output)[:, ::2]  # even: alike everywhere
            result[:, -1] += differs(inputs["x"].shape[1]) * np.float32(1)
            return result

    monkeypatch.setattr(module, "Graph", OddGraph)
    assert module._measured.__wrapped__(8, 32) is rule
