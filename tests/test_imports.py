"""Who may import whom: the rule of the house, read from the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import isthmus

ROOT = Path(isthmus.__file__).parent

# What each package may import beside itself and the leaves that all may import.
LEAVES = {"errors", "_version"}
ALLOWED = {
    "quant": set[str](),
    "devices": {"quant"},
    "runtime": {"quant", "devices"},
    "export": {"quant", "devices", "runtime.bundle", "runtime.draft_bundle", "runtime.exits"},
    "cli": {"quant", "devices", "runtime", "export"},
    # The face imports its public names on first use; for type checkers it names them.
    "__init__": {"runtime", "export"},
    "errors": set[str](),
    "_version": set[str](),
}
HEAVY = {"torch", "transformers", "onnx", "optimum", "onnxscript", "onnx_ir", "tensorflow", "llama_cpp"}
ON_DEVICE = ("quant", "devices", "runtime", "__init__", "errors", "_version")


def declared_packages() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return sorted(settings["tool"]["setuptools"]["packages"])


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name below ``isthmus`` and file of each module; a package goes by its own name."""
    for package in declared_packages():
        for path in sorted((ROOT / Path(*package.split(".")[1:])).glob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts if parts[-1] != "__init__" or len(parts) == 1 else parts[:-1]), path


MODULES = dict(modules())


def imports(name: str, source: str, *, is_package: bool) -> set[str]:
    """Absolute dotted names that a module imports anywhere, in functions too."""
    package = ["isthmus", *name.split(".")] if name != "__init__" else ["isthmus"]
    if not is_package:
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def broken_rules(name: str, source: str, *, is_package: bool) -> list[str]:
    """What a module of that name may not import and does."""
    home = name.split(".")[0]
    imported = imports(name, source, is_package=is_package)
    ours = {item.removeprefix("isthmus.") for item in imported if item.split(".")[0] == "isthmus"}
    allowed = LEAVES | ALLOWED[home] | {home}
    broken = [item for item in ours if not any(item == a or item.startswith(f"{a}.") for a in allowed)]
    if home in ON_DEVICE:
        broken += [item for item in imported if item.split(".")[0] in HEAVY]
    return sorted(broken)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_its_package_may(name: str) -> None:
    path = MODULES[name]
    source = path.read_text(encoding="utf-8")
    assert broken_rules(name, source, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("quant.x", "from ..devices import backend"),
        ("quant.x", "from .. import runtime"),
        ("devices.x", "from isthmus.runtime.bundle import Bundle"),
        ("runtime.edge.x", "def f():\n    from ...export.graph import GraphWriter"),
        ("runtime.edge.x", "def f():\n    import torch.nn"),
        ("runtime.x", "from onnx import helper"),
        ("export.x", "from ..runtime.segments import Head"),
        ("export.families.x", "from ...cli import main"),
    ],
)
def test_the_rule_catches_a_forbidden_import(name: str, source: str) -> None:
    assert broken_rules(name, source, is_package=False)


@pytest.mark.parametrize(
    "code",
    [
        "import isthmus",
        "import isthmus; isthmus.EdgeModel; isthmus.Sampling",
        "import isthmus; isthmus.BackServer",
    ],
)
def test_the_runtime_loads_neither_torch_nor_transformers_nor_onnx(code: str) -> None:
    check = f"{code}\nimport sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_declared_packages_are_the_folders_with_an_init_file() -> None:
    others = {"build", "dist", "tests", "examples", "benchmarks"}
    tops = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in others and not p.name.startswith(".")]
    folders = [init.parent.relative_to(ROOT) for top in tops for init in top.rglob("__init__.py")]
    assert declared_packages() == sorted(["isthmus", *(".".join(("isthmus", *f.parts)) for f in folders)])


def test_running_a_bundle_leaves_nothing_of_onnxruntime_in_the_users_home(tiny, tmp_path):
    program = "import sys; from isthmus import EdgeModel; EdgeModel(sys.argv[1]).generate('x', max_new_tokens=2)"
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", program, str(tiny.bundle() / "device")]
    subprocess.run(command, check=True, env=environment | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []
