"""Which processors this process may use, by kind: phones and many boards have big and small ones."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from .profile import Cores

_CPUINFO = Path("/proc/cpuinfo")
_SYSTEM = Path("/sys/devices/system/cpu")

# Cores of one kind whose highest clocks differ by less: a maker's pick of favoured cores, not another kind.
_SAME_CLOCK = 0.9

# The kernel names an Arm core by a number only: implementer 0x41 (Arm), part as here.
_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD0D: "Cortex-A77",
    0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD49: "Neoverse-N2",
    0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3",
    0xD4F: "Neoverse-V2",
    0xD80: "Cortex-A520",
    0xD81: "Cortex-A720",
    0xD82: "Cortex-X4",
}


@dataclass(frozen=True)
class Processor:
    """One logical processor; ``ghz`` is its highest clock, 0 where the system does not tell."""

    number: int
    kind: str
    ghz: float


def processors(cpuinfo: Path = _CPUINFO, system: Path = _SYSTEM) -> list[Processor]:
    """The processors that this process may use, fastest first.

    Args:
        cpuinfo: the kernel's description of them.
        system: folder with their clocks.
    """
    if not hasattr(os, "sched_getaffinity"):
        kind = platform.processor() or platform.machine() or "unknown"
        return [Processor(number, kind, 0.0) for number in range(os.cpu_count() or 1)]
    described = _described(cpuinfo)
    fastest_now: dict[str, float] = {}
    for fields in described.values():
        fastest_now[_kind(fields)] = max(_now(fields), fastest_now.get(_kind(fields), 0.0))
    found = []
    for number in sorted(os.sched_getaffinity(0)):
        kind = _kind(described.get(number, {}))
        clock = _clock(system / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq")
        found.append(Processor(number, kind, fastest_now.get(kind, 0.0) if clock is None else clock))
    return sorted(found, key=lambda processor: (-processor.ghz, processor.number))


def cores_by_kind(found: list[Processor]) -> tuple[Cores, ...]:
    """Processors, fastest first, gathered to kinds; same-named ones with a lower clock are a kind of their own."""
    kinds: list[Cores] = []
    for processor in found:
        for index, cores in enumerate(kinds):
            if cores.kind == processor.kind and processor.ghz >= _SAME_CLOCK * cores.ghz:
                kinds[index] = Cores(cores.kind, cores.count + 1, cores.ghz)
                break
        else:
            kinds.append(Cores(processor.kind, 1, processor.ghz))
    return tuple(kinds)


def _described(cpuinfo: Path) -> dict[int, dict[str, str]]:
    """The fields of each processor in ``/proc/cpuinfo``."""
    try:
        blocks = cpuinfo.read_text().split("\n\n")
    except OSError:
        return {}
    parsed = []
    for block in blocks:
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        parsed.append({key.strip(): value.strip() for key, value in pairs})
    return {int(fields["processor"]): fields for fields in parsed if fields.get("processor", "").isdigit()}


def _kind(fields: dict[str, str]) -> str:
    part = fields.get("CPU part", "")
    if fields.get("CPU implementer") == "0x41" and part.startswith("0x"):
        return _ARM_PARTS.get(int(part, 16), f"Arm part {part}")
    return fields.get("model name") or platform.machine() or "unknown"


def _clock(file: Path) -> float | None:
    try:
        return int(file.read_text()) / 1e6  # kHz
    except (OSError, ValueError):
        return None


def _now(fields: dict[str, str]) -> float:
    """The clock at this moment; the fastest of a kind must stand for its highest where the system hides that."""
    try:
        return round(float(fields["cpu MHz"]) / 1e3, 1)
    except (KeyError, ValueError):
        return 0.0
