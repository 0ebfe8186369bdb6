"""Memory counters: read right, and a peak that was over before anyone looked is still seen."""

from __future__ import annotations

import mmap
import sys
import time

import numpy as np
import pytest

from isthmus.devices.memory import AnonymousPeak, machine_memory, parse_status, process_memory

STATUS = """Name:\tpython
VmPeak:\t  9000000 kB
VmHWM:\t   300000 kB
VmRSS:\t   200000 kB
RssAnon:\t   125000 kB
RssFile:\t    75000 kB
VmData:\t   400000 kB
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SIZE = 64_000_000  # bytes


def touched_pages() -> np.ndarray:
    # New ones, also where the heap has free memory.
    pages = np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    pages[:] = 1
    return pages


def test_the_status_file_counts_in_units_of_1024_bytes() -> None:
    memory = parse_status(STATUS)
    assert memory.resident_mb == pytest.approx(204.8)
    assert memory.peak_resident_mb == pytest.approx(307.2)
    assert memory.anonymous_mb == pytest.approx(128.0)
    assert memory.data_mb == pytest.approx(409.6)


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


MEMINFO = (
    "MemTotal:        1000000 kB\nMemFree:          100000 kB\nMemAvailable:     600000 kB\nHugePages_Total:       0\n"
)


def test_the_machine_s_memory_is_the_kernel_s_figure(tmp_path, fake_groups) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    memory = machine_memory(tmp_path / "meminfo", **fake_groups.paths)
    assert (memory.total_mb, memory.free_mb) == (1024.0, 614.4)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_limit_goes_before_the_machine_s(tmp_path, fake_groups, version: int) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    if version == 1:
        fake_groups.v1()
        fake_groups.write("memory/box/memory.limit_in_bytes", "300000000")
        fake_groups.write("memory/box/memory.usage_in_bytes", "100000000")
    else:
        fake_groups.v2()
        fake_groups.write("box/memory.max", "300000000")
        fake_groups.write("box/memory.current", "100000000")
    memory = machine_memory(tmp_path / "meminfo", **fake_groups.paths)
    assert (memory.total_mb, memory.free_mb) == (300.0, 200.0)


@pytest.mark.parametrize("text", [None, "", "MemTotal: 1000 kB\n"])
def test_without_the_kernel_s_figures_the_machine_s_memory_is_unknown(tmp_path, fake_groups, text) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    assert machine_memory(tmp_path / "meminfo", **fake_groups.paths) is None
