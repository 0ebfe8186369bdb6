"""Keys and values to bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.errors import CodecError, NonFiniteError
from isthmus.runtime.bundle import KVSpec
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.kv import decode_rows, encode_rows

LAYERS = range(3, 5)
SHAPE = (2, 2, 3, 5, 8)  # layers, sides, heads, tokens, width


def floats(scale: float = 1.0) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(scale=scale, size=SHAPE).astype(np.float32)


def chunk_of(rows: NDArray[np.generic], *, exact: bool) -> pb.KVChunk:
    coding, payload = encode_rows(rows, exact=exact)
    return pb.KVChunk(tokens=5, first_layer=3, last_layer=5, coding=coding, payload=payload)


def test_floats_come_back_bit_for_bit_where_that_is_asked_for() -> None:
    rows = floats()
    chunk = chunk_of(rows, exact=True)
    assert (chunk.coding, len(chunk.payload)) == (pb.KVChunk.STORED, rows.nbytes)
    decoded = decode_rows(chunk, KVSpec(32, 3, 8), LAYERS)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, rows)


def test_eight_bits_take_a_byte_a_value_and_two_a_row_and_lose_little() -> None:
    rows = floats(30.0)
    chunk = chunk_of(rows, exact=False)
    assert (chunk.coding, len(chunk.payload)) == (pb.KVChunk.ROWS8, rows.size + 2 * rows.size // 8)
    decoded = decode_rows(chunk, KVSpec(32, 3, 8), LAYERS)
    largest = np.abs(rows).max(-1, keepdims=True)
    assert (np.abs(decoded - rows) <= largest / 127 * 0.51).all()


def test_values_that_eight_bits_cannot_scale_are_sent_exactly() -> None:
    rows = floats()
    rows[0, 0, 0, 0, 0] = 1e8
    chunk = chunk_of(rows, exact=False)
    assert chunk.coding == pb.KVChunk.STORED
    assert np.array_equal(decode_rows(chunk, KVSpec(32, 3, 8), LAYERS), rows)


@pytest.mark.parametrize(("bits", "dtype", "width"), [(8, np.int8, 8), (4, np.uint8, 4)])
@pytest.mark.parametrize("exact", [True, False])
def test_codes_of_a_quantized_cache_come_back_as_they_are(bits: int, dtype: type, width: int, exact: bool) -> None:
    info = np.iinfo(dtype)
    rows = np.random.default_rng(1).integers(info.min, info.max + 1, (*SHAPE[:-1], width)).astype(dtype)
    chunk = chunk_of(rows, exact=exact)
    assert len(chunk.payload) == rows.size
    decoded = decode_rows(chunk, KVSpec(bits, 3, 8), LAYERS)
    assert decoded.dtype == dtype
    assert np.array_equal(decoded, rows)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_sent(value: float, exact: bool) -> None:
    rows = floats()
    rows[1, 1, 2, 4, 7] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        encode_rows(rows, exact=exact)


def test_a_chunk_of_another_cache_is_refused() -> None:
    chunk = chunk_of(floats(), exact=True)
    with pytest.raises(CodecError, match=r"layers \[3, 5\).*holds \[2, 5\)"):
        decode_rows(chunk, KVSpec(32, 3, 8), range(2, 5))
    with pytest.raises(CodecError, match="take 960"):
        decode_rows(chunk, KVSpec(32, 3, 4), LAYERS)
    with pytest.raises(CodecError, match="take 480"):
        decode_rows(chunk, KVSpec(8, 3, 8), LAYERS)
