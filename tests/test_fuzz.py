"""A short run of `benchmarks/fuzz.py`, and its corpus."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import isthmus

ROOT = Path(isthmus.__file__).parent
CORPUS = ROOT / "tests" / "corpus" / "messages"


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_messages", ROOT / "benchmarks" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_mutated_messages_are_done_or_refused(fuzzer):
    outcomes, _, _ = fuzzer.fuzz(5000, 1)
    assert {"refused: BAD_CRC", "refused: BAD_FRAME", "refused: BAD_REQUEST", "hello passed"} <= set(outcomes)
    assert any(outcome.startswith("step done") for outcome in outcomes)


def test_what_was_found_once_still_ends_well(fuzzer):
    files = sorted(CORPUS.glob("*.bin"))
    assert files
    target = fuzzer.Target()
    for path in files:
        for codec in fuzzer.CODECS.values():
            target.outcome(path.read_bytes(), codec)
