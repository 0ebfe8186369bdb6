"""Codecs: hidden states to bytes and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from .checks import check_finite, check_shape, finite_hidden

# ``tabq-rans`` and ``klt`` only where export calibrated them; ``ids`` alone where the device holds no layers.
CODECS = ("raw32", "raw16", "tabq", "tabq-rans", "klt", "ids")
UNLEVELED = ("raw32", "raw16", "ids")


class Codec(Protocol):
    """Turns hidden states ``[tokens, d_model]`` float32 into bytes and back.

    A token's reconstruction depends on that token alone, never on the tokens that share its payload.
    """

    @property
    def name(self) -> str:
        """One of `CODECS`, as the handshake carries it."""
        ...

    def encode(self, hidden: NDArray[np.float32], token_ids: Sequence[int] = ()) -> bytes:
        """Encode finite hidden states of these tokens; raises `CodecError` on NaN or infinity.

        Only codecs that predict a hidden state from its token, or send that alone, need ``token_ids``.
        """
        ...

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Decode exactly ``tokens`` rows; raises `CodecError` on anything malformed, before allocating."""
        ...


class Raw32:
    """Float32, little endian: exact, and the reference for every other codec."""

    name: ClassVar[str] = "raw32"

    def encode(self, hidden: NDArray[np.float32], token_ids: Sequence[int] = ()) -> bytes:
        """Encode finite hidden states ``[tokens, d_model]``; raises `CodecError` on NaN or infinity."""
        return finite_hidden(hidden).astype("<f4", copy=False).tobytes()

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Decode ``[tokens, d_model]``; raises `CodecError` on a wrong length or a non-finite value."""
        check_shape(tokens, d_model)
        if len(payload) != 4 * tokens * d_model:
            raise CodecError(
                f"raw32 payload of {len(payload)} bytes: {tokens} tokens of d_model {d_model} take "
                f"{4 * tokens * d_model}; send the frame again"
            )
        hidden = np.frombuffer(payload, "<f4").reshape(tokens, d_model).astype(np.float32)
        check_finite(hidden)
        return hidden


class Raw16:
    """Float16, with float32 for what float16 cannot reach.

    A value that would round to infinity (magnitude 65520 and more) is infinity in the float16 plane, and
    its float32 follows the plane, in order. Magnitudes below 3e-8 become zero, as float16 has it.
    """

    name: ClassVar[str] = "raw16"

    def encode(self, hidden: NDArray[np.float32], token_ids: Sequence[int] = ()) -> bytes:
        """Encode finite hidden states ``[tokens, d_model]``; raises `CodecError` on NaN or infinity."""
        hidden = finite_hidden(hidden)
        with np.errstate(over="ignore"):
            half = hidden.astype("<f2")
        escaped = hidden[np.isinf(half)]
        return b"".join((half.tobytes(), escaped.astype("<f4", copy=False).tobytes()))

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Decode ``[tokens, d_model]``; raises `CodecError` on a wrong length or a non-finite value."""
        check_shape(tokens, d_model)
        plane = 2 * tokens * d_model
        if len(payload) < plane:
            raise CodecError(
                f"raw16 payload of {len(payload)} bytes: {tokens} tokens of d_model {d_model} take {plane} "
                "at least; send the frame again"
            )
        half = np.frombuffer(payload, "<f2", tokens * d_model).reshape(tokens, d_model)
        escaped = np.isinf(half)
        expected = plane + 4 * int(np.count_nonzero(escaped))
        if len(payload) != expected:
            raise CodecError(
                f"raw16 payload of {len(payload)} bytes: its {(expected - plane) // 4} escapes make {expected}; "
                "send the frame again"
            )
        hidden = half.astype(np.float32)
        hidden[escaped] = np.frombuffer(payload, "<f4", offset=plane)
        check_finite(hidden)
        return hidden
