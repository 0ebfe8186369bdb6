"""What the server needs of a back half, and the one thread from which an engine and its sessions are called."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...quant.codec import Codec
from ..bundle import Manifest
from ..sampling import Sampling

T = TypeVar("T")


class ComputeSession(Protocol):
    """One generation's KV cache and sampler."""

    @property
    def length(self) -> int:
        """Positions in the KV cache."""
        ...

    def advance(self, hidden: NDArray[np.float32]) -> None:
        """Append hidden states ``[tokens, d_model]``."""
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

    def new_session(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int] = ()) -> ComputeSession:
        """Allocate a session of at most ``max_tokens`` positions."""
        ...

    def kv_bytes(self, max_tokens: int) -> int:
        """Bytes of KV cache that such a session takes."""
        ...


class _Job(NamedTuple):
    answer: asyncio.Future[Any]
    function: Callable[..., object]
    arguments: tuple[object, ...]


class ComputeThread:
    """Runs functions for an event loop, one after the other, in the order in which they were handed over.

    A `ThreadPoolExecutor` of one worker does the same; this spares a tenth of a millisecond a step.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="isthmus-compute", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(None)
        self._thread.join()

    def run(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Hand a function over, and await its result. If that is cancelled before its turn, it is not called."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(answer, function, arguments))
        return answer

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.answer.cancelled():
                continue
            result, failure = None, None
            try:
                result = job.function(*job.arguments)
            except BaseException as error:  # whatever it is, it belongs to the caller
                failure = error
            job.answer.get_loop().call_soon_threadsafe(_settle, job.answer, result, failure)
            del job, result, failure  # the wait for the next job must not keep a closed session's KV


def _settle(answer: asyncio.Future[Any], result: object, failure: BaseException | None) -> None:
    if answer.cancelled():
        return
    if failure is None:
        answer.set_result(result)
    else:
        answer.set_exception(failure)
