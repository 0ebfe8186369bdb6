"""The devices command: what it prints, and its exit status where something is wrong."""

from __future__ import annotations

import json

import pytest

from isthmus.cli.main import main
from isthmus.devices.profile import load_profile, profile_from_dict, profile_names


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
