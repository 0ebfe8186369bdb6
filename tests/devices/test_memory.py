"""Memory counters: read right, and a peak that was over before anyone looked is still seen."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from isthmus.devices.memory import AnonymousPeak, parse_status, process_memory

STATUS = """Name:\tpython
VmPeak:\t  9000000 kB
VmHWM:\t   300000 kB
VmRSS:\t   200000 kB
RssAnon:\t   125000 kB
RssFile:\t    75000 kB
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SIZE = 64_000_000  # bytes


def touched_pages() -> np.ndarray:
    return np.ones(SIZE, np.uint8)


def test_the_status_file_counts_in_units_of_1024_bytes() -> None:
    memory = parse_status(STATUS)
    assert memory.resident_mb == pytest.approx(204.8)
    assert memory.peak_resident_mb == pytest.approx(307.2)
    assert memory.anonymous_mb == pytest.approx(128.0)


def test_a_counter_that_the_system_does_not_have_is_none() -> None:
    without = "".join(line for line in STATUS.splitlines(keepends=True) if "RssAnon" not in line)
    assert parse_status(without).anonymous_mb is None
    assert parse_status(without).resident_mb is not None


@on_linux
def test_touched_memory_counts_as_anonymous_and_resident() -> None:
    before = process_memory()
    pages = touched_pages()
    after = process_memory()
    for name in ("anonymous_mb", "resident_mb"):
        assert getattr(after, name) - getattr(before, name) > 0.9 * pages.nbytes / 1e6
    assert after.peak_resident_mb >= after.resident_mb


@on_linux
def test_the_peak_holds_what_was_freed_before_the_end() -> None:
    with AnonymousPeak() as anonymous:
        before = anonymous.peak_mb
        pages = touched_pages()
        deadline = time.monotonic() + 20
        while anonymous.peak_mb < before + 0.9 * SIZE / 1e6 and time.monotonic() < deadline:
            time.sleep(0.01)
        del pages
    assert anonymous.peak_mb > before + 0.9 * SIZE / 1e6


def test_without_counters_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.devices.memory._STATUS", type("Absent", (), {"exists": staticmethod(lambda: False)}))
    with AnonymousPeak() as anonymous:
        pass
    assert anonymous.peak_mb is None
    assert process_memory().resident_mb is None
