"""Limits hold for real: by control groups where this process may make them, by RLIMIT_DATA elsewhere."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.devices import limits as module
from isthmus.devices.limits import RLIMIT, enforce_memory_limit, limited, run_limited
from isthmus.errors import LimitError

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
NOWHERE = {"mount": Path("/nowhere"), "membership": Path("/nowhere")}

# Takes so many MB, then says so.
EATER = """
import sys
pages = bytearray(int(sys.argv[1]) * 10**6)
for first in range(0, len(pages), 4096):
    pages[first] = 1
print("ate")
"""
SELF = (
    """
import logging, sys
from pathlib import Path
from isthmus.devices.limits import enforce_memory_limit
from isthmus.errors import LimitError
logging.basicConfig()
try:
    held = enforce_memory_limit(float(sys.argv[2]), mount=Path(sys.argv[3]))
except LimitError as error:
    sys.exit(f"LimitError: {error}")
print(held, flush=True)
"""
    + EATER
)


@pytest.fixture(autouse=True)
def _small_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test process has grown; children and fresh interpreters have not."""
    monkeypatch.setattr(module, "process_memory", lambda: module_memory(anonymous_mb=20.0, data_mb=30.0))


def module_memory(**counters: float) -> object:
    from isthmus.devices.memory import ProcessMemory

    return ProcessMemory(**counters)


def eat(mb: int) -> list[str]:
    return [sys.executable, "-c", EATER, str(mb)]


@on_linux
def test_with_a_control_group_the_kernel_kills_at_the_limit_and_the_run_says_so(real_groups: None) -> None:
    fits = run_limited(eat(50), 150)
    assert (fits.status, fits.killed_for_memory) == (0, False)
    assert 50 < fits.peak_mb < 150
    assert fits.limits.memory.startswith("cgroup v")
    assert fits.limits.missing == ()
    beyond = run_limited(eat(250), 150)
    assert (beyond.status, beyond.killed_for_memory) == (137, True)


@on_linux
def test_groups_are_removed_afterwards(real_groups: None) -> None:
    with limited(150) as limits:
        folders = [group.folder for group in limits._groups]
        assert all(folder.is_dir() for folder in folders)
    assert folders
    assert not any(folder.exists() for folder in folders)


@on_linux
def test_without_control_groups_rlimit_data_makes_the_allocation_fail(capfd: pytest.CaptureFixture[str]) -> None:
    fits = run_limited(eat(50), 200, **NOWHERE)
    assert (fits.status, fits.killed_for_memory, fits.limits.memory) == (0, False, RLIMIT)
    assert capfd.readouterr().out == "ate\n"
    beyond = run_limited(eat(300), 200, **NOWHERE)
    assert (beyond.status, beyond.killed_for_memory, beyond.peak_mb) == (1, False, None)
    assert "MemoryError" in capfd.readouterr().err


@on_linux
def test_what_cannot_be_held_is_said(caplog: pytest.LogCaptureFixture) -> None:
    processors = len(os.sched_getaffinity(0))
    with caplog.at_level(logging.WARNING):
        done = run_limited(["true"], 200, cpus=processors + 7, cpu_time=0.5, **NOWHERE)
    assert done.limits.time is None
    said = " ".join(record.message for record in caplog.records)
    assert "no control group for memory" in said
    assert "RLIMIT_DATA holds" in said
    assert "the share of processor time is not held" in said
    assert f"{processors + 7} processors: this machine has {processors}" in said


@on_linux
def test_read_only_control_groups_fall_back(fake_groups, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_groups.v1()

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    done = run_limited(["true"], 200, cpu_time=1.0, **fake_groups.paths)
    assert done.limits.memory == RLIMIT
    assert "Read-only file system" in done.limits.missing[0]


@on_linux
def test_a_limit_that_the_kernel_refuses_leaves_no_group_behind(fake_groups, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_groups.v2()

    def refuse(group: object, amount: float) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(module.cgroups.ChildGroup, "limit_memory", refuse)
    monkeypatch.setattr(module.cgroups.ChildGroup, "limit_time", refuse)
    with limited(200, cpu_time=1.0, **fake_groups.paths) as limits:
        assert (limits.memory, limits.time) == (RLIMIT, None)
    assert not list(fake_groups.mount.rglob("isthmus-*"))


@on_linux
def test_version_2_holds_memory_and_time_in_one_group_for_a_process_is_in_one_only(fake_groups) -> None:
    fake_groups.v2(handed_down="memory")
    with limited(200, cpu_time=0.5, **fake_groups.paths) as limits:
        assert (limits.memory, limits.time) == ("cgroup v2", "cgroup v2")
        (group,) = limits._groups
        assert (group.folder / "memory.max").read_text() == "200000000"
        assert (group.folder / "cpu.max").read_text() == "5000 10000"
        assert "+cpu" in (group.folder.parent / "cgroup.subtree_control").read_text()


@on_linux
def test_version_1_needs_a_group_for_each(fake_groups) -> None:
    fake_groups.v1()
    with limited(200, cpu_time=0.5, **fake_groups.paths) as limits:
        assert (limits.memory, limits.time) == ("cgroup v1", "cgroup v1")
        assert [group.folder.parent.parent.name for group in limits._groups] == ["memory", "cpu,cpuacct"]


@on_linux
def test_processors_are_held_by_affinity(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os; print(len(os.sched_getaffinity(0)))"
    run_limited([sys.executable, "-c", program], cpus=1)
    assert capfd.readouterr().out == "1\n"


@on_linux
def test_the_status_is_the_command_s() -> None:
    assert run_limited(["sh", "-c", "exit 7"]).status == 7
    assert run_limited(["sh", "-c", "kill -TERM $$"]).status == 128 + 15


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ([], {}, "no command"),
        (["no-such-command-here"], {}, "cannot be started"),
        (["true"], {"memory_mb": 0}, "memory_mb=0: must be positive"),
        (["true"], {"memory_mb": -5.0}, "memory_mb=-5.0: must be positive"),
        (["true"], {"memory_mb": float("nan")}, "must be positive"),
        (["true"], {"cpus": 0}, "cpus=0: must be positive"),
        (["true"], {"cpu_time": float("inf")}, "cpu_time=inf: must be positive"),
        (["true"], {"memory_mb": 10}, "the interpreter with its libraries alone takes 20 MB"),
    ],
)
def test_limits_that_make_no_sense_are_refused(command: list[str], options: dict[str, float], message: str) -> None:
    with pytest.raises(LimitError, match=message):
        run_limited(command, **options, **NOWHERE)


def run_self(mb: int, limit_mb: float, mount: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SELF, str(mb), str(limit_mb), mount]
    environment = dict(os.environ) | {"OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@on_linux
def test_a_process_holds_itself_by_a_control_group(real_groups: None) -> None:
    fits = run_self(50, 200, "/sys/fs/cgroup")
    assert fits.returncode == 0, fits.stderr
    assert fits.stdout.startswith("cgroup v")
    assert fits.stdout.endswith("ate\n")
    beyond = run_self(300, 200, "/sys/fs/cgroup")
    assert beyond.returncode == -9
    assert "ate" not in beyond.stdout


@on_linux
def test_a_process_holds_itself_by_rlimit_data_and_says_why() -> None:
    fits = run_self(50, 300, "/nowhere")
    assert fits.stdout == f"{RLIMIT}\nate\n", fits.stderr
    assert "no control group for memory" in fits.stderr
    beyond = run_self(400, 300, "/nowhere")
    assert beyond.returncode == 1
    assert "MemoryError" in beyond.stderr


@on_linux
@pytest.mark.parametrize("mount", ["/sys/fs/cgroup", "/nowhere"])
def test_a_limit_below_what_the_interpreter_takes_is_refused(mount: str) -> None:
    done = run_self(1, 5, mount)
    assert done.returncode == 1
    assert "LimitError: a memory limit of 5 MB: the interpreter with its libraries alone takes" in done.stderr


@pytest.mark.parametrize("limit_mb", [0, -1, float("nan"), float("inf")])
def test_a_limit_on_oneself_must_be_positive(limit_mb: float) -> None:
    with pytest.raises(LimitError, match="must be positive"):
        enforce_memory_limit(limit_mb)


def test_a_system_without_anything_that_holds_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "win32")
    with pytest.raises(LimitError, match="this system has nothing that holds one"):
        enforce_memory_limit(500, **NOWHERE)
