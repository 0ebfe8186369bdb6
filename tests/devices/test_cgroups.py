"""Control groups: found in both versions and in containers, their limits read, groups of our own made and removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isthmus.devices import cgroups
from isthmus.devices.cgroups import ChildGroup, memory_limit, own_group

MB = 10**6


def test_version_1_has_a_tree_for_each_controller(fake_groups) -> None:
    fake_groups.v1()
    memory, cpu = (own_group(name, **fake_groups.paths) for name in ("memory", "cpu"))
    assert (memory.version, memory.folder) == (1, fake_groups.mount / "memory" / "box")
    assert (cpu.version, cpu.folder) == (1, fake_groups.mount / "cpu,cpuacct" / "box")


def test_version_2_has_one_tree_for_all(fake_groups) -> None:
    fake_groups.v2()
    assert own_group("memory", **fake_groups.paths).folder == fake_groups.mount / "box"
    assert own_group("cpu", **fake_groups.paths).version == 2
    assert own_group("io", **fake_groups.paths) is None  # not handed down to this group


def test_in_a_container_the_mount_s_top_is_the_group(fake_groups) -> None:
    fake_groups.v1()
    fake_groups.membership.write_text("4:memory:/docker/0123abcd\n")
    assert own_group("memory", **fake_groups.paths).folder == fake_groups.mount / "memory"
    fake_groups.membership.write_text("4:memory:/../../etc\n")
    assert own_group("memory", **fake_groups.paths).folder == fake_groups.mount / "memory"


def test_without_control_groups_there_is_none(tmp_path: Path) -> None:
    assert own_group("memory", tmp_path, tmp_path / "absent") is None
    assert memory_limit(tmp_path, tmp_path / "absent") is None


def test_the_limit_is_the_tightest_on_the_way_up_and_cached_pages_are_free(fake_groups) -> None:
    fake_groups.v2("/outer/inner")
    assert memory_limit(**fake_groups.paths) is None
    fake_groups.write("outer/memory.max", str(300 * MB))
    fake_groups.write("outer/memory.current", str(250 * MB))
    fake_groups.write("outer/memory.stat", f"anon {100 * MB}\ninactive_file {50 * MB}")
    fake_groups.write("outer/inner/memory.max", str(500 * MB))
    fake_groups.write("outer/inner/memory.current", str(10 * MB))
    limit = memory_limit(**fake_groups.paths)
    assert (limit.limit, limit.free) == (300 * MB, 100 * MB)
    fake_groups.write("outer/memory.max", "max")
    assert memory_limit(**fake_groups.paths).limit == 500 * MB


def test_version_1_writes_no_limit_as_a_huge_number(fake_groups) -> None:
    fake_groups.v1()
    assert memory_limit(**fake_groups.paths) is None
    fake_groups.write("memory/box/memory.limit_in_bytes", str(200 * MB))
    fake_groups.write("memory/box/memory.usage_in_bytes", str(150 * MB))
    fake_groups.write("memory/box/memory.stat", f"total_inactive_file {30 * MB}")
    limit = memory_limit(**fake_groups.paths)
    assert (limit.limit, limit.free) == (200 * MB, 80 * MB)


def test_a_child_of_version_1_lies_below_its_parent(fake_groups) -> None:
    fake_groups.v1()
    child = ChildGroup(own_group("memory", **fake_groups.paths))
    assert child.folder.parent == fake_groups.mount / "memory" / "box"
    child.limit_memory(200 * MB)
    assert (child.folder / "memory.limit_in_bytes").read_text() == str(200 * MB)
    assert not (child.folder / "memory.memsw.limit_in_bytes").exists()
    child.enter()
    assert (child.folder / "cgroup.procs").read_text() == str(os.getpid())


def test_swap_is_limited_too_where_the_kernel_counts_it(fake_groups) -> None:
    fake_groups.v1()
    child = ChildGroup(own_group("memory", **fake_groups.paths))
    (child.folder / "memory.memsw.limit_in_bytes").write_text("")
    child.limit_memory(200 * MB)
    assert (child.folder / "memory.memsw.limit_in_bytes").read_text() == str(200 * MB)
    fake_groups.v2()
    child = ChildGroup(own_group("memory", **fake_groups.paths))
    (child.folder / "memory.swap.max").write_text("max")
    child.limit_memory(200 * MB)
    assert (child.folder / "memory.max").read_text() == str(200 * MB)
    assert (child.folder / "memory.swap.max").read_text() == "0"


def test_in_version_2_a_group_with_processes_gets_a_sibling(fake_groups, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_groups.v2()
    write = Path.write_text

    def refuse(path: Path, text: str, *args: object, **options: object) -> int:
        if path == fake_groups.mount / "box" / "cgroup.subtree_control":
            raise OSError(16, "Device or resource busy")
        return write(path, text, *args, **options)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert ChildGroup(own_group("memory", **fake_groups.paths)).folder.parent == fake_groups.mount


def test_a_group_that_cannot_be_made_says_why(fake_groups, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_groups.v1()

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="Read-only"):
        ChildGroup(own_group("memory", **fake_groups.paths))


@pytest.mark.parametrize(
    ("cpus", "quota", "period"),
    [(2.0, 20_000, 10_000), (0.5, 5_000, 10_000), (0.04, 1_000, 25_000), (0.0001, 1_000, 1_000_000)],
)
def test_a_share_of_time_becomes_a_quota_that_the_kernel_takes(fake_groups, cpus, quota, period) -> None:
    fake_groups.v2()
    child = ChildGroup(own_group("cpu", **fake_groups.paths))
    child.limit_time(cpus)
    assert (child.folder / "cpu.max").read_text() == f"{quota} {period}"
    fake_groups.v1()
    child = ChildGroup(own_group("cpu", **fake_groups.paths))
    child.limit_time(cpus)
    assert (child.folder / "cpu.cfs_quota_us").read_text() == str(quota)
    assert (child.folder / "cpu.cfs_period_us").read_text() == str(period)


@pytest.mark.parametrize(
    ("version", "file", "text"),
    [
        (1, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3"),
        (2, "memory.events", "oom 5\noom_kill 3"),
    ],
)
def test_kills_and_peak_are_read_from_the_group(fake_groups, version: int, file: str, text: str) -> None:
    (fake_groups.v1 if version == 1 else fake_groups.v2)()
    child = ChildGroup(own_group("memory", **fake_groups.paths))
    assert (child.kills(), child.peak()) == (0, None)
    (child.folder / file).write_text(text)
    (child.folder / {1: "memory.max_usage_in_bytes", 2: "memory.peak"}[version]).write_text("77\n")
    assert (child.kills(), child.peak()) == (3, 77)


def test_an_empty_group_is_removed_and_one_left_by_a_dead_process_too(fake_groups) -> None:
    fake_groups.v1()
    home = fake_groups.mount / "memory" / "box"
    dead, alive = home / f"isthmus-{2**31 - 1}-1", home / f"isthmus-{os.getpid()}-1"
    dead.mkdir()
    alive.mkdir()
    child = ChildGroup(own_group("memory", **fake_groups.paths))
    assert alive.is_dir()
    assert not dead.exists()
    child.remove()
    assert not child.folder.exists()
    child.remove()


def test_leaving_goes_back_to_where_the_process_was(fake_groups) -> None:
    fake_groups.v1()
    child = ChildGroup(own_group("memory", **fake_groups.paths))
    child.leave()
    assert (fake_groups.mount / "memory" / "box" / "cgroup.procs").read_text() == str(os.getpid())
    assert not child.folder.exists()


def test_the_kernel_agrees(real_groups: None) -> None:
    group = own_group("memory")
    child = ChildGroup(group)
    try:
        child.limit_memory(64 * MB)
        limit = (child.folder / cgroups._LIMIT[child.version]).read_text()
        assert 63 * MB < int(limit) <= 64 * MB  # rounded to pages
        assert child.kills() == 0
    finally:
        child.remove()
    assert not child.folder.exists()
