"""The wheel as a device installs it: alone, in an empty environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABSENT = ("torch", "transformers", "onnx", "gguf", "safetensors", "cryptography")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def device_python(tmp_path_factory) -> Path:
    """Python of an environment that holds the wheel and what it depends on."""
    work = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, work / "source", ignore=unwanted)
    pip("wheel", "--no-deps", "--wheel-dir", str(work), str(work / "source"))
    (wheel,) = work.glob("isthmus-*.whl")
    venv.create(work / "device", with_pip=True)
    python = work / "device" / "bin" / "python"
    pip("install", "--constraint", str(ROOT / "constraints.txt"), str(wheel), python=python)
    return python


def pip(*arguments: str, python: Path | str = sys.executable) -> None:
    done = subprocess.run([str(python), "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_device_generates_without_the_export_tools(device_python, tiny, tmp_path):
    device = tmp_path / "device"
    shutil.copytree(tiny.bundle(bits=4) / "device", device)
    command = [device_python.parent / "isthmus", "generate", device, "-p", "A prompt.", "-n", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 8
    probe = f"import importlib.util as u; print([m for m in {ABSENT!r} if u.find_spec(m)])"
    assert subprocess.run([device_python, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_command_that_needs_an_extra_names_it(device_python, tmp_path):
    command = [device_python.parent / "isthmus", "export", "smollm2-135m-instruct", "-o", "out", "--split", "10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "isthmus[export]" in done.stderr
    assert "Traceback" not in done.stderr
