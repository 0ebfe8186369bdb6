"""The codec that sends token ids, on its own."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import CodecError
from isthmus.quant.ids import Ids, id_bytes

D_MODEL = 8
TABLE = np.random.default_rng(0).standard_normal((300, D_MODEL)).astype(np.float32)
CODEC = Ids(300, lambda ids: TABLE[ids])


@given(ids=st.lists(st.integers(0, 299), min_size=1, max_size=70))
def test_the_rows_of_the_ids_come_back_whatever_the_hidden_states(ids):
    payload = CODEC.encode(np.full((len(ids), D_MODEL), np.nan, np.float32), ids)
    assert len(payload) == 2 * len(ids)
    np.testing.assert_array_equal(CODEC.decode(payload, len(ids), D_MODEL), TABLE[ids])


@pytest.mark.parametrize(("vocab_size", "size"), [(2, 2), (65536, 2), (65537, 4), (256_000, 4)])
def test_an_id_takes_what_the_largest_needs(vocab_size, size):
    seen = []
    codec = Ids(vocab_size, lambda ids: seen.append(ids) or np.zeros((len(ids), D_MODEL), np.float32))
    ids = [0, vocab_size - 1]
    payload = codec.encode(np.zeros((2, D_MODEL), np.float32), ids)
    assert len(payload) == 2 * size == 2 * id_bytes(vocab_size)
    codec.decode(payload, 2, D_MODEL)
    assert seen == [ids]


@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3], [1, 300], [-1, 1]])
def test_ids_that_are_missing_or_outside_the_vocabulary_are_not_encoded(ids):
    with pytest.raises(CodecError, match="token id"):
        CODEC.encode(np.zeros((2, D_MODEL), np.float32), ids)


@pytest.mark.parametrize("payload", [b"", b"\1", b"\1\0\2", b"\1\0\2\0\3\0"])
def test_a_payload_of_another_length_is_refused(payload):
    with pytest.raises(CodecError, match=f"ids payload of {len(payload)} bytes: 2 tokens .* take 4"):
        CODEC.decode(payload, 2, D_MODEL)


def test_an_id_outside_the_vocabulary_is_named_and_not_looked_up():
    codec = Ids(300, lambda ids: pytest.fail("looked up"))
    with pytest.raises(CodecError, match="token id 300 must lie between 0 and 299"):
        codec.decode(np.array([1, 300], "<u2").tobytes(), 2, D_MODEL)


@pytest.mark.parametrize(("tokens", "d_model"), [(0, 8), (-1, 8), (1, 0)])
def test_an_empty_shape_is_refused(tokens, d_model):
    with pytest.raises(CodecError, match="at least one token"):
        CODEC.decode(b"", tokens, d_model)
    with pytest.raises(CodecError, match="at least one token"):
        CODEC.encode(np.zeros((0, 8), np.float32))


def test_a_payload_that_claims_many_tokens_allocates_nothing_by_the_claim():
    tracemalloc.start()
    with pytest.raises(CodecError):
        CODEC.decode(b"\1\0" * 100, 2**40, 2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_a_half_without_an_embedding_does_not_decode():
    with pytest.raises(CodecError, match="no embedding"):
        Ids(300).decode(b"\1\0", 1, D_MODEL)
