"""What the server needs of a back half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...quant.codec import Codec
from ..bundle import Manifest
from ..sampling import Sampling
from ..skipping import NO_BYPASS, Bypass


class ComputeSession(Protocol):
    """One generation's KV cache and sampler."""

    @property
    def length(self) -> int:
        """Positions in the KV cache."""
        ...

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """A copy of the keys and values of positions ``[first, last)``, as `append_rows` takes them."""
        ...

    def append_rows(self, rows: NDArray[Any]) -> None:
        """Append keys and values ``[layers, 2, kv_heads, tokens, row_width]``, as the cache stores them."""
        ...

    def truncate(self, length: int) -> None:
        """Roll back to ``length`` positions."""
        ...

    def sample(self) -> int:
        """The token after the last advanced position."""
        ...

    def verify(self, drafted: Sequence[int]) -> list[int]:
        """Tokens after the advanced positions before and at ``drafted``, which are the last; see `BackSession`."""
        ...

    def close(self) -> None:
        """Free the KV cache."""
        ...


class ComputeEngine(Protocol):
    """An opened back half, as `isthmus.runtime.back.BackEngine` is one."""

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        ...

    @property
    def manifest_sha256(self) -> str:
        """Its hash, as the handshake compares it."""
        ...

    def codec(self, name: str) -> Codec:
        """A decoder of what devices send."""
        ...

    @property
    def onnxruntime_seconds(self) -> float:
        """Time spent in onnxruntime so far, by all sessions."""
        ...

    def new_session(
        self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int] = (), bypass: Bypass = NO_BYPASS
    ) -> ComputeSession:
        """Allocate a session of at most ``max_tokens`` positions, some of which leave blocks out."""
        ...

    def advance(self, parts: Sequence[tuple[Any, NDArray[np.float32], int]]) -> None:
        """Append hidden states ``[tokens, d_model]`` to each of some sessions; tokens of so many last rows follow."""
        ...

    def kv_bytes(self, max_tokens: int) -> int:
        """Bytes of KV cache that such a session takes."""
        ...
