"""Linux control groups, version 1 and 2: the limits that this process is under, and groups with limits of our own.

Both versions keep a group as a folder. Version 1 has one tree for each controller (``/sys/fs/cgroup/memory/...``),
version 2 one for all, beside the others (``/sys/fs/cgroup/unified``) on systems that have both. In a container the path
that ``/proc/self/cgroup`` names may lie above what is mounted; the mount's top is the container's group then.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_UNLIMITED = 1 << 60  # version 1 writes "no limit" as the largest multiple of a page
_REMOVAL_S = 2.0  # the kernel takes a moment to let go of the processes that ended

_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
_USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
_CACHE = {1: "total_inactive_file", 2: "inactive_file"}
# Swap would let a process live on above its limit.
_SWAP = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
_PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
_KILLS = {1: "memory.oom_control", 2: "memory.events"}


@dataclass(frozen=True)
class Group:
    """One group's folder in the tree of one controller."""

    version: int
    controller: str
    folder: Path
    top: Path

    def ancestors(self) -> list[Path]:
        """Its folder and those above it, up to the mount's top."""
        return [self.folder, *(path for path in self.folder.parents if path.is_relative_to(self.top))]


@dataclass(frozen=True)
class MemoryLimit:
    """The tightest memory limit over a process, in bytes, and what is still free under it."""

    limit: int
    free: int


def own_group(controller: str, mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> Group | None:
    """This process's group for a controller such as ``memory``; None where there are no control groups."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in (line for line in lines if len(line) == 3):
        names = controllers.split(",")
        if controller in names:
            for top in (mount / controller, mount / controllers):
                if top.is_dir():
                    return Group(1, controller, _inside(top, path), top)
        elif controllers == "":
            for top in (mount, mount / "unified"):
                folder = _inside(top, path)
                if controller in _words(folder / "cgroup.controllers"):
                    return Group(2, controller, folder, top)
    return None


def memory_limit(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> MemoryLimit | None:
    """The tightest limit of this process's group and those above it; None without one.

    Cached file pages that nobody used lately count as free, as they do in the system's own ``MemAvailable``.
    """
    group = own_group("memory", mount, membership)
    if group is None:
        return None
    limits = []
    for folder in group.ancestors():
        limit = _number(folder / _LIMIT[group.version])
        if limit is not None and limit < _UNLIMITED:
            used = _number(folder / _USAGE[group.version]) or 0
            cache = _counter(folder / "memory.stat", _CACHE[group.version])
            limits.append(MemoryLimit(limit, max(0, limit - max(0, used - cache))))
    if not limits:
        return None
    return MemoryLimit(min(one.limit for one in limits), min(one.free for one in limits))


class ChildGroup:
    """A group of our own below ``group``, or beside it; `remove` it in the end.

    Raises:
        OSError: this process may not make groups there.
    """

    def __init__(self, group: Group) -> None:
        self.version = group.version
        self._home = group.folder
        self.folder = self._make(group)

    def _make(self, group: Group) -> Path:
        """Version 2 lets a group with processes have no limited children, unless it is the topmost: then a sibling."""
        refused = OSError(f"the {group.controller} controller is not handed down to groups that this process may make")
        for parent in group.ancestors()[: 1 if group.version == 1 else 2]:
            _remove_abandoned(parent)
            folder = parent / f"isthmus-{os.getpid()}-{time.monotonic_ns()}"
            try:
                if group.version == 2 and group.controller not in _words(parent / "cgroup.subtree_control"):
                    (parent / "cgroup.subtree_control").write_text(f"+{group.controller}")
                folder.mkdir()
            except OSError as error:
                refused = error
            else:
                return folder
        raise refused

    def also(self, controller: str) -> None:
        """Have another controller of version 2 in the same group: there a process is in one group for all of them."""
        if controller not in _words(self.folder / "cgroup.controllers"):
            (self.folder.parent / "cgroup.subtree_control").write_text(f"+{controller}")

    def limit_memory(self, limit: int) -> None:
        """Set the most bytes that its processes keep in memory together, none of them swapped out."""
        (self.folder / _LIMIT[self.version]).write_text(str(limit))
        swap = self.folder / _SWAP[self.version]
        if swap.exists():  # the kernel may not count swap
            swap.write_text(str(limit) if self.version == 1 else "0")

    def limit_time(self, cpus: float) -> None:
        """Set the most processor time a second, in processors: 0.5 is half of one."""
        # A short period spreads the time evenly over a token; the kernel takes quotas from 1 ms up, periods up to 1 s.
        period = round(min(1_000_000, max(10_000, 1_000 / cpus)))
        quota = max(1_000, round(cpus * period))
        if self.version == 2:
            (self.folder / "cpu.max").write_text(f"{quota} {period}")
        else:
            (self.folder / "cpu.cfs_period_us").write_text(str(period))
            (self.folder / "cpu.cfs_quota_us").write_text(str(quota))

    def enter(self) -> None:
        """Move this process in; what it took before stays on the account of the group that it leaves."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self) -> None:
        """Move this process back to where it was, and remove the group."""
        with contextlib.suppress(OSError):
            (self._home / "cgroup.procs").write_text(str(os.getpid()))
        self.remove()

    def kills(self) -> int:
        """Processes that the kernel ended because the group was at its memory limit."""
        return _counter(self.folder / _KILLS[self.version], "oom_kill")

    def peak(self) -> int | None:
        """The most bytes that its processes kept in memory together; None where the kernel does not keep that."""
        return _number(self.folder / _PEAK[self.version])

    def remove(self) -> None:
        """Remove the group once its processes are gone; one that still has some stays."""
        deadline = time.monotonic() + _REMOVAL_S
        while self.folder.is_dir():
            try:
                self.folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.02)


def _remove_abandoned(parent: Path) -> None:
    """Remove groups of processes that were killed before they could."""
    for folder in parent.glob("isthmus-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _inside(top: Path, path: str) -> Path:
    folder = top / path.lstrip("/")
    return folder if folder.is_dir() and ".." not in folder.parts else top


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    words = _words(file)
    return int(words[0]) if words and words[0].isdigit() else None


def _counter(file: Path, name: str) -> int:
    """The number after ``name`` in a file of ``name number`` lines, 0 if there is none."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(line[1]) for line in lines if len(line) == 2 and line[0] == name and line[1].isdigit()), 0)
