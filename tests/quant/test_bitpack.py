from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import CodecError
from isthmus.quant.bitpack import pack, packed_bytes, unpack


@given(width=st.integers(0, 32), count=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_codes_of_any_width_come_back(width: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**width, count, dtype=np.uint64).astype(np.uint32)
    data = pack(codes, width)
    assert len(data) == packed_bytes(count, width) == -(-count * width // 8)
    np.testing.assert_array_equal(unpack(data, count, width, np.uint32), codes)
    if width <= 8:
        assert pack(codes.astype(np.uint8), width) == data
        np.testing.assert_array_equal(unpack(data, count, width, np.uint8), codes)


def test_bits_lie_plane_after_plane() -> None:
    # Codes 1, 2, 3 at two bits: the low bits 1 0 1, then the high bits 0 1 1, then two bits of padding.
    assert pack(np.array([1, 2, 3], np.uint8), 2) == bytes([0b10101100])


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0"])
def test_a_wrong_number_of_packed_bytes_is_refused(data: bytes) -> None:
    with pytest.raises(CodecError, match=r"3 of 4 bits take 2"):
        unpack(data, 3, 4, np.uint8)


def test_padding_that_is_not_zero_is_refused() -> None:
    data = pack(np.array([1, 2, 3], np.uint8), 4)
    with pytest.raises(CodecError, match="4 low bits pad"):
        unpack(data[:-1] + bytes([data[-1] | 1]), 3, 4, np.uint8)
