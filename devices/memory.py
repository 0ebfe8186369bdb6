"""How much memory the machine has for us, and how much this process takes.

A process's memory is resident (with mapped files) or anonymous (its own, without them).

Mapped weights count as resident, but the system may drop them at any time; what a device cannot take back is
the anonymous part. 1 MB is 10^6 bytes.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from . import cgroups

SAMPLE_INTERVAL_S = 0.05  # reading the counters takes 0.03 ms: below 0.1 % of one core

# `status` keeps running counters; `smaps_rollup` is exact to the page but walks all page tables, milliseconds
# for a large process, too slow to sample beside a measurement.
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class MachineMemory:
    """Memory of the machine in MB, or of the container that this process runs in.

    Attributes:
        total_mb: in all.
        free_mb: of that, what programs can still take without swapping.
    """

    total_mb: float
    free_mb: float


def machine_memory(
    meminfo: Path = _MEMINFO, mount: Path = cgroups.MOUNT, membership: Path = cgroups.MEMBERSHIP
) -> MachineMemory | None:
    """Read it from the system, the limits of control groups respected; None where the system does not tell (no Linux).

    Args:
        meminfo: the kernel's counters.
        mount: where control groups are mounted.
        membership: which groups this process is in.
    """
    try:
        lines = [line.split() for line in meminfo.read_text().splitlines()]
    except OSError:
        return None
    counters = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) >= 2}
    if "MemTotal" not in counters or "MemAvailable" not in counters:
        return None
    total, free = counters["MemTotal"], counters["MemAvailable"]
    limit = cgroups.memory_limit(mount, membership)
    if limit is not None:
        total, free = min(total, limit.limit), min(free, limit.free)
    return MachineMemory(total / 1e6, free / 1e6)


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of a process in MB; None where the system does not tell.

    Attributes:
        resident_mb: pages in memory now, mapped files included.
        peak_resident_mb: the most of them since the process began.
        anonymous_mb: pages in memory now that no file backs: heap, stacks, prepacked weights, KV caches.
        data_mb: what it has asked for of heap and private mappings, used or not; ``RLIMIT_DATA`` bounds that.
    """

    resident_mb: float | None = None
    peak_resident_mb: float | None = None
    anonymous_mb: float | None = None
    data_mb: float | None = None


def process_memory(pid: int | None = None) -> ProcessMemory:
    """Read the system's counters of this process, or on Linux of another one.

    All are there on Linux, the peak alone on other Unix systems, none elsewhere.
    """
    status = _STATUS if pid is None else Path(f"/proc/{pid}/status")
    if status.exists():
        return parse_status(status.read_text())
    if pid is not None or sys.platform == "win32":
        return ProcessMemory()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ProcessMemory(peak_resident_mb=peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)


def parse_status(text: str) -> ProcessMemory:
    """Pick the memory lines out of a ``/proc/PID/status`` file, whose ``kB`` are 1024 bytes."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def megabytes(name: str) -> float | None:
        return int(fields[name].split()[0]) * 1024 / 1e6 if name in fields else None

    return ProcessMemory(megabytes("VmRSS"), megabytes("VmHWM"), megabytes("RssAnon"), megabytes("VmData"))


class AnonymousPeak:
    """Context manager that samples anonymous memory, for which the system keeps no high-water mark.

    A thread samples every `SAMPLE_INTERVAL_S` seconds, because the peak lies inside a step (activations of a
    prefill chunk) and not at its end. A spike shorter than the interval can be missed.

    Attributes:
        peak_mb: the most that was seen so far in MB; None where the system does not tell.
    """

    def __init__(self) -> None:
        self.peak_mb = process_memory().anonymous_mb
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="anonymous-peak", daemon=True)

    def _sample(self) -> None:
        now = process_memory().anonymous_mb
        if now is not None and self.peak_mb is not None:
            self.peak_mb = max(self.peak_mb, now)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_INTERVAL_S):
            self._sample()

    def __enter__(self) -> Self:
        if self.peak_mb is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._sample()
