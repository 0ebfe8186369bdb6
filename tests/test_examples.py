"""The examples run as their docstrings say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}


def test_export_serve_and_app_work_together(altered_checkpoint, environment, tmp_path):
    model = altered_checkpoint("llama")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    bundle = tmp_path / "bundle"
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word {number}" for number in range(3000)))
    exported = example("export.py", model, bundle, "2", text, environment=environment)
    assert exported.returncode == 0, exported.stderr
    assert "2 of 4 layers on the device" in exported.stdout
    command = [sys.executable, EXAMPLES / "serve.py", bundle / "server", "127.0.0.1:0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        address, certificate = line.split(" on ")[1].split()[0], line.strip().rstrip(")").split("certificate ")[1]
        app = example("app.py", bundle / "device", address, certificate, "Why?", environment=environment)
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=30)
    assert app.returncode == 0, app.stderr
    assert "bytes sent)" in app.stdout
    assert "Traceback" not in errors


def test_app_says_in_one_line_what_is_wrong(environment, tmp_path):
    app = example("app.py", tmp_path, "127.0.0.1:1", tmp_path / "none.pem", "Why?", environment=environment)
    assert app.returncode == 1
    assert app.stderr.startswith("error: ")
    assert app.stderr.count("\n") == 1


def example(name: str, *arguments: str | Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
