"""A back in several stages against the same back in one, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isthmus.errors import BundleError
from isthmus.runtime.back import BackEngine
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.fleet.pipeline import Stage, cut, open_pipeline
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits

LIMITS = ServerLimits(max_sessions=4, max_session_tokens=64)
SAMPLED = Sampling(temperature=1.1, top_k=40, repetition_penalty=1.1, seed=6)
LAYERS = 8  # so many that the half has three blocks


@pytest.fixture(scope="module")
def half(tmp_path_factory, write_checkpoint) -> Path:
    from isthmus.export.export import export_bundle

    root = tmp_path_factory.mktemp("pipeline")
    write_checkpoint(root / "checkpoint", "llama", 0, num_hidden_layers=LAYERS)
    bits = dict.fromkeys(("front_bits", "back_bits", "embed_bits", "head_bits"), 8)
    export_bundle(
        str(root / "checkpoint"), root / "out", **bits, split=1, layers_per_block=3, calibration_tokens=0, max_length=64
    )
    return root / "out" / "server"


def pipeline(half: Path, stages: int) -> tuple[BackEngine, list[Stage]]:
    later = [Stage(half, number, stages, 1, LIMITS) for number in range(1, stages)]
    return open_pipeline(half, later, threads=1, limits=LIMITS)[0], later


def one_process(half: Path) -> BackEngine:
    return BackEngine(open_bundle(half, "server"), 1, together=LIMITS.max_sessions, capacity=64)


def conversation(engine: BackEngine) -> list[object]:
    """All that a session can be asked for, two at a time: what came of it."""
    rng = np.random.default_rng(0)
    seen: list[object] = []

    def rows(count: int) -> np.ndarray:
        return rng.standard_normal((count, 64), np.float32)

    one, two = engine.new_session(40, SAMPLED), engine.new_session(40, Sampling())
    engine.advance([(one, rows(9), 1), (two, rows(3), 1)])
    seen += [one.sample(), two.sample()]
    engine.advance([(two, rows(1), 1), (one, rows(1), 1)])
    seen += [one.sample(), two.sample()]
    engine.advance([(one, rows(4), 4), (two, rows(2), 0)])
    seen += one.verify([1, 2, 3])
    seen.append(one.length)
    two.truncate(4)
    engine.advance([(two, rows(3), 2)])
    assert two._logits is not None
    seen.append(two._logits.tobytes())
    one.close()
    three = engine.new_session(40, SAMPLED)
    keys = rng.standard_normal((LAYERS - 1, 2, 2, 5, 16), np.float32)
    three.append_rows(keys)
    engine.advance([(three, rows(1), 1), (two, rows(1), 1)])
    seen += [three.sample(), two.sample()]
    two.close()
    three.close()
    return seen


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_give_the_bits_of_one_process(half, stages):
    engine, later = pipeline(half, stages)
    assert conversation(engine) == conversation(one_process(half))
    assert not any(stage._caches for stage in later)


def test_stages_share_out_the_layers(half):
    bundle = open_bundle(half, "server")
    parts = cut(bundle, 2)
    assert [segment.name for part in parts for segment in part.segments("block")] == [
        segment.name for segment in bundle.segments("block")
    ]
    assert [bool(part.segments("head")) for part in parts] == [True, False]
    assert sum(part.manifest.half_layers("server") for part in parts) == LAYERS - 1


def test_more_stages_than_blocks_are_refused(half):
    with pytest.raises(BundleError, match="needs as many blocks"):
        cut(open_bundle(half, "server"), 4)


def test_where_a_stage_fails_nothing_was_done(half):
    engine, [stage] = pipeline(half, 2)
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 3, 64), np.float32)
    session = engine.new_session(20, Sampling())
    engine.advance([(session, first, 1)])
    intact, stage.forward = stage.forward, lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.advance([(session, second, 1)])
    stage.forward = intact  # type: ignore[method-assign]
    assert session.length == 3
    engine.advance([(session, second, 1)])
    whole = one_process(half)
    expected = whole.new_session(20, Sampling())
    for rows in (first, second):
        whole.advance([(expected, rows, 1)])
    assert session._rows.tobytes() == expected._rows.tobytes()
    assert session.sample() == expected.sample()
