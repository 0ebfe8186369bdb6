"""A back that one process cannot hold: its layers in a line of processes, hidden states passed on as they are.

The first process has the server, the first blocks, the head and the samplers; each later one has further blocks, and
their KV caches. A batch goes through all of them as it would through one: the same blocks over the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import BundleError
from ..back import BackEngine
from ..bundle import Bundle, open_bundle
from ..memory import kv_budget, process_limit_mb
from ..ragged import RaggedStack, advance_together
from ..segments import KVCache
from ..server.limits import ServerLimits
from ..skipping import NO_BYPASS, Bypass

Part = tuple[int, int, int]  # a session's number, its length before, and how many rows it has


class LaterStage(Protocol):
    """A later process, as the first one calls it; see `Stage`."""

    def take(self, session: int, capacity: int, bypass: Bypass) -> None:
        """See `Stage.take`."""
        ...

    def forward(self, parts: Sequence[Part], hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Stage.forward`."""
        ...

    def append(self, session: int, position: int, rows: NDArray[Any]) -> None:
        """See `Stage.append`."""
        ...

    def room(self) -> int:
        """See `Stage.room`."""
        ...

    def give_back(self, session: int) -> None:
        """See `Stage.give_back`."""
        ...


def cut(bundle: Bundle, stages: int) -> list[Bundle]:
    """The server half as so many, each with a run of its blocks, the first with the head.

    Their manifests are those of models that begin and end with these layers.

    Raises:
        BundleError: the half has fewer blocks, or they cannot advance many sessions in one run.
    """
    blocks = bundle.segments("block")
    if not 1 <= stages <= len(blocks):
        raise BundleError(
            f"{bundle.folder}: a pipeline of {stages} stages needs as many blocks, the half has {len(blocks)}; choose "
            "fewer stages"
        )
    if not advance_together(bundle):
        raise BundleError(f"{bundle.folder}: a pipeline needs blocks that advance sessions together; export it again")
    others = tuple(segment for segment in bundle.segments() if segment.kind != "block")
    parts: list[Bundle] = []
    for group in np.array_split(np.arange(len(blocks)), stages):
        segments = [blocks[index] for index in group]
        manifest = replace(
            bundle.manifest,
            architecture=replace(bundle.manifest.architecture, layers=segments[-1].last_layer),
            split=segments[0].first_layer,
            segments=(*segments, *(() if parts else others)),
        )
        parts.append(replace(bundle, manifest=manifest, installed=False))
    return parts


class _Opened:
    """A part of the back in this process."""

    def __init__(self, part: Bundle, threads: int, limits: ServerLimits, memory_limit_mb: float | None) -> None:
        budget = kv_budget(part, chunk=limits.max_frame_tokens, limit_mb=process_limit_mb(memory_limit_mb))
        self.layers = part.manifest.half_layers("server")
        self.kv_budget = int(min(limits.kv_bytes, budget))
        capacity = min(limits.max_session_tokens, part.manifest.max_length)
        self.stack = RaggedStack(part, threads, capacity=capacity, slots=limits.max_sessions)


class Stage:
    """A later stage: blocks, and the KV caches of the sessions, by the numbers that the first stage gives them.

    Args:
        folder: ``OUT/server``.
        number: of this stage, the first one being 0.
        stages: in all.
        threads: of onnxruntime.
        limits: of the server.
        memory_limit_mb: of this process.

    Raises:
        BundleError: see `cut`.
        MemoryLimitError: the part does not fit.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        stages: int,
        threads: int,
        limits: ServerLimits,
        memory_limit_mb: float | None = None,
    ) -> None:
        part = cut(open_bundle(folder, "server"), stages)[number]
        opened = _Opened(part, threads, limits, memory_limit_mb)
        self._room, self._stack = opened.kv_budget, opened.stack
        self._caches: dict[int, KVCache] = {}

    def take(self, session: int, capacity: int, bypass: Bypass) -> None:
        """Have room for a session of so many positions, some of which leave blocks out."""
        self._caches[session] = self._stack.session(capacity, bypass).cache

    def forward(self, parts: Sequence[Part], hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the rows ``[rows, d_model]`` of some sessions through the blocks; what comes out, likewise."""
        counts = [count for _, _, count in parts]
        rows = np.split(hidden, np.cumsum(counts)[:-1])
        return np.concatenate(
            self._stack.forward(
                [(self._at(session, position), part) for (session, position, _), part in zip(parts, rows, strict=True)]
            )
        )

    def append(self, session: int, position: int, rows: NDArray[Any]) -> None:
        """Append keys and values, see `isthmus.runtime.segments.KVCache.append`."""
        self._at(session, position).append(rows)

    def room(self) -> int:
        """Bytes of KV caches that it may hold."""
        return self._room

    def give_back(self, session: int) -> None:
        """Forget a session."""
        self._stack.pool.give_back(self._caches.pop(session))

    def _at(self, session: int, position: int) -> KVCache:
        """A session's cache, rolled back as the first stage's is."""
        cache = self._caches[session]
        cache.truncate(position)
        return cache


class PipelineStack:
    """All blocks of a server half, the first ones in this process; stands where a `RaggedStack` does.

    Args:
        first: of this process.
        layers: that it has.
        later: the other stages, in order.
        later_layers: of each of ``later``.
    """

    def __init__(
        self, first: RaggedStack, layers: int, later: Sequence[LaterStage], later_layers: Sequence[int]
    ) -> None:
        self._first, self._later = first, later
        self._ends = np.cumsum([layers, *later_layers])
        self._share = float(self._ends[-1]) / layers
        self._numbers = itertools.count()
        self.sessions: dict[KVCache, int] = {}

    def session(self, capacity: int, bypass: Bypass = NO_BYPASS) -> PipelineSession:
        """A session of at most ``capacity`` positions, some of which leave blocks out."""
        cache, number = self._first.session(capacity, bypass).cache, next(self._numbers)
        taken: list[LaterStage] = []
        try:
            for stage in self._later:
                stage.take(number, capacity, bypass)
                taken.append(stage)
        except BaseException:
            self._first.pool.give_back(cache)
            for stage in taken:
                stage.give_back(number)
            raise
        self.sessions[cache] = number
        return PipelineSession(self, cache)

    def forward(self, parts: Sequence[tuple[KVCache, NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
        """See `RaggedStack.forward`; if a stage fails, nothing was done."""
        before = [(self.sessions[cache], cache.length, len(hidden)) for cache, hidden in parts]
        rows = np.concatenate(self._first.forward(parts))
        try:
            for stage in self._later:
                rows = stage.forward(before, rows)
        except BaseException:
            for (cache, _), (_, length, _) in zip(parts, before, strict=True):
                cache.truncate(length)
            raise
        return np.split(rows, np.cumsum([count for _, _, count in before])[:-1])

    def append(self, cache: KVCache, rows: NDArray[Any]) -> None:
        """Append keys and values ``[layers, 2, kv_heads, tokens, row_width]``, each layer's to its stage."""
        own, *others = np.split(rows, self._ends[:-1])
        position = cache.length
        for stage, part in zip(self._later, others, strict=True):
            stage.append(self.sessions[cache], position, part)
        cache.append(own)

    def give_back(self, cache: KVCache) -> None:
        """End a session in all stages."""
        number = self.sessions.pop(cache)
        self._first.pool.give_back(cache)
        for stage in self._later:
            stage.give_back(number)

    def kv_bytes(self, capacity: int) -> int:
        """Bytes of KV cache that a session comes to, in all stages together."""
        return round(self._first.kv_bytes(capacity) * self._share)

    @property
    def onnxruntime_seconds(self) -> float:
        """Time spent in onnxruntime so far, in this process."""
        return self._first.onnxruntime_seconds


class PipelineSession:
    """One session's run through all stages."""

    def __init__(self, stack: PipelineStack, cache: KVCache) -> None:
        self.cache = cache
        self._stack = stack

    def forward(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Advance alone, see `RaggedStack.forward`."""
        return self._stack.forward([(self.cache, hidden)])[0].copy()

    def append(self, rows: NDArray[Any]) -> None:
        """See `PipelineStack.append`."""
        self._stack.append(self.cache, rows)

    def close(self) -> None:
        """End the session in all stages."""
        self._stack.give_back(self.cache)


def open_pipeline(
    folder: Path,
    later: Sequence[LaterStage],
    *,
    threads: int,
    limits: ServerLimits,
    memory_limit_mb: float | None = None,
) -> tuple[BackEngine, ServerLimits]:
    """Open the first stage.

    Args:
        folder: ``OUT/server``.
        later: the other stages, opened.
        threads: of onnxruntime.
        limits: of the server.
        memory_limit_mb: of this process.

    Returns:
        The back, and the limits: the stage that has the least room for what it keeps of a session bounds them all, and
        nothing is kept for later sessions, as no stage has all keys and values.
    """
    bundle = open_bundle(folder, "server")
    parts = cut(bundle, len(later) + 1)
    opened = _Opened(parts[0], threads, limits, memory_limit_mb)
    later_layers = [part.manifest.half_layers("server") for part in parts[1:]]
    stack = PipelineStack(opened.stack, opened.layers, later, later_layers)
    shares = zip([opened.kv_budget, *(stage.room() for stage in later)], [opened.layers, *later_layers], strict=True)
    whole = bundle.manifest.half_layers("server")
    kv_bytes = min(budget * whole // layers for budget, layers in shares)
    return BackEngine(bundle, threads, stack=stack), replace(limits, kv_bytes=kv_bytes, prefix_cache_bytes=0)
