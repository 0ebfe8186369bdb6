"""Processors by kind, from the kernel's description of phones, boards and servers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isthmus.devices.cores import Processor, cores_by_kind, processors
from isthmus.devices.profile import Cores


def arm(number: int, part: str) -> str:
    return f"processor\t: {number}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"


def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, clocks: list[int | None]) -> list[Processor]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(len(clocks))), raising=False)
    (tmp_path / "cpuinfo").write_text(text)
    for number, khz in enumerate(clocks):
        if khz is not None:
            folder = tmp_path / "cpu" / f"cpu{number}" / "cpufreq"
            folder.mkdir(parents=True)
            (folder / "cpuinfo_max_freq").write_text(f"{khz}\n")
    return processors(tmp_path / "cpuinfo", tmp_path / "cpu")


def test_a_phone_has_big_and_small_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join([*(arm(n, "0xd05") for n in range(4)), *(arm(n, "0xd41") for n in range(4, 8))])
    found = described(tmp_path, monkeypatch, text, [2_000_000] * 4 + [2_500_000] * 4)
    assert [processor.number for processor in found] == [4, 5, 6, 7, 0, 1, 2, 3]
    assert cores_by_kind(found) == (Cores("Cortex-A78", 4, 2.5), Cores("Cortex-A55", 4, 2.0))


def test_favoured_cores_are_the_same_kind_and_slow_ones_of_that_name_are_not() -> None:
    found = [Processor(n, "Some x86", ghz) for n, ghz in enumerate([5.8, 5.8, 5.5, 5.5, 4.3, 4.3])]
    assert cores_by_kind(found) == (Cores("Some x86", 4, 5.8), Cores("Some x86", 2, 4.3))


def test_where_the_highest_clock_is_hidden_the_fastest_at_this_moment_stands_for_it(tmp_path, monkeypatch) -> None:
    text = "\n".join(f"processor : {n}\nmodel name : EPYC\ncpu MHz : {mhz}\n" for n, mhz in enumerate((800.0, 2600.0)))
    assert cores_by_kind(described(tmp_path, monkeypatch, text, [None, None])) == (Cores("EPYC", 2, 2.6),)


@pytest.mark.parametrize("text", ["", "processor : x\n", arm(0, "0xfff")])
def test_a_processor_that_nobody_describes_still_counts(tmp_path, monkeypatch, text: str) -> None:
    found = described(tmp_path, monkeypatch, text, [None])
    assert [(processor.number, processor.ghz) for processor in found] == [(0, 0.0)]
    assert found[0].kind


def test_without_affinity_all_processors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert [cores.count for cores in cores_by_kind(processors())] == [6]
