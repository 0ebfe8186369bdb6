from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.runtime.fleet.scaling import GROW_AFTER_S, SHRINK_AFTER_S, Scaler


def settle(scaler: Scaler, total: float, start: float, seconds: float) -> list[int]:
    """The numbers of workers under a load that all of them share, looked at twice a second."""
    numbers = []
    for tick in range(int(2 * seconds)):
        workers = scaler.wanted
        numbers.append(scaler.observe(min(1.0, total / workers), workers, start + tick / 2))
    return numbers


def test_a_full_fleet_grows_after_a_while_and_an_empty_one_shrinks_after_a_long_while():
    scaler = Scaler(1, 3)
    assert settle(scaler, 1.0, 0, GROW_AFTER_S) == [1] * int(2 * GROW_AFTER_S)
    assert settle(scaler, 1.0, GROW_AFTER_S, 5)[-1] == 2
    assert settle(scaler, 0.0, 100, SHRINK_AFTER_S) == [2] * int(2 * SHRINK_AFTER_S)
    assert settle(scaler, 0.0, 100 + SHRINK_AFTER_S, 5)[-1] == 1


def test_a_short_peak_changes_nothing():
    scaler = Scaler(1, 3)
    for second in range(20):
        assert scaler.observe(1.0 if second % 2 else 0.5, 1, second) == 1


def test_nothing_changes_while_a_worker_starts():
    scaler = Scaler(2, 3)
    for second in range(20):
        assert scaler.observe(1.0, 1, second) == 2


@given(st.floats(0, 10), st.integers(1, 4), st.integers(0, 4))
def test_a_steady_load_never_makes_the_number_swing(total, least, more):
    numbers = settle(Scaler(least, least + more), total, 0, 1000)
    assert all(least <= number <= least + more for number in numbers)
    assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
    assert len(set(numbers[-200:])) == 1
