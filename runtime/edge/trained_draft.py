"""The trained draft at run time: one layer over the front's hidden states, and a head over the most used tokens."""

from __future__ import annotations

from collections.abc import Sequence

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
        sampler = Sampler(sampling, prompt_ids, self._vocabulary)
        return DraftSession(self._stack.session(capacity), self._head, sampler, len(prompt_ids), sampling.temperature)


class DraftSession:
    """The draft's run through one text. It guesses with the noise with which the server will choose."""

    def __init__(
        self, stack: StackSession, head: Head, sampler: Sampler, prompt_tokens: int, temperature: float
    ) -> None:
        self._stack, self._head, self._sampler = stack, head, sampler
        self._prompt_tokens = prompt_tokens
        self._temperature = temperature or 1.0
        self._unseen: list[Hidden] = []  # not run through the layer yet
        self._length = 0  # with those

    def observe(self, hidden: Hidden) -> None:
        """Take the front's hidden states ``[tokens, d_model]`` of the next positions; they are run when needed."""
        self._unseen.append(hidden)
        self._length += len(hidden)

    def truncate(self, length: int) -> None:
        """Roll back to ``length`` positions, if there are more."""
        if length < self._length:
            unseen = np.concatenate([*self._unseen, np.empty((0, self._stack.d_model), np.float32)])
            seen = self._length - len(unseen)
            self._unseen = [unseen[: max(0, length - seen)]]
            self._stack.cache.truncate(min(seen, length))
            self._length = length
        self._sampler.rollback(min(self._sampler.generated, max(0, length - self._prompt_tokens)))

    def guess(self, ids: Sequence[int]) -> tuple[int, float]:
        """The next token, and the probability that the draft gives it.

        Args:
            ids: of all observed positions.
        """
        unseen = np.concatenate(self._unseen)
        self._unseen = []
        for first in range(0, len(unseen), PREFILL_CHUNK):
            last = self._stack.forward(unseen[first : first + PREFILL_CHUNK])[-1]
        logits = self._head.logits(last)
        for token in ids[self._prompt_tokens + self._sampler.generated :]:
            self._sampler.accept(token)
        token = self._sampler.sample(logits, len(ids))
        scores = (logits - logits.max()) / self._temperature
        np.exp(scores, out=scores)
        return token, float(scores[self._sampler.index(token)] / scores.sum())
