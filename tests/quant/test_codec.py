"""What holds for every codec, whatever its name."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.errors import CodecError
from isthmus.export.tabq_fit import fit_tabq
from isthmus.quant.codec import Codec, Raw16, Raw32
from isthmus.quant.tabq import TabQ
from isthmus.quant.tabq_rans import TabQRans


@cache
def make_tabq_rans(d_model: int) -> Codec:
    hidden = np.random.default_rng(d_model).standard_t(6, (200, d_model)).astype(np.float32)
    return TabQRans(fit_tabq([hidden]), TabQ())


MAKE: dict[str, Callable[[int], Codec]] = {
    "raw32": lambda d_model: Raw32(),
    "raw16": lambda d_model: Raw16(),
    "tabq": lambda d_model: TabQ(),
    "tabq-rans": make_tabq_rans,
}

ROWS = {
    "zero": lambda rng, d: np.zeros(d),
    "constant": lambda rng, d: np.full(d, -5.1),
    "normal": lambda rng, d: rng.standard_normal(d),
    "two values": lambda rng, d: rng.choice([0.0, 7.3], d),
    "offset": lambda rng, d: 1000 + rng.standard_normal(d),
    "sink": lambda rng, d: rng.standard_t(4, d) * np.where(rng.random(d) < 0.02, 25_000, 1),
    "huge": lambda rng, d: rng.standard_normal(d) * 1e30,
    "largest": lambda rng, d: rng.choice([-1.0, 1.0], d) * float(np.finfo(np.float32).max),
    "subnormal": lambda rng, d: rng.standard_normal(d) * 1e-42,
    "mixed": lambda rng, d: rng.standard_normal(d) * 10.0 ** rng.integers(-44, 38, d),
}


@st.composite
def hidden_states(draw: st.DrawFn) -> NDArray[np.float32]:
    kinds = draw(st.lists(st.sampled_from(sorted(ROWS)), min_size=1, max_size=8))
    d_model = draw(st.sampled_from([1, 2, 7, 64, 576]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.stack([ROWS[kind](rng, d_model) for kind in kinds]).astype(np.float32)


def decode_or_refuse(name: str, payload: bytes, tokens: int, d_model: int) -> None:
    """Decode within a memory bound to a finite array, or raise CodecError: nothing else may happen."""
    codec = MAKE[name](d_model)
    tracemalloc.start()
    try:
        hidden = codec.decode(payload, tokens, d_model)
    except CodecError:
        pass
    else:
        assert hidden.shape == (tokens, d_model)
        assert hidden.dtype == np.float32
        assert np.isfinite(hidden).all()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak <= 64 * tokens * d_model + 64_000


@pytest.mark.parametrize("name", MAKE)
@given(hidden=hidden_states())
def test_any_finite_input_comes_back_finite_and_in_shape(name: str, hidden: NDArray[np.float32]) -> None:
    codec = MAKE[name](hidden.shape[1])
    payload = codec.encode(hidden)
    decoded = codec.decode(payload, *hidden.shape)
    assert codec.name == name
    assert decoded.shape == hidden.shape
    assert decoded.dtype == np.float32
    assert decoded.flags.writeable
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", MAKE)
@given(hidden=hidden_states())
def test_a_token_decodes_to_the_same_bits_alone_and_among_others(name: str, hidden: NDArray[np.float32]) -> None:
    codec = MAKE[name](hidden.shape[1])
    together = codec.decode(codec.encode(hidden), *hidden.shape)
    alone = [codec.decode(codec.encode(row[None]), 1, len(row)) for row in hidden]
    assert together.tobytes() == np.concatenate(alone).tobytes()


@pytest.mark.parametrize("name", MAKE)
@given(hidden=hidden_states())
def test_an_encoding_is_deterministic_and_takes_any_memory_layout(name: str, hidden: NDArray[np.float32]) -> None:
    codec = MAKE[name](hidden.shape[1])
    assert codec.encode(hidden) == codec.encode(np.asfortranarray(hidden))


@pytest.mark.parametrize("name", MAKE)
@given(
    hidden=hidden_states(),
    edits=st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_a_mutated_payload_is_refused_or_finite(
    name: str, hidden: NDArray[np.float32], edits: list[tuple[int, int]]
) -> None:
    payload = bytearray(MAKE[name](hidden.shape[1]).encode(hidden))
    for position, flips in edits:
        # Half of the edits go to the head, where the counts are.
        place = (position // 2) % min(len(payload), 16) if position % 2 else (position // 2) % len(payload)
        payload[place] ^= flips
    decode_or_refuse(name, bytes(payload), *hidden.shape)


@pytest.mark.parametrize("name", MAKE)
@given(hidden=hidden_states(), data=st.data())
def test_a_truncated_or_extended_payload_is_refused(
    name: str, hidden: NDArray[np.float32], data: st.DataObject
) -> None:
    codec = MAKE[name](hidden.shape[1])
    payload = codec.encode(hidden)
    cut = data.draw(st.integers(0, len(payload) - 1))
    extra = data.draw(st.binary(min_size=1, max_size=9))
    for wrong in (payload[:cut], payload + extra):
        with pytest.raises(CodecError):
            codec.decode(wrong, *hidden.shape)


@pytest.mark.parametrize("name", MAKE)
@given(payload=st.binary(max_size=400), tokens=st.integers(1, 70), d_model=st.sampled_from([1, 3, 64, 576]))
def test_random_bytes_are_refused_or_finite(name: str, payload: bytes, tokens: int, d_model: int) -> None:
    decode_or_refuse(name, payload, tokens, d_model)


@pytest.mark.parametrize("name", MAKE)
def test_a_small_payload_that_claims_many_tokens_allocates_nothing_by_the_claim(name: str) -> None:
    codec = MAKE[name](576)
    tracemalloc.start()
    with pytest.raises(CodecError):
        codec.decode(b"\2\0\0\1\0" * 1000, 2**40, 2**20)
    with pytest.raises(CodecError):
        codec.decode(b"\2\0\0\1\0" * 1000, 1000, 2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_encode_names_the_row_that_is_not_finite(name: str, value: float) -> None:
    hidden = np.ones((5, 64), np.float32)
    hidden[3, 17] = value
    with pytest.raises(CodecError, match=r"row 3 is .*(nan|inf) at channel 17"):
        MAKE[name](64).encode(hidden)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    "hidden",
    [
        np.ones(64, np.float32),
        np.ones((1, 1, 64), np.float32),
        np.ones((2, 64), np.float64),
        np.ones((0, 64), np.float32),
        np.ones((2, 0), np.float32),
    ],
)
def test_encode_refuses_other_shapes_and_dtypes(name: str, hidden: NDArray[np.float32]) -> None:
    with pytest.raises(CodecError):
        MAKE[name](64).encode(hidden)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("tokens", "d_model"), [(0, 64), (-1, 64), (1, 0)])
def test_decode_refuses_an_empty_shape(name: str, tokens: int, d_model: int) -> None:
    with pytest.raises(CodecError, match="at least one token"):
        MAKE[name](64).decode(b"", tokens, d_model)


@given(hidden=hidden_states())
def test_raw32_is_exact(hidden: NDArray[np.float32]) -> None:
    codec = Raw32()
    payload = codec.encode(hidden)
    assert len(payload) == 4 * hidden.size
    assert codec.decode(payload, *hidden.shape).tobytes() == hidden.tobytes()


@given(hidden=hidden_states())
def test_raw16_is_float16_and_exact_beyond_its_range(hidden: NDArray[np.float32]) -> None:
    codec = Raw16()
    payload = codec.encode(hidden)
    decoded = codec.decode(payload, *hidden.shape)
    beyond = np.abs(hidden) >= 65520
    assert len(payload) == 2 * hidden.size + 4 * beyond.sum()
    np.testing.assert_array_equal(decoded[beyond], hidden[beyond])
    np.testing.assert_array_equal(decoded[~beyond], hidden[~beyond].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_raw_payloads_with_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(CodecError, match="row 1"):
        Raw32().decode(np.array([1, 2, 3, value], "<f4").tobytes(), 2, 2)
    escaped = np.array([1, 2, 3, np.inf], "<f2").tobytes() + np.array([value], "<f4").tobytes()
    with pytest.raises(CodecError, match="row 1"):
        Raw16().decode(escaped, 2, 2)
    with pytest.raises(CodecError, match="row 1"):
        Raw16().decode(np.array([1, 2, np.nan, 4], "<f2").tobytes(), 2, 2)
