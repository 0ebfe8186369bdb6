"""The devices command: what it prints, and its exit status where something is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from isthmus.cli.main import main
from isthmus.devices import kernels, limits, probe
from isthmus.devices.profile import load_profile, profile_from_dict, profile_names, write_profile
from isthmus.runtime.bundle import open_bundle


def test_list_has_a_line_for_each_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == profile_names()


def test_list_as_json_holds_whole_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "list", "--json"]) == 0
    profiles = [profile_from_dict(data) for data in json.loads(capsys.readouterr().out)]
    assert profiles == [load_profile(name) for name in profile_names()]


def test_show_prints_every_figure_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    profile = load_profile("raspberry-pi-zero-2-w")
    assert main(["devices", "show", profile.name]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for figure in profile.figures():
        assert figure in printed
    assert "4 × Cortex-A53 1 GHz" in printed


def test_show_as_json_is_the_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "show", "pim-gpt", "--json"]) == 0
    assert profile_from_dict(json.loads(capsys.readouterr().out)) == load_profile("pim-gpt")


def test_an_unknown_name_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "show", "abacus"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("isthmus: error: no device profile 'abacus'")
    assert error.count("\n") == 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe runs everything, but small and briefly."""
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    for name in ("_WEIGHT_BYTES", "_PREFILL_BYTES", "_CACHE_BYTES", "_READ_BYTES"):
        monkeypatch.setattr(probe, name, 1e5)


def test_probe_writes_a_profile_and_prints_it(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "My Laptop.toml"
    assert main(["devices", "probe", "-o", str(path), "--threads", "1"]) == 0
    profile = load_profile(path)
    assert (profile.name, profile.threads) == ("my-laptop", 1)
    printed = capsys.readouterr()
    assert "compute.op_us" in printed.out
    assert f"written to {path}" in printed.err


def test_probe_times_the_shapes_of_a_bundle(quick: None, tiny, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tiny.bundle() / "device"
    assert main(["devices", "probe", "--bundle", str(bundle), "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    arch = open_bundle(bundle, "device").manifest.architecture
    assert f"{arch.d_model} × {arch.d_ff}" in profile_from_dict(report["profile"]).source("compute.decode_gb_s.4")
    assert report["links"] == []


def test_probe_says_that_other_programs_disturb_it(quick: None, monkeypatch, capsys) -> None:
    monkeypatch.setattr(probe, "busy_processors", lambda: 1.7)
    assert main(["devices", "probe", "--threads", "1"]) == 0
    assert "other programs keep 1.7 processors busy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "127.0.0.1:7070"], "--server needs --bundle"),
        (["--threads", "0"], "threads=0: must lie between 1 and"),
        (["--threads", "1000000"], "threads=1000000: must lie between 1 and"),
        (["-o", "/nowhere/p.toml"], "--output /nowhere/p.toml: there is no such folder"),
        (["--bundle", "/nowhere"], "/nowhere"),
    ],
)
def test_probe_refuses_bad_arguments_before_it_measures(arguments: list[str], message: str, capsys) -> None:
    assert main(["devices", "probe", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_profile_that_cannot_be_written_is_one_line(quick: None, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.toml").mkdir()
    assert main(["devices", "probe", "--threads", "1", "-o", str(tmp_path / "p.toml")]) == 1
    assert "cannot write the device profile" in capsys.readouterr().err


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")


@pytest.fixture
def without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where this process may not make control groups."""

    def refuse(group: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(limits.cgroups, "ChildGroup", refuse)


@on_linux
def test_emulate_passes_the_command_s_output_and_status_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "emulate", "raspberry-pi-5", "--", "sh", "-c", "echo out; exit 7"]) == 7
    printed = capfd.readouterr()
    assert printed.out == "out\n"
    assert "as on Raspberry Pi 5, 8 GB: 7000 MB of memory (" in printed.err


@on_linux
def test_emulate_says_what_holds_and_what_does_not(without_groups: None, tmp_path: Path, capfd) -> None:
    host = tmp_path / "host.toml"
    write_profile(load_profile("cpu-server"), host)
    options = ["devices", "emulate", "raspberry-pi-5", "--host-profile", str(host), "--"]
    assert main([*options, "sh", "-c", "exit 3"]) == 3
    error = capfd.readouterr().err
    assert "7000 MB of memory (RLIMIT_DATA)" in error
    assert "5 % of this machine's decode speed" in error
    assert "no control group for memory (Read-only file system)" in error
    assert "the share of processor time is not held" in error
    assert "an allocation beyond the limit fails" in error


@on_linux
def test_emulate_cannot_make_this_machine_faster(tmp_path: Path, capfd) -> None:
    host = tmp_path / "host.toml"
    write_profile(load_profile("raspberry-pi-zero-2-w"), host)
    assert main(["devices", "emulate", "raspberry-pi-5", "--host-profile", str(host), "--", "true"]) == 0
    assert "which it cannot have" in capfd.readouterr().err


@on_linux
@pytest.mark.parametrize(("killed", "message"), [(True, "killed for memory at the limit of 7000 MB"), (False, "")])
def test_emulate_tells_of_a_command_that_was_killed_for_memory(monkeypatch, capfd, killed: bool, message: str) -> None:
    monkeypatch.setattr(limits.Limits, "kills", lambda self: int(killed))
    status = main(["devices", "emulate", "raspberry-pi-5", "--", "sh", "-c", "kill -9 $$"])
    assert status == 137
    error = capfd.readouterr().err
    assert ("killed for memory" in error) == killed
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abacus", "--", "true"], "no device profile 'abacus'"),
        (["raspberry-pi-5", "--host-profile", "nowhere.toml", "--", "true"], "cannot read the device profile"),
        (["raspberry-pi-5", "--", "no-such-command-here"], "no-such-command-here: cannot be started"),
    ],
)
def test_emulate_refuses_bad_arguments(arguments: list[str], message: str, capsys) -> None:
    assert main(["devices", "emulate", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_emulate_without_a_command_shows_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["devices", "emulate", "raspberry-pi-5"])
    assert caught.value.code == 2
    assert "-- COMMAND" in capsys.readouterr().err


@on_linux
def test_emulate_refuses_a_device_with_less_memory_than_an_interpreter_takes(tmp_path: Path, capsys) -> None:
    small = dataclasses.replace(load_profile("raspberry-pi-5"), total_mb=4, free_mb=2)
    write_profile(small, tmp_path / "small.toml")
    assert main(["devices", "emulate", str(tmp_path / "small.toml"), "--", "true"]) == 1
    assert "the interpreter with its libraries alone takes" in capsys.readouterr().err
