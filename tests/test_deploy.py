"""The examples of deployment: what can be checked of them without running them."""

from __future__ import annotations

import configparser
import json
import shlex
from pathlib import Path

import isthmus
from isthmus.cli.main import build_parser

DEPLOY = Path(isthmus.__file__).parent / "examples" / "deploy"
INSTRUCTIONS = {
    *("FROM", "RUN", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD", "ENV", "WORKDIR", "ARG", "LABEL"),
}


def test_the_unit_starts_a_command_that_exists() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((DEPLOY / "isthmus.service").read_text())
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/isthmus")
    args = build_parser().parse_args(arguments)
    assert args.command == "serve"
    assert args.drain_timeout < float(unit["Service"]["TimeoutStopSec"])


def test_the_image_runs_a_command_that_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert {instruction for instruction, _ in lines} <= INSTRUCTIONS
    assert lines[0][0] == "FROM"
    last = dict(lines)
    program, *arguments = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    assert program.endswith("/isthmus")
    assert build_parser().parse_args(arguments).command == "serve"
    assert "constraints.txt" in text
    assert (DEPLOY.parent.parent / "constraints.txt").is_file()
