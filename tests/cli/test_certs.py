"""`isthmus certs`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.cli.main import main


def test_an_authority_its_certificates_and_its_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "ca")
    assert main(["certs", "ca", folder]) == 0
    assert "expires" in capsys.readouterr().out
    assert main(["certs", "server", folder, "localhost", "10.0.0.1", "--days", "10"]) == 0
    capsys.readouterr()
    assert main(["certs", "device", folder, "kitchen", "--json"]) == 0
    issued = json.loads(capsys.readouterr().out)
    assert issued["name"] == "kitchen"
    assert Path(issued["cert_file"]).is_file()
    assert main(["certs", "revoke", folder, issued["cert_file"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revoked"] == [issued["serial"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device", "{}/none", "x"], "isthmus certs ca"),
        (["ca", "{}", "--days", "-1"], "days=-1"),
        (["ca", "{}", "--name", "../x"], "name '../x'"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments, message) -> None:
    assert main(["certs", *(part.format(tmp_path) for part in arguments)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
