"""The pool of KV caches: slots, moves, memory."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import RequestError
from isthmus.runtime.bundle import KVSpec
from isthmus.runtime.pool import KVPool
from isthmus.runtime.segments import KVCache

SPEC = KVSpec(32, 2, 16)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def fill(cache: KVCache, value: float, positions: int) -> None:
    rows = np.full((2, 2, SPEC.kv_heads, positions, SPEC.row_width), value, np.float32)
    rows += np.arange(positions, dtype=np.float32)[:, None] / 1000
    cache.append(rows)


@given(
    st.lists(st.one_of(st.tuples(st.just("take"), st.integers(1, 20)), st.tuples(st.just("end"), st.integers(0, 9))))
)
def test_the_taken_slots_are_always_the_first_and_keep_their_rows(steps: list[tuple[str, int]]) -> None:
    pool = KVPool(range(2), SPEC, capacity=20, slots=4)
    open_: list[tuple[KVCache, float, int]] = []
    for number, (what, argument) in enumerate(steps):
        if what == "take" and len(open_) < 4:
            cache = pool.take(20)
            assert cache.length == 0
            fill(cache, float(number), argument)
            open_.append((cache, float(number), argument))
        elif what == "end" and open_:
            pool.give_back(open_.pop(argument % len(open_))[0])
        assert sorted(pool.slot(cache) for cache, _, _ in open_) == list(range(len(open_))) == list(range(len(pool)))
        for cache, value, positions in open_:
            assert cache.length == pool.length(pool.slot(cache)) == positions
            rows = cache.rows(0, positions)
            assert np.array_equal(
                rows[0, 0, 0, :, 0], np.float32(value) + np.arange(positions, dtype=np.float32) / 1000
            )
            view = pool.view(pool.slot(cache), pool.slot(cache) + 1)
            assert all(np.shares_memory(view[name], array) for name, array in cache.arrays.items())


def test_a_view_of_slots_is_their_memory() -> None:
    pool = KVPool(range(3, 5), SPEC, capacity=10, slots=3)
    caches = [pool.take(10) for _ in range(3)]
    view = pool.view(0, 2)
    assert set(view) == {("key", 3), ("value", 3), ("key", 4), ("value", 4)}
    fill(caches[1], 5.0, 3)
    assert (view["value", 4][1, :, :3] >= 5.0).all()
    assert view["key", 3].flags.c_contiguous
    assert view["key", 3].shape[2] >= 10 + SPEC.spare_rows


def test_a_session_longer_than_a_slot_is_refused() -> None:
    with pytest.raises(RequestError, match="11 positions: at most 10"):
        KVPool(range(1), SPEC, capacity=10, slots=1).take(11)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_taken_by_positions_that_were_written_and_given_back_at_the_end() -> None:
    spec = KVSpec(32, 4, 64)
    pool = KVPool(range(4), spec, capacity=4096, slots=64)  # 2 GB of address space
    before = resident_bytes()
    caches = [pool.take(1024) for _ in range(8)]
    assert resident_bytes() - before < 2e6
    rows = np.ones((4, 2, 4, 1024, 64), np.float32)
    with_rows = resident_bytes()
    for cache in caches:
        cache.append(rows)
    taken = resident_bytes() - with_rows
    assert taken <= 8 * pool.session_bytes(1024) + 2e6
    assert taken >= 8 * rows.nbytes * 0.9
    for cache in caches:
        pool.give_back(cache)
    assert resident_bytes() - with_rows < 0.05 * taken + 2e6


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_session_bytes_are_whole_pages_of_every_head(bits: int) -> None:
    spec = KVSpec(bits, 3, 16)
    pool = KVPool(range(2), spec, capacity=500, slots=2)
    exact = spec.cache_bytes(2, 300)
    assert exact <= pool.session_bytes(300) <= exact + 2 * 2 * 3 * mmap.PAGESIZE
    assert pool.session_bytes(300) % mmap.PAGESIZE == 0
