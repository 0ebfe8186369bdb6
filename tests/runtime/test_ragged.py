"""Sessions that advance together: whoever shares the run, each computes bit for bit what it computes alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import RequestError
from isthmus.runtime.back import BackEngine, BackSession
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.ragged import RaggedStack, advance_together
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.skipping import Bypass

CAPACITY = 96
SLOTS = 5
FIRST = 1  # layer of the server halves

# Bits of weights and of the KV cache. At 4 bits in blocks of 64 products come in pairs of rows.
PRECISIONS = [("llama", 4, 32, 32), ("llama", 8, 8, 32), ("llama", 4, 4, 32), ("llama", 32, 32, 32)]
PRECISIONS += [("mistral", 8, 32, 32), ("llama", 32, 8, 32), ("llama-wide", 4, 32, 64), ("qwen2", 2, 32, 32)]
all_precisions = pytest.mark.parametrize(("kind", "bits", "kv_bits", "block_size"), PRECISIONS)


def server_half(tiny: Any, kind: str = "llama", bits: int = 4, kv_bits: int = 32, block_size: int = 32) -> Path:
    skips = kind != "llama-wide"  # its two layers leave nothing out
    options = {"front_kv_bits": kv_bits, "back_kv_bits": kv_bits, "block_size": block_size, "ffn_skip": skips}
    folder: Path = tiny.bundle(kind, bits=bits, split=FIRST, **options)
    return folder / "server"


def together(half: Path, slots: int = SLOTS) -> BackEngine:
    return BackEngine(open_bundle(half, "server"), 2, together=slots, capacity=CAPACITY)


@dataclass
class Twin:
    """One session in a batch, and the same alone."""

    shared: BackSession
    alone: BackSession
    rng: np.random.Generator

    def hidden(self, rows: int) -> np.ndarray:
        width = self.alone._stack.d_model
        return self.rng.standard_normal((rows, width), np.float32)

    def check(self) -> None:
        assert self.shared.length == self.alone.length
        rows = [each.rows(0, each.length) for each in (self.shared, self.alone)]
        for layer, (shared, alone) in enumerate(zip(*rows, strict=True)):
            block = FIRST + layer // 2 * 2
            live = min(
                self.alone.length, self.shared.cache.bypass.blocks.get(block, CAPACITY)
            )  # the rest is never read
            assert np.array_equal(shared[:, :, :live], alone[:, :, :live])


@all_precisions
@settings(max_examples=12)
@given(data=st.data())
def test_a_session_never_depends_on_who_shares_the_batch(
    tiny: Any, kind: str, bits: int, kv_bits: int, block_size: int, data: st.DataObject
) -> None:
    half = server_half(tiny, kind, bits, kv_bits, block_size)
    batch, single = ENGINES.setdefault(half, (together(half), BackEngine.open(half, threads=2)))
    twins: list[Twin] = []
    opened = 0
    try:
        for _ in range(data.draw(st.integers(3, 12), "rounds")):
            if len(twins) < SLOTS and (not twins or data.draw(st.booleans(), "arrival")):
                sampling = Sampling(temperature=1.0, repetition_penalty=1.2, seed=opened)
                blocks = {
                    segment.first_layer: data.draw(st.integers(0, 20), "left out from")
                    for segment in batch.manifest.segments
                    if segment.kind == "block" and segment.half == "server" and data.draw(st.booleans(), "left out")
                }
                bypass = Bypass(blocks)
                if batch.manifest.skips_ffn and data.draw(st.booleans(), "networks left out"):
                    similarity, start = data.draw(st.sampled_from([0.5, 0.7, 0.8, 0.9])), data.draw(st.integers(0, 20))
                    bypass = Bypass(blocks, similarity, start)
                both = (engine.new_session(CAPACITY, sampling, [1, 2], bypass) for engine in (batch, single))
                twins.append(Twin(*both, np.random.default_rng(opened)))
                opened += 1
            parts = []
            for twin in twins:
                kind_of_step = data.draw(st.sampled_from(["rest", "token", "token", "chunk", "rollback", "verify"]))
                if kind_of_step == "rest":
                    continue
                if kind_of_step == "rollback":
                    length = data.draw(st.integers(0, twin.alone.length), "kept")
                    twin.shared.truncate(length)
                    twin.alone.truncate(length)
                rows = 1 if kind_of_step == "token" else data.draw(st.integers(1, 11), "rows")
                rows = min(rows, CAPACITY - twin.alone.length)
                drafted = (
                    data.draw(st.lists(st.integers(0, 255), max_size=rows - 1)) if kind_of_step == "verify" else []
                )
                if rows:
                    parts.append((twin, twin.hidden(rows), drafted))
            if parts:
                batch.advance([(twin.shared, hidden, len(drafted) + 1) for twin, hidden, drafted in parts])
            for twin, hidden, drafted in parts:
                twin.alone.advance(hidden)
                if drafted:
                    assert twin.shared.verify(drafted) == twin.alone.verify(drafted)
                else:
                    assert twin.shared.sample() == twin.alone.sample()
            for twin in twins:
                twin.check()
            if twins and data.draw(st.booleans(), "departure"):
                gone = twins.pop(data.draw(st.integers(0, len(twins) - 1), "who"))
                gone.shared.close()
                gone.alone.close()
    finally:
        for twin in twins:
            twin.shared.close()
            twin.alone.close()
    assert len(batch._stack.pool) == 0


ENGINES: dict[Path, tuple[BackEngine, BackEngine]] = {}


@all_precisions
def test_the_logits_are_those_of_a_session_alone(
    tiny: Any, kind: str, bits: int, kv_bits: int, block_size: int
) -> None:
    half = server_half(tiny, kind, bits, kv_bits, block_size)
    batch, single = together(half), BackEngine.open(half, threads=1)
    twins = [
        Twin(*(e.new_session(CAPACITY, Sampling()) for e in (batch, single)), np.random.default_rng(i))
        for i in range(SLOTS)
    ]
    for rows in ([7, 1, 30, 2, 1], [1] * SLOTS, [1, 3, 1, 1, 40]):
        parts = [(twin, twin.hidden(count)) for twin, count in zip(twins, rows, strict=True)]
        batch.advance([(twin.shared, hidden, 1) for twin, hidden in parts])
        for twin, hidden in parts:
            twin.alone.advance(hidden)
            assert twin.shared._logits is not None
            assert np.array_equal(twin.shared._logits[-1], single._head.logits(twin.alone._rows[-1]))


def test_drafts_are_verified_in_the_batch_as_alone(tiny: Any) -> None:
    half = server_half(tiny, bits=8)
    batch, single = together(half), BackEngine.open(half, threads=1)
    twins = [
        Twin(*(e.new_session(CAPACITY, Sampling()) for e in (batch, single)), np.random.default_rng(i)) for i in (0, 1)
    ]
    hidden = [twin.hidden(4) for twin in twins]
    single_tokens = []
    for row in hidden[0]:  # what it chooses token by token
        twins[0].alone.advance(row[None])
        single_tokens.append(twins[0].alone.sample())
    right = single_tokens[:3]
    batch.advance([(twins[0].shared, hidden[0], 4), (twins[1].shared, hidden[1], 0)])
    assert twins[0].shared.verify(right) == single_tokens
    twins[0].check()


def test_a_part_that_does_not_fit_stops_the_run_before_it_begins(tiny: Any) -> None:
    engine = together(server_half(tiny))
    small, large = engine.new_session(4, Sampling()), engine.new_session(CAPACITY, Sampling())
    rows = np.ones((5, 64), np.float32)
    with pytest.raises(RequestError, match="opened for 4"):
        engine.advance([(large, rows, 0), (small, rows, 0)])
    assert (small.length, large.length) == (0, 0)


def test_more_sessions_than_slots_are_refused(tiny: Any) -> None:
    engine = together(server_half(tiny), slots=2)
    sessions = [engine.new_session(8, Sampling()) for _ in range(2)]
    with pytest.raises(RequestError, match="2 sessions are taken"):
        engine.new_session(8, Sampling())
    sessions[0].close()
    engine.new_session(8, Sampling())


def test_both_graphs_of_a_block_read_the_same_weights(tiny: Any) -> None:
    half = server_half(tiny)
    for segment in open_bundle(half, "server").segments("block"):
        assert (half / segment.graph_file).is_file()
        assert (half / segment.ragged_graph_file).is_file()
        assert segment.data_file.encode() in (half / segment.ragged_graph_file).read_bytes()
        assert not (half / f"{segment.ragged_graph_file}.data").exists()
    device = open_bundle(half.parent / "device", "device")
    assert all(not segment.ragged_graph_file for segment in device.segments("block"))


def test_a_bundle_of_before_is_served_in_turns(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    bundle = open_bundle(server_half(tiny), "server")
    old = tuple(replace(segment, ragged_graph_file="") for segment in bundle.manifest.segments)
    with caplog.at_level(logging.WARNING):
        assert not advance_together(replace(bundle, manifest=replace(bundle.manifest, segments=old)))
    assert "take turns" in caplog.text


def test_an_older_onnxruntime_serves_in_turns(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = open_bundle(server_half(tiny), "server")
    assert advance_together(bundle) == (tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 32))
    monkeypatch.setattr(ort, "__version__", "1.31.1")
    with caplog.at_level(logging.WARNING):
        assert not advance_together(bundle)
    assert "1.31.1" in caplog.text


def test_buffers_of_few_shapes_are_kept(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.runtime.ragged.MAX_LANES", 2)
    half = server_half(tiny)
    stack = RaggedStack(open_bundle(half, "server"), 1, capacity=CAPACITY, slots=2)
    alone = BackEngine.open(half, threads=1).new_session(CAPACITY, Sampling())
    session = stack.session(CAPACITY)
    rng = np.random.default_rng(0)
    for count in (3, 1, 2, 5, 1, 3):
        hidden = rng.standard_normal((count, 64), np.float32)
        alone.advance(hidden)
        assert np.array_equal(session.forward(hidden), alone._rows)
    assert len(stack._lanes) == 2
