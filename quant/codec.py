"""Codecs: hidden states to bytes and back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Codec(Protocol):
    """Turns hidden states ``[tokens, d_model]`` float32 into bytes and back.

    A token's reconstruction depends on that token alone, never on the tokens that share its payload.
    """

    name: str

    def encode(self, hidden: NDArray[np.float32]) -> bytes:
        """Encode finite hidden states; raises `CodecError` on NaN or infinity."""
        ...

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Decode exactly ``tokens`` rows; raises `CodecError` on anything malformed, before allocating by it."""
        ...
