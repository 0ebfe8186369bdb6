"""`isthmus bench --sessions`: what it prints, and what it says to users who cannot have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli.main import main
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ServerSecurity


@pytest.fixture
def folder(tiny: Any) -> Path:
    bundle: Path = tiny.bundle(bits=8, split=2)
    return bundle


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    security = ServerSecurity(insecure=True)
    with BackServer.from_bundle(folder / "server", threads=1, security=security) as server:
        yield server.address


def test_json_has_what_the_sessions_saw(folder: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--server", address, "--insecure", "--sessions", "3", "--new-tokens", "5", "--prompt-tokens", "2,30"]
    assert main(["bench", str(folder / "device"), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sessions"] == report["finished"] == 3
    assert report["prompt_tokens"] == [2, 30]
    assert report["identical"] is True
    assert report["errors"] == {}
    assert report["tokens_per_s"] > 0
    assert set(report["ms_per_token"]) == set(report["first_token_ms"]) == {"p50", "p95", "max"}


def test_the_table_says_the_same(folder: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--server", address, "--insecure", "--sessions", "2", "--new-tokens", "3"]
    assert main(["bench", str(folder / "device"), *options]) == 0
    table = capsys.readouterr().out
    assert "2 of 2" in table
    assert "same tokens as alone" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sessions", "2"], "--server"),
        (["--sessions", "2", "--server", "127.0.0.1:1", "--new-tokens", "3,4"], "one number"),
        (["--sessions", "0", "--server", "127.0.0.1:1"], "sessions 0"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(folder / "device"), *options]) != 0
    assert message in capsys.readouterr().err
