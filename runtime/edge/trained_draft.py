"""The trained draft at run time: one layer over the front's hidden states, and a head over the most used tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..draft_bundle import Draft
from ..sampling import Sampler, Sampling
from ..segments import Head, LayerStack, StackSession
from .generate import PREFILL_CHUNK

Hidden = NDArray[np.float32]


class TrainedDraft:
    """An opened draft.

    Args:
        draft: its checked files.
        threads: of onnxruntime.
    """

    def __init__(self, draft: Draft, threads: int) -> None:
        self._vocabulary = draft.vocabulary
        self._stack = LayerStack(draft.bundle, threads)
        self._head = Head(draft.bundle, threads)

    def session(self, capacity: int, sampling: Sampling, prompt_ids: Sequence[int]) -> DraftSession:
        """A session of at most ``capacity`` positions."""
        return DraftSession(self._stack.session(capacity), self._head, sampling, self._vocabulary, prompt_ids)


class DraftSession:
    """The draft's run through one text. It guesses with the noise with which the server will choose.

    Args:
        stack: a fresh session of the draft's layer.
        head: over its vocabulary.
        sampling: of the generation.
        vocabulary: ids of the head's rows.
        prompt_ids: for a repetition penalty.
    """

    def __init__(
        self,
        stack: StackSession,
        head: Head,
        sampling: Sampling,
        vocabulary: NDArray[np.int64],
        prompt_ids: Sequence[int],
    ) -> None:
        self._stack, self._head = stack, head
        self._sampler = Sampler(sampling, prompt_ids, vocabulary)
        self._prompt_tokens = len(prompt_ids)
        self._penalised = sampling.repetition_penalty != 1.0
        self._temperature = sampling.temperature or 1.0
        self._unseen: list[Hidden] = []  # not run through the layer yet
        self._unseen_tokens = 0

    def observe(self, hidden: Hidden) -> None:
        """Take the front's hidden states ``[tokens, d_model]`` of the next positions; they are run when needed."""
        self._unseen.append(hidden)
        self._unseen_tokens += len(hidden)

    def truncate(self, length: int) -> None:
        """Roll back to ``length`` positions, if there are more."""
        seen = self._stack.cache.length
        kept = max(0, length - seen)
        if kept < self._unseen_tokens:
            self._unseen, self._unseen_tokens = ([np.concatenate(self._unseen)[:kept]] if kept else []), kept
        self._stack.cache.truncate(min(seen, length))

    def rows(self, position: int) -> NDArray[Any] | None:
        """Keys and values of a position; None if it was not run yet."""
        if position >= self._stack.cache.length:
            return None
        return self._stack.cache.rows(position, position + 1)

    def restore(self, hidden: Hidden, rows: NDArray[Any] | None) -> None:
        """Take the next position, with the keys and values that it had, if it had been run."""
        if rows is None or self._unseen:
            self.observe(hidden)
        else:
            self._stack.cache.append(rows)

    def guesses(self, ids: Sequence[int], count: int) -> list[tuple[int, float]]:
        """The likeliest next tokens, the first first, and the probability that the draft gives each.

        Args:
            ids: of all positions; the last was observed since the last call.
            count: how many.
        """
        unseen = np.concatenate(self._unseen)
        self._unseen, self._unseen_tokens = [], 0
        for first in range(0, len(unseen), PREFILL_CHUNK):
            last = self._stack.forward(unseen[first : first + PREFILL_CHUNK])[-1]
        logits = self._head.logits(last)
        if self._penalised:
            self._sampler.rollback(0)
            for token in ids[self._prompt_tokens :]:
                self._sampler.accept(token)
        tokens = self._sampler.rank(logits, len(ids), count)
        shares = (logits - logits.max()) / self._temperature
        np.exp(shares, out=shares)
        shares /= shares.sum()
        return [(token, float(shares[self._sampler.index(token)])) for token in tokens]
