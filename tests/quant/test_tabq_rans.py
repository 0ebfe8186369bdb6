from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.devices.memory import process_memory
from isthmus.errors import CodecError
from isthmus.export.tabq_fit import fit_tabq
from isthmus.quant.tabq import TOLERANCES, TabQ
from isthmus.quant.tabq_rans import CLASSES, TabQRans, TabQTables
from isthmus.quant.trellis import FREQUENCIES

D = 64
SPREADS = np.geomspace(0.2, 4, D)


def hidden_states(tokens: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(6, (tokens, D)) * SPREADS).astype(np.float32)


TABLES = fit_tabq([hidden_states(300, seed) for seed in (1, 2)])


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 12),
    outliers=st.sampled_from([0, 1, 8, D]),
    tolerance=st.sampled_from([1e-6, 0.005, 0.01, *TOLERANCES]),
    magnitude=st.sampled_from([1e-44, 1e-30, 1.0, 25_000.0, 1e35]),
)
def test_the_reconstruction_is_that_of_tabq_bit_for_bit(
    seed: int, tokens: int, outliers: int, tolerance: float, magnitude: float
) -> None:
    hidden = hidden_states(tokens, seed)
    hidden[:: 1 + seed % 3] *= np.float32(magnitude)  # every width and raw tokens, in one frame
    hidden[:, seed % D] += np.float32(5)
    tabq = TabQ(outliers=outliers, tolerance=tolerance)
    codec = TabQRans(TABLES, tabq)
    expected = tabq.decode(tabq.encode(hidden), tokens, D)
    assert codec.decode(codec.encode(hidden), tokens, D).tobytes() == expected.tobytes()


def test_a_payload_is_that_of_tabq_but_for_its_codes() -> None:
    hidden = hidden_states(20)
    for tolerance in TOLERANCES:
        tabq = TabQ(tolerance=tolerance)
        packed, coded = tabq.encode(hidden), TabQRans(TABLES, tabq).encode(hidden)
        front = 20 * (5 + 8 * 6 // 8 + 8 * 4)
        assert coded[:front] == packed[:front]
        assert len(coded) < len(packed)


def test_a_stream_takes_the_bits_that_its_tables_promise() -> None:
    hidden = hidden_states(200, seed=9)
    tabq = TabQ(tolerance=0.2)
    quantized = tabq.quantize(hidden)
    steps = (quantized.codes - quantized.head[:, 2:3].astype(int))[quantized.coded]
    assert np.abs(steps).max() <= 15
    tables = TABLES.contexts(quantized.head[:, :1], quantized.coded)
    shares = np.diff(TABLES.cumulative.astype(int)).reshape(-1, 32)[tables, steps + 15] / FREQUENCIES
    promised = -np.log2(shares).sum() / 8
    front = sum(map(len, quantized.front()))
    assert len(TabQRans(TABLES, tabq).encode(hidden)) - front == pytest.approx(promised + 2, rel=0.001)


def test_components_that_spread_alike_share_a_class() -> None:
    assert TABLES.classes.min() == 0
    assert TABLES.classes.max() == CLASSES - 1
    assert np.corrcoef(TABLES.classes, np.log(SPREADS))[0, 1] > 0.95


def test_texts_of_any_length_are_fitted_alike() -> None:
    whole = hidden_states(60)
    apart = fit_tabq([whole[:7], whole[7:]])
    together = fit_tabq([whole])
    np.testing.assert_array_equal(apart.classes, together.classes)
    np.testing.assert_array_equal(apart.cumulative, together.cumulative)


@pytest.mark.parametrize("value", [0.0, 1e-44, 3e38])
def test_tables_are_usable_whatever_they_were_fitted_to(value: float) -> None:
    codec = TabQRans(fit_tabq([np.full((3, D), value, np.float32)]), TabQ(tolerance=0.05))
    hidden = hidden_states(3)
    expected = codec.tabq.decode(codec.tabq.encode(hidden), 3, D)
    assert codec.decode(codec.encode(hidden), 3, D).tobytes() == expected.tobytes()


def test_tables_come_back_from_their_file(tmp_path: Path) -> None:
    TABLES.save(tmp_path)
    loaded = TabQTables.load(tmp_path, d_model=D)
    np.testing.assert_array_equal(loaded.classes, TABLES.classes)
    np.testing.assert_array_equal(loaded.cumulative, TABLES.cumulative)
    with pytest.raises(CodecError, match="d_model 64, the bundle has 65; export again"):
        TabQTables.load(tmp_path, d_model=D + 1)


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickle", "class", "type", "frequencies", "shape", "key"])
def test_damaged_tables_are_refused(tmp_path: Path, damage: str) -> None:
    TABLES.save(tmp_path)
    file = tmp_path / "tabq-rans.npz"
    classes, cumulative = TABLES.classes.copy(), TABLES.cumulative.copy()
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:100])
        case "pickle":
            np.savez(file, classes=np.array([object()], dtype=object), cumulative=cumulative)
        case "class":
            classes[3] = CLASSES
            np.savez(file, classes=classes, cumulative=cumulative)
        case "type":
            np.savez(file, classes=classes.astype(np.int64), cumulative=cumulative)
        case "frequencies":
            cumulative[2, 3, 5] = cumulative[2, 3, 4]
            np.savez(file, classes=classes, cumulative=cumulative)
        case "shape":
            np.savez(file, classes=classes, cumulative=cumulative[:-1])
        case "key":
            np.savez(file, classes=classes)
    with pytest.raises(CodecError, match="no calibrated codec there"):
        TabQTables.load(tmp_path, d_model=D)


def test_another_width_is_refused() -> None:
    codec = TabQRans(TABLES, TabQ())
    with pytest.raises(CodecError, match="d_model 65: the tables of this bundle are for 64"):
        codec.encode(np.ones((2, D + 1), np.float32))
    with pytest.raises(CodecError, match="d_model 65: the tables of this bundle are for 64"):
        codec.decode(b"\0" * 99, 2, D + 1)


def test_a_code_beyond_its_width_is_refused() -> None:
    hidden = hidden_states(1)
    codec = TabQRans(TABLES, TabQ(outliers=0, q_min=4, q_max=4, tolerance=0.9))
    payload = bytearray(codec.encode(hidden))
    assert payload[2] > 0
    payload[2] = 0  # its zero point, so that negative steps leave the width
    with pytest.raises(CodecError, match="64 codes within their widths"):
        codec.decode(bytes(payload), 1, D)


def test_codes_where_none_belong_are_refused() -> None:
    codec = TabQRans(TABLES, TabQ(outliers=D))
    payload = codec.encode(hidden_states(2))
    with pytest.raises(CodecError, match="1 bytes that are not 0 codes"):
        codec.decode(payload + b"\0", 2, D)


def decode_or_refuse(codec: TabQRans, payload: bytes, tokens: int) -> None:
    try:
        hidden = codec.decode(payload, tokens, D)
    except CodecError:
        return
    assert hidden.shape == (tokens, D)
    assert np.isfinite(hidden).all()


def payloads(rng: random.Random, codec: TabQRans, count: int):
    """Random and mutated payloads of a few tokens."""
    whole = []
    for tokens in range(1, 5):
        hidden = hidden_states(tokens, seed=tokens)
        whole.append((codec.encode(hidden), tokens))
        hidden[0] *= np.float32(1e-44)  # raw
        whole.append((codec.encode(hidden), tokens))
    for number in range(count):
        payload, tokens = whole[number % len(whole)]
        mutated = bytearray(payload)
        match number // len(whole) % 4:
            case 0:
                mutated = bytearray(b"".join(bytes([4, 0, 8]) + rng.randbytes(1) + b"\x3f" for _ in range(tokens)))
                mutated += rng.randbytes(rng.randrange(80))
            case 1:
                for _ in range(rng.randint(1, 4)):
                    mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            case 2:
                del mutated[rng.randrange(len(mutated)) :]
            case 3:
                mutated += rng.randbytes(rng.randint(1, 9))
        yield bytes(mutated), tokens


def test_random_and_mutated_payloads_are_decoded_or_refused() -> None:
    codec = TabQRans(TABLES, TabQ())
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
def test_very_many_random_and_mutated_payloads() -> None:
    codec = TabQRans(TABLES, TabQ())
    resident_mb = []
    for number, (payload, tokens) in enumerate(payloads(random.Random(8), codec, 300_000)):
        decode_or_refuse(codec, payload, tokens)
        if number % 100_000 == 99_999:
            resident_mb.append(process_memory().resident_mb or 0.0)
    assert resident_mb[-1] <= resident_mb[0] + 2.0, resident_mb
