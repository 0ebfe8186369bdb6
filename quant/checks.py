"""What every codec asks of hidden states and of the shape that it decodes to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, NonFiniteError


def check_shape(tokens: int, d_model: int) -> None:
    """Raise `CodecError` unless both are positive."""
    if tokens < 1 or d_model < 1:
        raise CodecError(f"tokens {tokens}, d_model {d_model}: a frame has at least one token and one channel")


def finite_hidden(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``[tokens, d_model]`` float32, contiguous.

    Raises:
        CodecError: another shape or dtype, or a value that is not finite.
    """
    hidden = shaped_hidden(hidden)
    check_finite(hidden)
    return hidden


def shaped_hidden(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `finite_hidden` does, for coders that find out themselves what is not finite."""
    if hidden.ndim != 2 or hidden.dtype != np.float32:
        raise CodecError(
            f"hidden states {hidden.dtype}{list(hidden.shape)}: a codec takes float32 [tokens, d_model]; convert them"
        )
    if not hidden.size:
        check_shape(*hidden.shape)
    return np.ascontiguousarray(hidden)


def check_finite(hidden: NDArray[np.float32]) -> None:
    """Raise `NonFiniteError` with the first row of ``[tokens, d_model]`` that holds NaN or infinity."""
    finite = np.isfinite(hidden)
    if not np.logical_and.reduce(finite, axis=None):  # what ``all`` calls, and less than it costs for one token
        row, channel = np.argwhere(~finite)[0]
        raise NonFiniteError(
            f"hidden state of row {row} is {hidden[row, channel]} at channel {channel}: only finite values "
            "cross; check the model's weights and precision"
        )
