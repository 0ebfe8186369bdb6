"""Device profiles: what a device has and how fast it is, each figure with its source, as TOML files.

A figure that nobody measured on the device is derived, by a formula that its source states; `DeviceProfile.uncertainty`
says how far times predicted from the profile may be off. 1 MB is 10^6 bytes, 1 GB 10^9.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ProfileError

PROFILES = Path(__file__).parent / "profiles"
WEIGHT_BITS = (2, 4, 8, 32)  # 16 is computed as 32
LINKS = ("wifi", "ethernet", "lte", "lte-m", "nb-iot", "satellite", "flaky-train")
SOURCE_KINDS = ("published", "derived", "probed")
_NAME_LETTERS = set("abcdefghijklmnopqrstuvwxyz0123456789-")

# A decode rate may be this far above the memory's: two measurements of one thing.
_BANDWIDTH_SLACK = 1.1

_MEMORY = ("total_mb", "free_mb", "bandwidth_gb_s")
_COMPUTE = ("threads", "op_us", "call_us", "attention_gb_s", "attention_gflops", "thread_scaling")
_BY_BITS = ("decode_gb_s", "prefill_gflops")
_POWER = ("idle_w", "busy_w")


@dataclass(frozen=True)
class Cores:
    """Cores of one kind.

    Attributes:
        kind: such as ``Cortex-A76``.
        count: of logical processors.
        ghz: highest clock; 0 where it is not known.
    """

    kind: str
    count: int
    ghz: float


@dataclass(frozen=True)
class DeviceProfile:
    """One device; throughput is that of onnxruntime's CPU kernels with ``threads`` threads, or what stands for them.

    The time of one call of a graph is modelled as ``call_us``, plus ``op_us`` for each kernel, plus bytes or operations
    over the rates here.

    Attributes:
        name: the profile's name, of lower-case letters, digits and dashes.
        title: the device's name as people write it.
        total_mb: memory in all.
        free_mb: of that, what system and desktop leave to us.
        bandwidth_gb_s: sequential reads from memory, all cores together.
        cores: fastest kind first.
        threads: that the throughput figures are for.
        decode_gb_s: weight bits (2, 4, 8, 32) -> weight bytes, scales included, that a matrix-vector product gets
            through in a second: MatMulNBits with int8 activations for 2, 4 and 8 bits, float for 32.
        prefill_gflops: weight bits -> sustained by products of 128 rows, two operations for each multiply-add.
        attention_gb_s: bytes of float KV cache a second that decode attention gets through.
        attention_gflops: sustained by the attention of a prefill; ``4 * heads * head_dim`` operations for each pair
            of a query and a key that it sees.
        op_us: fixed cost of one kernel in a graph.
        call_us: fixed cost of one call of a graph.
        thread_scaling: decode speed with 1, 2, ... ``threads`` threads over the speed with one.
        uncertainty: relative, of predicted times.
        link: preset of the link that the device typically has, one of `LINKS`, or None.
        idle_w: power while nothing runs, None where it is not published.
        busy_w: power while the model runs.
        sources: figure, such as ``memory.bandwidth_gb_s`` -> ``published: ...``, ``derived: ...`` or ``probed: ...``.
            A key such as ``compute.decode_gb_s`` covers all its bits; ``compute.decode_gb_s.4`` goes before it.

    Raises:
        ProfileError: a figure is negative, not finite or without a source, or figures contradict each other.
    """

    name: str
    title: str
    total_mb: float
    free_mb: float
    bandwidth_gb_s: float
    cores: tuple[Cores, ...]
    threads: int
    decode_gb_s: dict[int, float]
    prefill_gflops: dict[int, float]
    attention_gb_s: float
    attention_gflops: float
    op_us: float
    call_us: float
    thread_scaling: tuple[float, ...]
    uncertainty: float
    link: str | None
    idle_w: float | None
    busy_w: float | None
    sources: dict[str, str]

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_sources(self)
        _check_contradictions(self)

    def source(self, figure: str) -> str:
        """Where a figure such as ``compute.decode_gb_s.4`` comes from."""
        return self.sources[figure] if figure in self.sources else self.sources[figure.rpartition(".")[0]]

    def figures(self) -> dict[str, Any]:
        """Figures that have a source, by their keys in `sources`, those that are not known left out."""
        flat = {f"memory.{key}": getattr(self, key) for key in _MEMORY}
        flat["cores"] = self.cores
        flat |= {f"compute.{key}": getattr(self, key) for key in _COMPUTE if key != "threads"}
        flat |= {f"compute.{key}.{bits}": rate for key in _BY_BITS for bits, rate in getattr(self, key).items()}
        return flat | {f"power.{key}": getattr(self, key) for key in _POWER if getattr(self, key) is not None}

    def to_dict(self) -> dict[str, Any]:
        """The profile in the layout of its TOML file, for JSON as well."""
        optional = {} if self.link is None else {"link": self.link}
        power = {key: getattr(self, key) for key in _POWER if getattr(self, key) is not None}
        return {
            "name": self.name,
            "title": self.title,
            "uncertainty": self.uncertainty,
            **optional,
            "memory": {key: getattr(self, key) for key in _MEMORY},
            "cores": [{"kind": cores.kind, "count": cores.count, "ghz": cores.ghz} for cores in self.cores],
            "compute": {key: getattr(self, key) for key in _COMPUTE}
            | {"thread_scaling": list(self.thread_scaling)}
            | {key: {str(bits): rate for bits, rate in getattr(self, key).items()} for key in _BY_BITS},
            **({"power": power} if power else {}),
            "sources": dict(self.sources),
        }


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_profile(name_or_path: str | os.PathLike[str]) -> DeviceProfile:
    """Read a profile that comes with the package, by its name, or any other by the path of its TOML file.

    Raises:
        ProfileError: there is none of that name, it cannot be read, or it is not a valid profile.
    """
    name = os.fspath(name_or_path)
    path = PROFILES / f"{name}.toml"
    if name not in profile_names():
        path = Path(name)
        if path.suffix != ".toml" and not path.is_file():
            near = difflib.get_close_matches(name, profile_names(), 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ProfileError(
                f"no device profile {name!r}: {hint}give a path to a .toml file, or one of {', '.join(profile_names())}"
            )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot read the device profile: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{path}: not a TOML file: {error}") from error
    try:
        return profile_from_dict(data)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error


def profile_from_dict(data: dict[str, Any]) -> DeviceProfile:
    """Build a profile from the layout of its TOML file; the inverse of `DeviceProfile.to_dict`.

    Raises:
        ProfileError: a key is missing or unknown, a value has the wrong type, or see `DeviceProfile`.
    """
    _expect_keys(data, "", ("name", "title", "uncertainty", "memory", "cores", "compute", "sources"), ("link", "power"))
    memory = _table(data, "memory", _MEMORY)
    compute = _table(data, "compute", (*_COMPUTE, *_BY_BITS))
    power = _table(data, "power", (), _POWER) if "power" in data else {}
    by_bits: dict[str, Any] = {
        key: {int(bits): rate for bits, rate in _table(compute, key, map(str, WEIGHT_BITS), within="compute.").items()}
        for key in _BY_BITS
    }
    sources = data["sources"]
    if not isinstance(sources, dict) or not all(isinstance(value, str) for value in sources.values()):
        raise ProfileError("sources: must be a table of texts, such as \"memory.total_mb\" = 'published: data sheet'")
    if not isinstance(data["cores"], list) or not all(isinstance(cores, dict) for cores in data["cores"]):
        raise ProfileError("cores: must be tables, [[cores]] for each kind")
    for cores in data["cores"]:
        _expect_keys(cores, "cores.", ("kind", "count", "ghz"))
    if not isinstance(compute["thread_scaling"], list):
        raise ProfileError("compute.thread_scaling: must be a list, its first element 1")
    return DeviceProfile(
        name=data["name"],
        title=data["title"],
        **memory,
        cores=tuple(Cores(**cores) for cores in data["cores"]),
        **{key: compute[key] for key in _COMPUTE if key != "thread_scaling"},
        **by_bits,
        thread_scaling=tuple(compute["thread_scaling"]),
        uncertainty=data["uncertainty"],
        link=data.get("link"),
        idle_w=power.get("idle_w"),
        busy_w=power.get("busy_w"),
        sources=sources,
    )


def write_profile(profile: DeviceProfile, path: str | os.PathLike[str]) -> None:
    """Write a profile as a TOML file, whole or not at all.

    Raises:
        ProfileError: the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(_toml(profile.to_dict()), encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ProfileError(f"{target}: cannot write the device profile: {error}") from error


def _toml(data: dict[str, Any]) -> str:
    """A profile's dictionary as TOML; the standard library reads that but does not write it."""
    lines: list[str] = []

    def pairs(table: dict[str, Any]) -> None:
        for key, value in table.items():
            if not isinstance(value, dict) and not (isinstance(value, list) and value and isinstance(value[0], dict)):
                quoted = key if key.replace("_", "").isalpha() else json.dumps(key)
                # TOML writes texts, numbers and lists of numbers as JSON does.
                lines.append(f"{quoted} = {json.dumps(value, ensure_ascii=False)}")

    def table(name: str, content: dict[str, Any]) -> None:
        lines.extend(["", f"[{name}]"])
        pairs(content)
        for key, value in content.items():
            if isinstance(value, dict):
                table(f"{name}.{key}", value)

    pairs(data)
    for name, content in data.items():
        if name == "cores":
            for cores in content:
                lines.extend(["", "[[cores]]"])
                pairs(cores)
        elif isinstance(content, dict):
            table(name, content)
    return "\n".join(lines) + "\n"


def _table(
    data: dict[str, Any], name: str, required: Iterable[str], optional: Iterable[str] = (), *, within: str = ""
) -> dict[str, Any]:
    table = data[name]
    if not isinstance(table, dict):
        raise ProfileError(f"{within}{name}={table!r}: must be a table")
    _expect_keys(table, f"{within}{name}.", required, optional)
    return table


def _expect_keys(table: dict[str, Any], where: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    required = list(required)
    known = [*required, *optional]
    for key in table:
        if key not in known:
            units = [name for name in known if name.startswith(f"{key}_")]
            near = units or difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known here are {', '.join(known)}"
            raise ProfileError(f"unknown key {where}{key}: {hint}")
    for key in required:
        if key not in table:
            raise ProfileError(f"{where}{key} is missing: every profile needs it")


def _check_numbers(profile: DeviceProfile) -> None:
    if not isinstance(profile.name, str) or not profile.name or not set(profile.name) <= _NAME_LETTERS:
        raise ProfileError(f"name={profile.name!r}: must be of lower-case letters, digits and dashes")
    if not isinstance(profile.title, str) or not profile.title:
        raise ProfileError(f"title={profile.title!r}: must be the device's name")
    for key in _BY_BITS:
        if sorted(getattr(profile, key)) != sorted(WEIGHT_BITS):
            raise ProfileError(f"compute.{key}: must have a figure for each of {WEIGHT_BITS} bits and no other")
    for figure, value in profile.figures().items():
        if figure == "cores":
            continue
        may_be_zero = figure in ("compute.op_us", "compute.call_us", "power.idle_w")
        for number in value if isinstance(value, tuple) else (value,):
            _check_number(figure, number, may_be_zero=may_be_zero)
    _check_number("uncertainty", profile.uncertainty)
    if isinstance(profile.threads, bool) or not isinstance(profile.threads, int) or profile.threads < 1:
        raise ProfileError(f"compute.threads={profile.threads!r}: must be a whole number, at least 1")
    if not profile.cores:
        raise ProfileError("cores: must have at least one kind")
    for cores in profile.cores:
        if not isinstance(cores.kind, str) or not cores.kind:
            raise ProfileError(f"cores.kind={cores.kind!r}: must be the name of the kind")
        if isinstance(cores.count, bool) or not isinstance(cores.count, int) or cores.count < 1:
            raise ProfileError(f"cores.count={cores.count!r}: must be a whole number, at least 1")
        _check_number("cores.ghz", cores.ghz, may_be_zero=True)


def _check_number(figure: str, value: object, *, may_be_zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not may_be_zero):  # type: ignore[operator]
        rule = "zero or a positive number" if may_be_zero else "a positive number"
        raise ProfileError(f"{figure}={value!r}: must be {rule}")


def _check_sources(profile: DeviceProfile) -> None:
    figures = profile.figures()
    covering = {figure.rpartition(".")[0] for figure in figures if figure.rpartition(".")[2].isdigit()}
    for figure in figures:
        if figure not in profile.sources and figure.rpartition(".")[0] not in profile.sources:
            raise ProfileError(f"{figure} has no source: say in [sources] where the figure comes from")
    for figure, source in profile.sources.items():
        if figure not in figures and figure not in covering:
            raise ProfileError(f"sources: there is no figure {figure!r} in this profile")
        kind, _, what = source.partition(": ")
        if kind not in SOURCE_KINDS or not what.strip():
            kinds = ", ".join(f"'{kind}: ...'" for kind in SOURCE_KINDS)
            raise ProfileError(f"source of {figure} is {source!r}: must be one of {kinds}")


def _check_contradictions(profile: DeviceProfile) -> None:
    if profile.free_mb > profile.total_mb:
        raise ProfileError(
            f"memory.free_mb={profile.free_mb:g} is above memory.total_mb={profile.total_mb:g}: "
            "what is free is a part of all"
        )
    for bits, rate in profile.decode_gb_s.items():
        figure = f"compute.decode_gb_s.{bits}"
        if rate > _BANDWIDTH_SLACK * profile.bandwidth_gb_s and "cache" not in profile.source(figure):
            raise ProfileError(
                f"{figure}={rate:g} is above memory.bandwidth_gb_s={profile.bandwidth_gb_s:g}: weights are read from "
                "memory, unless they stay in a cache, which the figure's source must then say"
            )
    processors = sum(cores.count for cores in profile.cores)
    if profile.threads > processors:
        raise ProfileError(f"compute.threads={profile.threads}: the device has {processors} cores")
    if len(profile.thread_scaling) != profile.threads or profile.thread_scaling[0] != 1:
        raise ProfileError(
            f"compute.thread_scaling has {len(profile.thread_scaling)} elements, the first "
            f"{', '.join(map(str, profile.thread_scaling[:1]))}: must begin with 1 and have one for each of "
            f"{profile.threads} threads"
        )
    clocks = [cores.ghz for cores in profile.cores]
    if clocks != sorted(clocks, reverse=True):
        raise ProfileError("cores: the fastest kind must come first")
    if profile.link is not None and profile.link not in LINKS:
        raise ProfileError(f"link={profile.link!r}: must be one of {', '.join(LINKS)}")
    if profile.idle_w is not None and profile.busy_w is not None and profile.idle_w > profile.busy_w:
        raise ProfileError(f"power.idle_w={profile.idle_w:g} is above power.busy_w={profile.busy_w:g}")
