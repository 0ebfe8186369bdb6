"""Profiles: all that come with the package hold, survive a round trip, and every kind of broken file is named."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from isthmus.devices.profile import (
    WEIGHT_BITS,
    load_profile,
    profile_from_dict,
    profile_names,
    write_profile,
)
from isthmus.errors import ProfileError


@pytest.fixture
def data() -> dict[str, Any]:
    return copy.deepcopy(load_profile("raspberry-pi-5").to_dict())


def test_the_devices_that_people_ask_for_are_there() -> None:
    assert {
        "raspberry-pi-zero-2-w",
        "raspberry-pi-4",
        "raspberry-pi-5",
        "jetson-orin-nano",
        "android-mid-range",
        "android-flagship",
        "mini-pc",
        "cpu-server",
        "h200-server",
        "pim-gpt",
    } <= set(profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_goes_by_its_file_name_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert set(profile.decode_gb_s) == set(profile.prefill_gflops) == set(WEIGHT_BITS)
    write_profile(profile, tmp_path / "copy.toml")
    assert load_profile(tmp_path / "copy.toml") == profile
    assert profile_from_dict(profile.to_dict()) == profile


@pytest.mark.parametrize("name", profile_names())
def test_fewer_bits_never_read_more_weights_in_a_second_than_the_bandwidth_allows(name: str) -> None:
    profile = load_profile(name)
    assert max(profile.decode_gb_s.values()) <= 1.1 * profile.bandwidth_gb_s


def test_a_source_may_cover_all_bits_or_one(data: dict[str, Any]) -> None:
    data["sources"] |= {"compute.prefill_gflops": "derived: guess"}
    del data["sources"]["compute.prefill_gflops.2"]
    profile = profile_from_dict(data)
    assert profile.source("compute.prefill_gflops.2") == "derived: guess"
    assert profile.source("compute.prefill_gflops.8").startswith("derived: TinyLlama")


def test_texts_with_quotes_and_letters_outside_ascii_survive(data: dict[str, Any], tmp_path: Path) -> None:
    data["title"] = 'A "board"\\ with\nµ'
    write_profile(profile_from_dict(data), tmp_path / "p.toml")
    assert load_profile(tmp_path / "p.toml").title == data["title"]


def change(data: dict[str, Any], where: str, value: object) -> None:
    """Set ``a/b/c`` in nested tables, or remove it if the value is None."""
    *path, last = where.split("/")
    for key in path:
        data = data[int(key)] if key.isdigit() and isinstance(data, list) else data[key]
    if value is None:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        # Missing.
        ("title", None, "title is missing"),
        ("memory", None, "memory is missing"),
        ("memory/free_mb", None, "memory.free_mb is missing"),
        ("compute/decode_gb_s/8", None, "compute.decode_gb_s.8 is missing"),
        ("cores", [], "at least one kind"),
        ("cores/0/ghz", None, "cores.ghz is missing"),
        ("sources/memory.free_mb", None, "memory.free_mb has no source"),
        ("sources/compute.decode_gb_s.4", None, "compute.decode_gb_s.4 has no source"),
        ("sources/power.busy_w", None, "power.busy_w has no source"),
        # Unknown, units missing among them.
        ("memory/total", 512, "did you mean memory.total_mb"),
        ("memory/bandwidth", 4, "did you mean memory.bandwidth_gb_s"),
        ("compute/op", 4, "did you mean compute.op_us"),
        ("memory/swap_mb", 512, "unknown key memory.swap_mb"),
        ("colour", "green", "unknown key colour"),
        ("compute/decode_gb_s/3", 4.0, "unknown key compute.decode_gb_s.3"),
        ("power/standby_w", 1.0, "unknown key power.standby_w"),
        ("sources/memory.swap_mb", "derived: x", "no figure 'memory.swap_mb'"),
        # Negative, zero, not numbers.
        ("memory/total_mb", -1, "memory.total_mb=-1"),
        ("memory/total_mb", 0, "a positive number"),
        ("memory/total_mb", "512 MB", "memory.total_mb='512 MB'"),
        ("memory/total_mb", True, "memory.total_mb=True"),
        ("memory/bandwidth_gb_s", float("nan"), "memory.bandwidth_gb_s=nan"),
        ("memory/bandwidth_gb_s", float("inf"), "memory.bandwidth_gb_s=inf"),
        ("compute/op_us", -0.1, "zero or a positive number"),
        ("compute/prefill_gflops/2", 0, "compute.prefill_gflops.2=0"),
        ("compute/thread_scaling", [1.0, 2.0, -1.0, 3.0], "compute.thread_scaling=-1.0"),
        ("compute/thread_scaling", 4, "must be a list"),
        ("compute/threads", 2.5, "compute.threads=2.5"),
        ("cores/0/count", 0, "cores.count=0"),
        ("cores/0/kind", "", "cores.kind=''"),
        ("cores/0/ghz", -1, "cores.ghz=-1"),
        ("uncertainty", 0, "uncertainty=0"),
        ("name", "Pi 5", "name='Pi 5'"),
        ("title", 5, "title=5"),
        ("memory", 512, "memory=512: must be a table"),
        ("sources", {"cores": 5}, "sources: must be a table of texts"),
        ("cores", 4, "must be tables"),
        # Contradictory.
        ("memory/free_mb", 9000, "memory.free_mb=9000 is above memory.total_mb=8000"),
        ("compute/decode_gb_s/4", 20, "compute.decode_gb_s.4=20 is above memory.bandwidth_gb_s"),
        ("compute/threads", 8, "the device has 4 cores"),
        ("compute/thread_scaling", [1.0, 1.7], "one for each of 4 threads"),
        ("compute/thread_scaling", [2.0, 1.7, 2.0, 2.1], "must begin with 1"),
        ("link", "carrier-pigeon", "link='carrier-pigeon'"),
        ("power/idle_w", 20, "power.idle_w=20 is above power.busy_w"),
        ("cores", [{"kind": "a", "count": 2, "ghz": 1.0}, {"kind": "b", "count": 2, "ghz": 2.0}], "fastest kind"),
        ("sources/memory.total_mb", "data sheet", "must be one of 'published: ...'"),
        ("sources/memory.total_mb", "published: ", "must be one of 'published: ...'"),
    ],
)
def test_a_broken_profile_is_refused(data: dict[str, Any], where: str, value: object, message: str) -> None:
    if where == "power/idle_w":
        data["sources"]["power.idle_w"] = "published: x"
    change(data, where, value)
    with pytest.raises(ProfileError) as caught:
        profile_from_dict(data)
    assert message in str(caught.value)


def test_weights_may_come_faster_than_memory_if_the_source_says_that_a_cache_holds_them(data: dict[str, Any]) -> None:
    data["compute"]["decode_gb_s"]["4"] = 20
    data["sources"]["compute.decode_gb_s.4"] = "probed: partly from the cache"
    assert profile_from_dict(data).decode_gb_s[4] == 20


def test_a_profile_built_by_hand_is_checked_too() -> None:
    with pytest.raises(ProfileError, match=r"memory\.total_mb"):
        dataclasses.replace(load_profile("mini-pc"), total_mb=-5)


def test_a_name_that_is_nearly_right_gets_a_hint() -> None:
    with pytest.raises(ProfileError, match="did you mean raspberry-pi-5"):
        load_profile("raspbery-pi-5")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("memory = [", "not a TOML file"), ("", "name is missing"), (b"\xff", "cannot read")],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "device.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)


def test_a_profile_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot write"):
        write_profile(load_profile("mini-pc"), tmp_path / "absent" / "p.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ProfileError, match="cannot write"):
        write_profile(load_profile("mini-pc"), tmp_path / "folder.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.toml"]
