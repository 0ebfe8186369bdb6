"""Control groups as folders that behave like the kernel's, and processes that may not touch the real ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from isthmus.devices import cgroups

UNLIMITED = str((1 << 63) - 4096)  # how version 1 writes it


@dataclass
class FakeGroups:
    """A mount and a membership file; folders are made and filled as the kernel would."""

    mount: Path
    membership: Path

    def v1(self, path: str = "/box") -> None:
        self.membership.write_text(f"9:name=systemd:/\n5:cpu,cpuacct:{path}\n4:memory:{path}\n0::/\n")
        for controller in ("memory", "cpu,cpuacct"):
            (self.mount / controller / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        self.write("memory/memory.limit_in_bytes", UNLIMITED)

    def v2(self, path: str = "/box", *, handed_down: str = "cpu memory") -> None:
        self.membership.write_text(f"0::{path}\n")
        (self.mount / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        for folder in {self.mount, self.mount / path.lstrip("/")}:
            (folder / "cgroup.controllers").write_text("cpuset cpu memory pids\n")
            (folder / "cgroup.subtree_control").write_text(handed_down if folder == self.mount else "")

    def write(self, file: str, text: str) -> None:
        (self.mount / file).write_text(f"{text}\n")

    @property
    def paths(self) -> dict[str, Path]:
        return {"mount": self.mount, "membership": self.membership}


@pytest.fixture
def fake_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGroups:
    monkeypatch.setattr(cgroups, "_REMOVAL_S", 0.0)  # a real folder with files never goes
    (tmp_path / "mount").mkdir()
    return FakeGroups(tmp_path / "mount", tmp_path / "membership")


@pytest.fixture(scope="session")
def real_groups() -> None:
    """Skips where this process may not make groups with a memory limit."""
    if sys.platform != "linux":
        pytest.skip("control groups are Linux's")
    group = cgroups.own_group("memory")
    try:
        child = cgroups.ChildGroup(group) if group else None
        if child is None:
            pytest.skip("no memory controller")
        try:
            child.limit_memory(1 << 30)
        finally:
            child.remove()
    except OSError as error:
        pytest.skip(f"may not make control groups: {error}")
