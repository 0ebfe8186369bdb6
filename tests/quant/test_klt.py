from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.devices.memory import process_memory
from isthmus.errors import CodecError, NonFiniteError
from isthmus.quant.klt import KLT, KLTLevel, KLTTables
from isthmus.quant.trellis import TrellisTables

D, VOCABULARY = 24, 300


def make_tables(vocabulary: int = VOCABULARY) -> KLTTables:
    rng = np.random.default_rng(0)
    forward = np.linalg.qr(rng.standard_normal((D, D)))[0].astype(np.float32)
    deviations = np.geomspace(4, 0.2, D)
    coefficients = (rng.standard_normal((2000, D)) * deviations).astype(np.float32)
    levels = []
    for step in (0.1, 0.4, 1.0):
        width = int((deviations > step / 2).sum())
        values = np.ascontiguousarray(coefficients[:, :width] / np.float32(step))
        tables = TrellisTables.fit(values, np.arange(width, dtype=np.uint8) // 4)
        levels.append(KLTLevel(step, 0.0, tables))
    predicted = rng.integers(-127, 128, (vocabulary, D), dtype=np.int8)
    scale = (deviations / 127).astype(np.float32)
    inverse = np.linalg.inv(forward.astype(np.float64)).astype(np.float32)
    importance = rng.standard_normal(D).astype(np.float32)
    return KLTTables(forward, inverse, predicted, scale, importance, 3.0, 200.0, tuple(levels))


TABLES = make_tables()


def hidden_states(tokens: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, tokens)
    coefficients = rng.standard_normal((tokens, D)) * np.geomspace(4, 0.2, D)
    coefficients += TABLES.predicted[ids] * TABLES.predicted_scale
    return (coefficients @ TABLES.inverse).astype(np.float32), ids.tolist()


def test_finer_levels_err_less_and_take_more_bytes() -> None:
    hidden, ids = hidden_states(64)
    payloads = [KLT(TABLES, level).encode(hidden, ids) for level in range(3)]
    errors = [float(np.square(KLT(TABLES, 0).decode(payload, *hidden.shape) - hidden).mean()) for payload in payloads]
    assert errors == sorted(errors)
    assert errors[0] < 0.1**2
    assert [len(payload) for payload in payloads] == sorted(map(len, payloads), reverse=True)


@pytest.mark.parametrize("level", range(3))
def test_a_token_has_the_same_bits_whatever_shares_its_frame(level: int) -> None:
    codec = KLT(TABLES, level)
    hidden, ids = hidden_states(40)
    hidden[[3, 17]] *= 1e4  # raw
    whole = codec.decode(codec.encode(hidden, ids), 40, D)
    rng = random.Random(level)
    for _ in range(40):
        rows = rng.sample(range(40), rng.randint(1, 7))
        alone = codec.decode(codec.encode(hidden[rows], [ids[row] for row in rows]), len(rows), D)
        np.testing.assert_array_equal(alone, whole[rows])


def test_a_more_important_token_errs_less_and_takes_more_bytes() -> None:
    hidden, ids = hidden_states(60)
    errors, sizes = [], []
    for fineness in (-2.0, 1.0, 3.0, 5.0, 9.0):
        codec = KLT(replace(TABLES, importance=np.zeros(D, np.float32), importance_bias=fineness), 1)
        alone = [codec.encode(hidden[row : row + 1], ids[row : row + 1]) for row in range(60)]
        sizes.append(sum(map(len, alone)))
        decoded = np.concatenate([KLT(TABLES, 0).decode(payload, 1, D) for payload in alone])
        errors.append(float(np.square(decoded - hidden).mean()))
        np.testing.assert_array_equal(decoded, KLT(TABLES, 2).decode(codec.encode(hidden, ids), 60, D))
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[0] > 5 * errors[-1]  # seven quarter octaves: a factor of 11 if every step is below the spread


def test_every_level_is_decoded_by_every_codec() -> None:
    hidden, ids = hidden_states(5)
    for level in range(3):
        payload = KLT(TABLES, level).encode(hidden, ids)
        decoded = [KLT(TABLES, other).decode(payload, 5, D) for other in range(3)]
        np.testing.assert_array_equal(decoded[0], decoded[1])
        np.testing.assert_array_equal(decoded[0], decoded[2])


@pytest.mark.parametrize("value", [3e4, 1e20, 3e38, -3e38])
def test_massive_activations_cross_at_16_bits_at_least(value: float) -> None:
    hidden, ids = hidden_states(4)
    hidden[1, 7] = value
    decoded = KLT(TABLES, 2).decode(KLT(TABLES, 2).encode(hidden, ids), 4, D)
    np.testing.assert_allclose(decoded[1], hidden[1], rtol=2**-11, atol=1e-7)
    ordinary = KLT(TABLES, 2)
    np.testing.assert_array_equal(decoded[0], ordinary.decode(ordinary.encode(hidden[:1], ids[:1]), 1, D)[0])


def test_a_frame_of_massive_tokens_only() -> None:
    hidden, ids = hidden_states(3)
    hidden *= 1e6
    codec = KLT(TABLES, 0)
    np.testing.assert_allclose(codec.decode(codec.encode(hidden, ids), 3, D), hidden, rtol=2**-11)


def test_a_large_vocabulary_takes_wider_ids() -> None:
    tables = make_tables(70_000)
    hidden, _ = hidden_states(3)
    codec = KLT(tables, 0)
    ids = [69_999, 65_536, 3]
    assert np.abs(codec.decode(codec.encode(hidden, ids), 3, D) - hidden).max() < 1


def test_tables_come_back_from_their_files(tmp_path: Path) -> None:
    TABLES.save(tmp_path)
    loaded = KLTTables.load(tmp_path, d_model=D, vocab_size=VOCABULARY)
    hidden, ids = hidden_states(9)
    payload = KLT(TABLES, 1).encode(hidden, ids)
    assert KLT(loaded, 1).encode(hidden, ids) == payload
    np.testing.assert_array_equal(KLT(loaded, 1).decode(payload, 9, D), KLT(TABLES, 1).decode(payload, 9, D))


@pytest.mark.parametrize(("d_model", "vocab_size"), [(D + 1, VOCABULARY), (D, VOCABULARY + 1)])
def test_tables_of_another_model_are_refused(tmp_path: Path, d_model: int, vocab_size: int) -> None:
    TABLES.save(tmp_path)
    with pytest.raises(CodecError, match="export again"):
        KLTTables.load(tmp_path, d_model=d_model, vocab_size=vocab_size)


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "pickle", "without gains", "without importance", "nine levels"]
)
def test_damaged_tables_are_refused(tmp_path: Path, damage: str) -> None:
    TABLES.save(tmp_path)
    file = tmp_path / "klt-tables.npz"
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:100])
        case "pickle":
            np.savez(file, forward=np.array([object()], dtype=object))
        case "without gains":
            rewritten(file, lambda arrays: arrays | {"cumulative.0": arrays["cumulative.0"][:-1]})
        case "without importance":
            rewritten(file, lambda arrays: {name: arrays[name] for name in arrays if name != "importance"})
        case "nine levels":
            replace(TABLES, levels=TABLES.levels * 3).save(tmp_path)
    with pytest.raises(CodecError, match="no calibrated codec there"):
        KLTTables.load(tmp_path, d_model=D, vocab_size=VOCABULARY)


def rewritten(file: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    with np.load(file) as arrays:
        changed = change(dict(arrays))
    np.savez(file, **changed)


def test_a_gain_without_a_coded_token_is_refused() -> None:
    hidden, ids = hidden_states(2)
    payload = bytearray(KLT(TABLES, 1).encode(hidden * 1e5, ids))
    KLT(TABLES, 1).decode(bytes(payload), 2, D)
    payload[0] |= 1 << 3
    with pytest.raises(CodecError, match="all raw"):
        KLT(TABLES, 1).decode(bytes(payload), 2, D)


def test_bad_input_is_named() -> None:
    hidden, ids = hidden_states(2)
    codec = KLT(TABLES, 1)
    with pytest.raises(CodecError, match="levels 0"):
        KLT(TABLES, 3)
    with pytest.raises(CodecError, match="as many ids"):
        codec.encode(hidden, ids[:1])
    with pytest.raises(CodecError, match="ids below 300"):
        codec.encode(hidden, [0, VOCABULARY])
    with pytest.raises(CodecError, match="ids below 300"):
        codec.encode(hidden, [0, -1])
    hidden[1, 3] = np.inf
    with pytest.raises(NonFiniteError, match="row 1"):
        codec.encode(hidden, ids)
    with pytest.raises(CodecError, match="d_model 25"):
        codec.decode(b"\0" * 40, 2, D + 1)


def decode_or_refuse(codec: KLT, payload: bytes, tokens: int) -> None:
    try:
        hidden = codec.decode(payload, tokens, D)
    except CodecError:
        return
    assert hidden.shape == (tokens, D)
    assert np.isfinite(hidden).all()


def payloads(rng: random.Random, codec: KLT, count: int):
    """Random and mutated payloads of a few tokens."""
    whole = []
    for tokens in range(1, 5):
        hidden, ids = hidden_states(tokens, seed=tokens)
        whole.append((codec.encode(hidden, ids), tokens))
        hidden[0] *= 1e5
        whole.append((codec.encode(hidden, ids), tokens))
    for number in range(count):
        payload, tokens = whole[number % len(whole)]
        mutated = bytearray(payload)
        match number // len(whole) % 4:
            case 0:
                mutated = bytearray(rng.randbytes(rng.randrange(80)))
                if mutated and rng.random() < 0.8:
                    mutated[0] = rng.choice([0, 1, 2]) | rng.randrange(32) << 3
            case 1:
                for _ in range(rng.randint(1, 4)):
                    mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            case 2:
                del mutated[rng.randrange(len(mutated)) :]
            case 3:
                mutated += rng.randbytes(rng.randint(1, 9))
        yield bytes(mutated), tokens


def test_random_and_mutated_payloads_are_decoded_or_refused() -> None:
    codec = KLT(TABLES, 1)
    for payload, tokens in payloads(random.Random(0), codec, 2000):  # what is allocated once
        decode_or_refuse(codec, payload, tokens)
    tracemalloc.start()
    try:
        for payload, tokens in payloads(random.Random(1), codec, 20_000):
            decode_or_refuse(codec, payload, tokens)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000
    assert kept < 50_000


@pytest.mark.slow
def test_a_million_random_and_mutated_payloads() -> None:
    codec = KLT(TABLES, 1)
    resident_mb = []
    for number, (payload, tokens) in enumerate(payloads(random.Random(8), codec, 1_000_000)):
        decode_or_refuse(codec, payload, tokens)
        if number % 100_000 == 99_999:
            resident_mb.append(process_memory().resident_mb or 0.0)
    assert resident_mb[-1] <= resident_mb[0] + 2.0, resident_mb
