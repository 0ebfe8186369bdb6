"""Hold a process to a memory limit, to some processors and to a share of their time.

Memory is held by a control group where this process may make one: its limit counts everything that the process keeps
in memory, cached pages of files included, which the kernel drops first. Elsewhere ``RLIMIT_DATA`` bounds what the
process asks for (heap and private mappings, used or not; mapped files do not count), which is somewhat stricter: an
allocation that goes beyond fails, nothing is killed. Processors are held by the affinity of the process, their time by
a control group only.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import LimitError
from . import cgroups
from .memory import process_memory

logger = logging.getLogger(__name__)

RLIMIT = "RLIMIT_DATA"


@dataclass(frozen=True)
class Limits:
    """What `limited` set up for the processes that call `enter`.

    Attributes:
        memory: what holds the memory limit: ``cgroup v1``, ``cgroup v2`` or ``RLIMIT_DATA``; None without a limit.
        cpus: numbers of the processors, None if all may be used.
        time: what holds the share of processor time; None without one.
        missing: what was asked for and is not enforced, with the reason, one sentence each.
    """

    memory: str | None
    cpus: tuple[int, ...] | None
    time: str | None
    missing: tuple[str, ...]
    limit_mb: float | None
    _groups: tuple[cgroups.ChildGroup, ...]

    def enter(self) -> None:
        """Put this process under the limits; for a child between fork and exec."""
        for group in self._groups:
            group.enter()
        if self.memory == RLIMIT and self.limit_mb is not None:
            _limit_data(self.limit_mb)
        if self.cpus is not None:
            os.sched_setaffinity(0, self.cpus)

    def kills(self) -> int:
        """Processes that the kernel ended for memory so far; always 0 without a control group."""
        return sum(group.kills() for group in self._groups)

    def peak_mb(self) -> float | None:
        """The most memory that the processes took together so far; None without a control group."""
        peaks = [peak for group in self._groups if (peak := group.peak()) is not None]
        return peaks[0] / 1e6 if peaks else None


@dataclass(frozen=True)
class LimitedRun:
    """How a command ended.

    Attributes:
        status: its exit status; of one that a signal ended, 128 and the signal's number.
        killed_for_memory: whether the kernel ended it, or a process of its, at the memory limit.
        peak_mb: the most memory that it took, cached pages of files included; None without a control group.
        limits: what it was held to.
    """

    status: int
    killed_for_memory: bool
    peak_mb: float | None
    limits: Limits


@contextmanager
def limited(
    memory_mb: float | None = None,
    *,
    cpus: int | None = None,
    cpu_time: float | None = None,
    mount: Path = cgroups.MOUNT,
    membership: Path = cgroups.MEMBERSHIP,
) -> Iterator[Limits]:
    """Set up limits for child processes, and remove what was set up at the end.

    Args:
        memory_mb: most memory of all children together with a control group, of each one without.
        cpus: most processors; those that this process may use are a bound too.
        cpu_time: most processor time a second, in processors; may be below 1.
        mount: where control groups are mounted.
        membership: which groups this process is in.

    Raises:
        LimitError: a limit is not positive, or too small for any interpreter, or the system can hold no memory limit.
    """
    for name, number in (("memory_mb", memory_mb), ("cpus", cpus), ("cpu_time", cpu_time)):
        if number is not None and not 0 < number < float("inf"):
            raise LimitError(f"{name}={number}: must be positive")
    if memory_mb is not None:
        _check_floor(memory_mb, process_memory().anonymous_mb)
    missing: list[str] = []
    groups: list[cgroups.ChildGroup] = []
    try:
        memory = time = None
        if memory_mb is not None:
            try:
                groups.append(_memory_group(memory_mb, mount, membership))
                memory = f"cgroup v{groups[0].version}"
            except OSError as error:
                missing.append(f"no control group for memory ({_reason(error)}): {_fall_back(memory_mb)}")
                memory = RLIMIT
        if cpu_time is not None:
            try:
                time = f"cgroup v{_limit_time(cpu_time, groups, mount, membership)}"
            except OSError as error:
                missing.append(f"the share of processor time is not held: no control group for it ({_reason(error)})")
        chosen = None
        if cpus is not None:
            if hasattr(os, "sched_getaffinity"):
                allowed = sorted(os.sched_getaffinity(0))
                chosen = tuple(allowed[:cpus])
                if len(allowed) < cpus:
                    missing.append(f"{cpus} processors: this machine has {len(allowed)} for us")
            else:
                missing.append("the number of processors is not held: this system cannot do that")
        yield Limits(memory, chosen, time, tuple(missing), memory_mb, tuple(groups))
    finally:
        for group in groups:
            group.remove()


def log_missing(limits: Limits) -> None:
    """Warn of what was asked for and is not enforced."""
    for sentence in limits.missing:
        logger.warning("%s", sentence)


def run_limited(
    command: Sequence[str],
    memory_mb: float | None = None,
    *,
    cpus: int | None = None,
    cpu_time: float | None = None,
    mount: Path = cgroups.MOUNT,
    membership: Path = cgroups.MEMBERSHIP,
    ready: Callable[[Limits], None] = log_missing,
) -> LimitedRun:
    """Run a command under limits and wait for it; its input and output are ours. See `limited`.

    Args:
        command: with its arguments.
        memory_mb: see `limited`.
        cpus: see `limited`.
        cpu_time: see `limited`.
        mount: see `limited`.
        membership: see `limited`.
        ready: told what holds, before the command begins; logs what does not by default.

    Raises:
        LimitError: the command cannot be started, or see `limited`.
    """
    if not command:
        raise LimitError("no command: give one after --, as in -- isthmus bench OUT/device")
    with limited(memory_mb, cpus=cpus, cpu_time=cpu_time, mount=mount, membership=membership) as limits:
        ready(limits)
        try:
            process = subprocess.Popen(command, preexec_fn=limits.enter)
        except (OSError, subprocess.SubprocessError) as error:
            raise LimitError(f"{command[0]}: cannot be started: {error}") from error
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                continue  # the command has got it as well, and decides
        return LimitedRun(128 - status if status < 0 else status, limits.kills() > 0, limits.peak_mb(), limits)


def enforce_memory_limit(limit_mb: float, *, mount: Path = cgroups.MOUNT, membership: Path = cgroups.MEMBERSHIP) -> str:
    """Hold this process, from now on, to a memory limit; `limited` says what counts.

    With a control group the kernel kills the process at the limit, without one an allocation fails. The group goes
    when the process ends.

    Args:
        limit_mb: most memory in MB.
        mount: where control groups are mounted.
        membership: which groups this process is in.

    Returns:
        What holds the limit: ``cgroup v1``, ``cgroup v2`` or ``RLIMIT_DATA``.

    Raises:
        LimitError: the limit is not positive, or below what this process takes already, or the system can hold none.
    """
    if not 0 < limit_mb < float("inf"):
        raise LimitError(f"a memory limit of {limit_mb:g} MB: must be positive")
    used = process_memory()
    _check_floor(limit_mb, used.anonymous_mb)
    try:
        # The new group counts only what comes from now on.
        group = _memory_group(limit_mb - (used.anonymous_mb or 0.0), mount, membership)
        try:
            group.enter()
        except OSError:
            group.remove()
            raise
    except OSError as error:
        logger.warning("no control group for memory (%s): %s", _reason(error), _fall_back(limit_mb))
        _check_floor(limit_mb, used.data_mb)
        _limit_data(limit_mb)
        return RLIMIT
    atexit.register(group.leave)
    return f"cgroup v{group.version}"


def _check_floor(limit_mb: float, used_mb: float | None) -> None:
    if used_mb is not None and limit_mb <= used_mb:
        raise LimitError(
            f"a memory limit of {limit_mb:g} MB: the interpreter with its libraries alone takes {used_mb:.0f} MB; "
            "allow more"
        )


def _memory_group(limit_mb: float, mount: Path, membership: Path) -> cgroups.ChildGroup:
    group = cgroups.ChildGroup(_own("memory", mount, membership))
    try:
        group.limit_memory(int(limit_mb * 1e6))
    except OSError:
        group.remove()
        raise
    return group


def _limit_time(cpus: float, groups: list[cgroups.ChildGroup], mount: Path, membership: Path) -> int:
    """Limit time in the memory's group if that can have it, else in one of its own, added to ``groups``."""
    own = _own("cpu", mount, membership)
    if own.version == 2 and groups and groups[0].version == 2:
        groups[0].also("cpu")
        groups[0].limit_time(cpus)
        return 2
    group = cgroups.ChildGroup(own)
    try:
        group.limit_time(cpus)
    except OSError:
        group.remove()
        raise
    groups.append(group)
    return own.version


def _own(controller: str, mount: Path, membership: Path) -> cgroups.Group:
    group = cgroups.own_group(controller, mount, membership)
    if group is None:
        raise OSError(f"this system has none with the {controller} controller")
    return group


def _fall_back(limit_mb: float) -> str:
    if sys.platform != "linux":
        raise LimitError(f"a memory limit of {limit_mb:g} MB: this system has nothing that holds one; leave it out")
    return f"{RLIMIT} holds what each process asks for instead, and mapped files do not count"


def _limit_data(limit_mb: float) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(limit_mb * 1e6)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
