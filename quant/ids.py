"""The codec ``ids``: token ids in place of hidden states, for a device that holds no layers.

What crosses at layer 0 is a row of the embedding table, and that is known by its token: 2 bytes stand for all of it,
exactly. The server looks the rows up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from .checks import check_shape

Rows = Callable[[list[int]], NDArray[np.float32]]
"""Rows ``[tokens, d_model]`` of the embedding table for token ids of the vocabulary."""


def id_bytes(vocab_size: int) -> int:
    """Bytes of one token id: 2 if 16 bits hold the vocabulary, else 4."""
    return 2 if vocab_size <= 1 << 16 else 4


class Ids:
    """Token ids, unsigned, little endian, `id_bytes` each; exact.

    Args:
        vocab_size: ids are below it.
        rows: the embedding's look-up; only what decodes has one.
    """

    name: ClassVar[str] = "ids"

    def __init__(self, vocab_size: int, rows: Rows | None = None) -> None:
        self._vocab_size = vocab_size
        self._dtype = f"<u{id_bytes(vocab_size)}"
        self._rows = rows

    def encode(self, hidden: NDArray[np.float32], token_ids: Sequence[int] = ()) -> bytes:
        """Encode the ids of ``[tokens, d_model]`` hidden states, which are not looked at.

        Raises:
            CodecError: not one id for each of them, or one outside the vocabulary.
        """
        check_shape(*hidden.shape)
        if len(token_ids) != len(hidden):
            raise CodecError(f"ids: {len(token_ids)} token ids for {len(hidden)} hidden states; give one for each")
        self._check(min(token_ids), max(token_ids))
        return np.array(token_ids, self._dtype).tobytes()

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Look ``[tokens, d_model]`` up; raises `CodecError` on a wrong length or an id outside the vocabulary."""
        check_shape(tokens, d_model)
        if self._rows is None:
            raise CodecError("ids: this half has no embedding to look token ids up in; decode with the server half")
        expected = tokens * id_bytes(self._vocab_size)
        if len(payload) != expected:
            raise CodecError(
                f"ids payload of {len(payload)} bytes: {tokens} tokens of a vocabulary of {self._vocab_size} take "
                f"{expected}; send the frame again"
            )
        ids = np.frombuffer(payload, self._dtype)
        self._check(int(ids.min()), int(ids.max()))
        return self._rows(ids.tolist())

    def _check(self, smallest: int, largest: int) -> None:
        for token in (smallest, largest):
            if not 0 <= token < self._vocab_size:
                raise CodecError(f"ids: token id {token} must lie between 0 and {self._vocab_size - 1}")
