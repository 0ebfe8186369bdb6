"""The planner: the best way to run a model under limits, why, and what would have to change if there is none.

Source of the problem: arXiv 2511.04002, which chooses split, precisions and length under memory, accuracy and latency
(C1: weights and cache fit; C2: the drop in accuracy; C3: device, link and server within the deadline). Ours: the grid
is small enough to enumerate, so that the answer is exact over it, and running wholly on the device or sending token ids
to a server are candidates like others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..devices.link import link_profile
from ..devices.profile import load_profile
from ..errors import PlanError
from .accuracy import find_accuracy
from .checkpoint import open_checkpoint
from .families import family_of
from .grid import Grid
from .limits import Limits
from .plan import MODES, Candidate, Plan, read_plan
from .progress import Progress, silent
from .shipped_drafts import shipped_figures
from .sources import resolve_model

SHOWN = 10


@dataclass(frozen=True)
class PlanReport:
    """What `search` found.

    Attributes:
        chosen: the best candidate that keeps all limits, None if none does.
        candidates: the best ten that do, or, if none does, the ten that miss by least.
        slack: by limit, how much of it the chosen one leaves: (its value, the limit).
        relaxations: if nothing fits, by limit, the smallest value with which something would, the others kept; None
            where no value helps.
        pareto: candidates that keep all but the limit on the drop, and that no other one of their mode beats in both
            time and drop.
        searched: number of candidates.
        time_parts: of one token of the chosen candidate at full context, in ms.
    """

    chosen: Candidate | None
    candidates: tuple[Candidate, ...]
    slack: dict[str, tuple[float, float]]
    relaxations: dict[str, float | None]
    pareto: tuple[Candidate, ...]
    searched: int
    time_parts: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus plan --json`` prints."""
        return {
            "chosen": self.chosen.to_dict() if self.chosen else None,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "constraints": {
                name: {"value": value, "limit": limit, "slack": limit - value}
                for name, (value, limit) in self.slack.items()
            },
            "relaxations": self.relaxations,
            "time_parts_ms": self.time_parts,
            "searched": self.searched,
        }


@dataclass(frozen=True)
class Planned:
    """A report with what it is about.

    Attributes:
        report: what the search found.
        plan: to be written as a file; None if nothing fits.
    """

    report: PlanReport
    plan: Plan | None


def make_plan(
    model: str,
    device: str | Path,
    link: str,
    *,
    server: str | Path | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
    modes: tuple[str, ...] = MODES,
    cache: str | Path | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Planned:
    """Plan a model for a device, a link and perhaps a server; no weight is read but for the files' hashes.

    Args:
        model: a folder, a ``.gguf`` file, a catalog name or a hub id.
        device: name or file of the device's profile.
        link: a preset, or a description such as ``rtt=80ms,rate=10mbit``.
        server: name or file of the server's profile; without one only the device alone is planned.
        limits: what must be kept.
        threads: of the device; by default all that its profile has figures for.
        modes: that are looked at, of `isthmus.export.plan.MODES`.
        cache: where downloaded models and accuracy tables are kept.
        offline: use models on this machine only.
        progress: called while a model is downloaded.

    Raises:
        PlanError: limits out of range, or no accuracy table for this model.
        ModelError: the checkpoint cannot be found or has no builder.
        ProfileError: a profile cannot be read.
        LinkError: the link cannot be read.
    """
    folder = Path(cache) if cache else None
    checkpoint = open_checkpoint(resolve_model(model, cache=folder, offline=offline, progress=progress))
    arch = family_of(checkpoint.config).architecture(checkpoint.config)
    hashes = checkpoint.file_hashes()
    accuracy = find_accuracy(hashes, folder)
    if accuracy is None:
        raise PlanError(f"{model}: its accuracy was not measured yet; run `isthmus eval {model} --for-plan` once")
    machine, path = load_profile(device), link_profile(link)
    back = load_profile(server) if server is not None else None
    limits = limits or Limits(context=min(1024, arch.max_positions))
    report = search(Grid(arch, accuracy, machine, path, back, limits, threads, modes, shipped_figures(hashes)))
    plan = None
    if report.chosen is not None:
        plan = Plan(
            model=checkpoint.name,
            hashes=hashes,
            chosen=report.chosen,
            context=limits.context,
            deadline_ms=limits.deadline_ms,
            device=machine.name,
            link=path.name,
            server=back.name if back else None,
        )
    return Planned(report, plan)


def export_options(
    plan: str | Path, model: str, *, cache: str | Path | None = None, offline: bool = False
) -> dict[str, Any]:
    """Arguments of `isthmus.export.export.export_bundle` that follow a plan file.

    Raises:
        PlanError: it cannot be read, or is for another model.
        ModelError: the checkpoint cannot be found.
    """
    read = read_plan(plan)
    checkpoint = open_checkpoint(resolve_model(model, cache=Path(cache) if cache else None, offline=offline))
    read.check_model(checkpoint.name, checkpoint.file_hashes())
    chosen = read.chosen
    return {
        "split": None if chosen.mode == "device-only" else chosen.split,
        "device_layers": "all" if chosen.mode == "hand-over" else "front",
        "front_bits": chosen.front_bits,
        "back_bits": chosen.back_bits,
        "front_kv_bits": chosen.kv_bits,
        "back_kv_bits": 32,
        "max_length": read.context,
    }


def search(grid: Grid) -> PlanReport:
    """Enumerate the grid and pick: the fastest that keeps all limits, the more accurate of equally fast ones."""
    candidates = grid.candidates()
    bounds = grid.limits.bounds()
    fitting = [candidate for candidate in candidates if grid.feasible(candidate)]
    chosen = fitting[0] if fitting else None
    shown = fitting or sorted(candidates, key=lambda candidate: _excess(candidate, bounds))
    relaxations: dict[str, float | None] = {}
    if chosen is None:
        for name, (field, _) in bounds.items():
            others = [bound for other, bound in bounds.items() if other != name]
            values = [
                getattr(candidate, field)
                for candidate in candidates
                if all(getattr(candidate, other) <= bound for other, bound in others)
            ]
            relaxations[name] = min(values, default=None)
    slack = {name: (getattr(chosen, field), bound) for name, (field, bound) in bounds.items()} if chosen else {}
    others = [bound for name, bound in bounds.items() if name != "max_drop"]
    within = [c for c in candidates if all(getattr(c, field) <= bound for field, bound in others)]
    pareto = [c for mode in MODES for c in _pareto([each for each in within if each.mode == mode])]
    parts = grid.time_parts(chosen) if chosen else {}
    return PlanReport(chosen, tuple(shown[:SHOWN]), slack, relaxations, tuple(pareto), len(candidates), parts)


def _pareto(candidates: list[Candidate]) -> Iterator[Candidate]:
    best = math.inf
    for candidate in sorted(candidates, key=lambda each: (each.ms_per_token, each.drop)):
        if candidate.drop < best:
            best = candidate.drop
            yield candidate


def _excess(candidate: Candidate, bounds: dict[str, tuple[str, float]]) -> float:
    """By how much limits are missed, as a sum of logarithms."""
    return sum(max(0.0, math.log(max(getattr(candidate, field), 1e-9) / bound)) for field, bound in bounds.values())
