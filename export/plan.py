"""A plan: how one model is cut and quantized for one device, link and server, as a TOML file.

``isthmus export --plan`` and ``isthmus generate --plan`` take their options from it.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..runtime.bundle import Manifest

MODES = ("device-only", "split", "server-only", "hand-over")
VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """One way to run a model, with what is predicted of it.

    Attributes:
        mode: ``device-only``; ``split``; ``server-only``, which sends token ids; ``hand-over``, on the device alone
            until position ``hand_over_at``, then split.
        split: first layer on the server; the number of layers if there is none there, 0 if all are.
        kv_bits: of the device's KV cache; the server's is float32.
        codec: of the hidden states, ``ids`` where token ids are sent, ``none`` where nothing is.
        level: of the codec, -1 where it has none.
        draft_length: most drafts beyond the last sure token, 0 if nothing is drafted.
        memory_mb: resident memory of the device's process at its peak.
        server_memory_mb: of the server's, with one session.
        ttft_ms: from the call to the first token, with a fresh connection.
        ms_per_token: of the tokens after it; mean over them for a hand-over, at full context otherwise.
        worst_ms: of the slowest of them; with drafts of one that waits for a round trip.
        bytes_per_token: sent up for each, framing included.
        drop: expected increase in perplexity in percent, see `isthmus.export.accuracy`.
        time_uncertainty: relative standard error of the times.
        drop_se: standard error of ``drop``.
        hand_over_at: position, 0 if there is no hand-over.
        send: what moves the session, ``kv`` or ``hidden``; empty if there is no hand-over.
    """

    mode: str
    split: int
    front_bits: int
    back_bits: int
    kv_bits: int
    codec: str
    level: int
    draft_length: int
    memory_mb: float
    server_memory_mb: float
    ttft_ms: float
    ms_per_token: float
    worst_ms: float
    bytes_per_token: float
    drop: float
    time_uncertainty: float
    drop_se: float
    hand_over_at: int = 0
    send: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus plan --json`` prints."""
        return asdict(self) | {"level": None if self.level < 0 else self.level}


@dataclass(frozen=True)
class Plan:
    """What a plan file holds.

    Attributes:
        model: the model's name.
        hashes: SHA-256 of the checkpoint's files, by their names.
        chosen: what to do.
        context: positions of a generation.
        deadline_ms: that was asked for, None if none was.
        device: name of the device's profile.
        link: name of the link.
        server: name of the server's profile, None without one.
    """

    model: str
    hashes: dict[str, str]
    chosen: Candidate
    context: int
    deadline_ms: float | None
    device: str
    link: str
    server: str | None

    def write(self, path: Path) -> None:
        """Write the TOML file, whole or not at all.

        Raises:
            PlanError: it cannot be written.
        """
        sections: dict[str, dict[str, Any]] = {
            "": {"isthmus_plan": VERSION},
            "model": {"name": self.model},
            "model.files": self.hashes,
            "for": {
                "device": self.device,
                "link": self.link,
                "server": self.server,
                "context": self.context,
                "deadline_ms": self.deadline_ms,
            },
            "plan": asdict(self.chosen),
        }
        lines = []
        for name, table in sections.items():
            lines += [f"\n[{name}]"] if name else []
            lines += [
                f"{json.dumps(key) if name == 'model.files' else key} = {json.dumps(value)}"
                for key, value in table.items()
                if value is not None
            ]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PlanError(f"{path}: the plan cannot be written ({error}); choose another file") from error

    def check_model(self, name: str, hashes: dict[str, str]) -> None:
        """Raise `PlanError` unless a checkpoint is the one that was planned for."""
        if sorted(self.hashes.values()) != sorted(hashes.values()):
            raise PlanError(
                f"this plan is for {self.model}, and the files of {name} have other hashes; run `isthmus plan {name}`"
            )

    def check_bundle(self, manifest: Manifest) -> None:
        """Raise `PlanError` unless a bundle was exported as planned."""
        self.check_model(manifest.source.name, manifest.source.files)
        chosen = self.chosen
        planned = {"split": chosen.split, "front_bits": chosen.front_bits, "back_bits": chosen.back_bits}
        for name, value in planned.items():
            if getattr(manifest, name) != value:
                raise PlanError(
                    f"the plan has {name}={value}, this bundle {getattr(manifest, name)}; export it with --plan or "
                    "leave the plan out"
                )
        if self.context > manifest.max_length:
            raise PlanError(
                f"the plan has a context of {self.context}, this bundle {manifest.max_length}; export it with --plan"
            )


def read_plan(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: there is none, or it is not what `Plan.write` writes.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path}: no readable plan ({error}); `isthmus plan` writes one") from error
    try:
        if data["isthmus_plan"] != VERSION:
            raise PlanError(f"{path}: a plan of version {data['isthmus_plan']!r} where {VERSION} is read; plan again")
        known = {field.name: field.type for field in fields(Candidate)}
        unknown = data["plan"].keys() - known.keys()
        if unknown:
            raise PlanError(f"{path}: unknown keys {', '.join(sorted(unknown))} in [plan]; plan again")
        numbers = {"int": (int,), "float": (int, float), "str": (str,)}
        for key, value in data["plan"].items():
            if not isinstance(value, numbers[str(known[key])]) or isinstance(value, bool):
                raise PlanError(f"{path}: {key} = {value!r} in [plan] must be of type {known[key]}; plan again")
        plan = Plan(
            model=data["model"]["name"],
            hashes=dict(data["model"]["files"]),
            chosen=Candidate(**data["plan"]),
            context=data["for"]["context"],
            deadline_ms=data["for"].get("deadline_ms"),
            device=data["for"]["device"],
            link=data["for"]["link"],
            server=data["for"].get("server"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path}: {error} is missing or misplaced; not a plan, run `isthmus plan` again") from error
    if plan.chosen.mode not in MODES:
        raise PlanError(f"{path}: mode {plan.chosen.mode!r}: must be one of {', '.join(MODES)}; plan again")
    return plan
