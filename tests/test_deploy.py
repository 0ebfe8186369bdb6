"""The examples of deployment: what can be checked of them without running them."""

from __future__ import annotations

import configparser
import json
import logging
import re
import shlex
import urllib.request
from pathlib import Path

import isthmus
from isthmus.cli.main import build_parser
from isthmus.runtime.server.logs import JsonFormatter

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


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(tiny) -> None:
    from isthmus.runtime.server.server import BackServer
    from isthmus.runtime.wire.security import ServerSecurity

    folder = Path(tiny.bundle(bits=8, split=2)) / "server"
    security = ServerSecurity(insecure=True)
    with (
        BackServer.from_bundle(folder, threads=1, security=security, metrics="127.0.0.1:0") as server,
        urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer,
    ):
        scraped = answer.read().decode()
    exposed = set(re.findall(r"^# TYPE (isthmus_\w+)", scraped, re.MULTILINE))
    exposed |= {f"{name}_bucket" for name in exposed}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    alerts = (DEPLOY / "prometheus.yml").read_text()
    for name in re.findall(r"isthmus_\w+", asked + alerts):
        assert name in exposed, name
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_log_lines_for_machines_name_their_session() -> None:
    record = logging.LogRecord("isthmus.x", logging.INFO, __file__, 1, "session %s: closed", ("ab12",), None)
    record.session = "ab12"
    line = json.loads(JsonFormatter().format(record))
    assert (line["level"], line["message"], line["session"]) == ("INFO", "session ab12: closed", "ab12")
    assert "step" not in line
