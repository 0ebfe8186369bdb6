"""The back half of a split model: layers ``[split, L)``, the head, and the choice of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..devices.backend import default_threads
from ..quant.codec import Codec
from .bundle import Bundle, Manifest, open_bundle
from .codecs import open_codec
from .ragged import RaggedStack
from .sampling import Sampler, Sampling
from .segments import Head, KVCache, LayerStack
from .skipping import NO_BYPASS, Bypass


class CachedSession(Protocol):
    """One session's run through the back's layers, as `StackSession` and `RaggedSession` are."""

    cache: KVCache

    def forward(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append hidden states ``[tokens, d_model]``; what comes out, likewise."""
        ...

    def append(self, rows: NDArray[Any]) -> None:
        """Append keys and values."""
        ...

    def close(self) -> None:
        """Free the KV cache."""
        ...


class BatchedStack(Protocol):
    """Layers through which many sessions run at once, as `RaggedStack` is."""

    @property
    def onnxruntime_seconds(self) -> float:
        """Time spent in onnxruntime so far."""
        ...

    def session(self, capacity: int, bypass: Bypass = NO_BYPASS) -> CachedSession:
        """A session of at most ``capacity`` positions, some of which leave something out."""
        ...

    def forward(self, parts: Sequence[tuple[KVCache, NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
        """See `RaggedStack.forward`."""
        ...

    def kv_bytes(self, capacity: int) -> int:
        """Bytes of KV cache that a session of that capacity comes to."""
        ...


class BackEngine:
    """An opened back half. Not thread-safe: one thread runs all its sessions.

    Args:
        bundle: the server half.
        threads: of onnxruntime.
        together: most sessions at once of a server, which can then advance together; 0 where there is one.
        capacity: most positions of each of these.
        stack: the opened layers, where they are not those of the bundle in this process.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        *,
        together: int = 0,
        capacity: int = 0,
        stack: BatchedStack | None = None,
    ) -> None:
        self._bundle = bundle
        self._codecs: dict[str, Codec] = {}
        self.manifest: Manifest = bundle.manifest
        self.manifest_sha256 = bundle.manifest_sha256
        self._stack: LayerStack | BatchedStack
        if stack is not None:
            self._stack = stack
        elif together:
            self._stack = RaggedStack(bundle, threads, capacity=capacity, slots=together)
        else:
            self._stack = LayerStack(bundle, threads)
        self._head = Head(bundle, threads)

    @classmethod
    def open(cls, folder: str | Path, *, threads: int | None = None) -> BackEngine:
        """Open ``OUT/server``, every file checked against the manifest.

        Raises:
            BundleError: the folder is no intact server half.
        """
        return cls(open_bundle(folder, "server"), default_threads() if threads is None else threads)

    def new_session(
        self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int] = (), bypass: Bypass = NO_BYPASS
    ) -> BackSession:
        """A session of at most ``max_tokens`` positions; ``context_ids`` feed the repetition penalty."""
        return BackSession(self._stack.session(max_tokens, bypass), self._head, Sampler(sampling, context_ids))

    def codec(self, name: str) -> Codec:
        """A decoder of what devices send; raises `CodecError` if this bundle has no such codec."""
        if name not in self._codecs:
            self._codecs[name] = open_codec(self._bundle, name)
        return self._codecs[name]

    def advance(self, parts: Sequence[tuple[BackSession, NDArray[np.float32], int]]) -> None:
        """Advance sessions, in one run if the engine was opened for that.

        Args:
            parts: each session once at most, its hidden states ``[tokens, d_model]``, and the number of the last rows
                whose tokens will be asked for.
        """
        if isinstance(self._stack, LayerStack):
            for session, hidden, _ in parts:
                session.advance(hidden)
            return
        outputs = self._stack.forward([(session.cache, hidden) for session, hidden, _ in parts])
        wanted = [rows[len(rows) - count :] for rows, (_, _, count) in zip(outputs, parts, strict=True)]
        counts = [len(rows) for rows in wanted]
        if sum(counts) > 1:
            logits = self._head.logits_many(np.concatenate(wanted))
            for (session, _, count), rows in zip(parts, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
                if count:
                    session.take(rows)
            return
        for (session, _, _), rows in zip(parts, wanted, strict=True):
            if len(rows):
                session.keep(rows.copy())

    @property
    def onnxruntime_seconds(self) -> float:
        """Time spent in onnxruntime so far, by all sessions."""
        return self._stack.onnxruntime_seconds + self._head.onnxruntime_seconds

    def kv_bytes(self, max_tokens: int) -> int:
        """Bytes of KV cache that a session of that length takes."""
        return self._stack.kv_bytes(max_tokens)


class BackSession:
    """One generation's state behind the split."""

    def __init__(self, stack: CachedSession, head: Head, sampler: Sampler) -> None:
        self._stack = stack
        self._head = head
        self._sampler = sampler
        self._sampled_at: list[int] = []  # the length at which each token was sampled
        self._rows: NDArray[np.float32] = np.empty((0, 0), np.float32)  # of the last advance, after the last layer
        self._logits: NDArray[np.float32] | None = None  # of their last ones, if they are known already

    @property
    def length(self) -> int:
        """Positions in the KV cache."""
        return self._stack.cache.length

    def advance(self, hidden: NDArray[np.float32]) -> None:
        """Run hidden states ``[tokens, d_model]`` through the back's layers."""
        self.keep(self._stack.forward(hidden))

    def keep(self, rows: NDArray[np.float32]) -> None:
        """Keep the last layer's ``[rows, d_model]`` of the last advanced positions until their tokens are chosen."""
        self._rows, self._logits = rows, None

    @property
    def cache(self) -> KVCache:
        """Keys and values of the back's layers."""
        return self._stack.cache

    def take(self, logits: NDArray[np.float32]) -> None:
        """Take the logits ``[rows, vocab_size]`` of the last advanced positions, which others computed with theirs."""
        self._logits = logits

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """Keys and values of positions ``[first, last)``, see `isthmus.runtime.segments.KVCache.rows`."""
        return self._stack.cache.rows(first, last)

    def append_rows(self, rows: NDArray[Any]) -> None:
        """Append keys and values that the same layers computed elsewhere, as `rows` gives them."""
        self._stack.append(rows)

    def truncate(self, length: int) -> None:
        """Roll back to ``length`` positions, and to the tokens that were sampled up to there."""
        self._stack.cache.truncate(min(length, self.length))
        self._sampled_at = [at for at in self._sampled_at if at <= length]
        self._sampler.rollback(len(self._sampled_at))

    def sample(self) -> int:
        """The token after the last advanced position."""
        logits = self._head.logits(self._rows[-1]) if self._logits is None else self._logits[-1]
        token = self._sampler.sample(logits, self.length)
        self.accept(token, self.length)
        return token

    def verify(self, drafted: Sequence[int]) -> list[int]:
        """Choose tokens as `sample` would one by one, as long as they are those that were drafted.

        With an ``accept_distance`` in its `Sampling` a session takes drafted tokens that come close, too.

        Args:
            drafted: tokens of the last advanced positions; at least one more position was advanced with them.

        Returns:
            The first drafted tokens, as many as were right, and one more. The session ends after the last right one.
        """
        count = len(drafted)
        first = self.length - count
        logits = self._logits
        if logits is None:
            logits = self._head.logits_many(self._rows[len(self._rows) - count - 1 :])
        tokens: list[int] = []
        for row, guess in zip(logits, [*drafted, None], strict=True):
            token = self._sampler.sample(row, first + len(tokens), guess)
            self.accept(token, first + len(tokens))
            tokens.append(token)
            if token != guess:
                break
        self._stack.cache.truncate(first + len(tokens) - 1)
        return tokens

    def accept(self, token: int, length: int) -> None:
        """Take note of the token after ``length`` positions: the one sampled here, or the one chosen elsewhere."""
        self._sampler.accept(token)
        self._sampled_at.append(length)

    @property
    def history(self) -> list[int]:
        """What the repetition penalty counts: the context ids and every token after them."""
        return self._sampler.history

    def close(self) -> None:
        """Free the KV cache; the session is of no use afterwards."""
        self._stack.close()
        del self._stack
