"""How a token is chosen from logits: greedy, or an exact sample that a seed reproduces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, RequestError
from ..quant.noise import gumbel


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token.

    ``temperature=0`` is greedy: of the filters, only the repetition penalty applies to it. ``top_k=0``,
    ``top_p=1``, ``min_p=0`` and ``repetition_penalty=1`` switch a filter off.

    ``accept_distance`` concerns guesses that the server verifies. 0: they change nothing. Above, a guess is taken
    although another token was due if it comes close, such that at each position at most this share of all draws gives
    another token than without: the total variation distance between both distributions is no greater (a bound as
    LANTERN's, arXiv 2410.03355, which relaxes over neighbouring tokens; ours needs no notion of them). At temperature
    0, where nothing is drawn, a guess is taken that is at least 1 - ``accept_distance`` times as probable as the best.

    Raises:
        RequestError: a value is no number, or out of its bounds.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    accept_distance: float = 0.0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0, 100.0),
            "top_k": (0, 1 << 30),
            "top_p": (1e-9, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 1e3),
            "seed": (0, (1 << 64) - 1),
            "accept_distance": (0.0, 0.9),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            kind, kind_name = (Integral, "an integer") if isinstance(low, int) else (Real, "a number")
            is_kind = isinstance(value, kind)
            if not is_kind or not low <= value <= high:
                raise RequestError(f"{name}={value!r}: must be {kind_name} between {low} and {high}")


class Sampler:
    """Chooses the tokens of one generation.

    The filters and their order are those of Hugging Face transformers: repetition penalty (CTRL, Keskar et
    al. 2019, section 4.1, over every token of context and generation), temperature, top-k, top-p, min-p;
    each renormalises what the one before it left. Unlike there, tokens as likely as the last one that top-p
    keeps are kept too, as top-k does: the kept set does not depend on the order of equal logits.

    The token is then ``argmax(logits / temperature + noise)`` over the kept tokens, with the noise of
    `isthmus.quant.noise.gumbel`: an exact sample, which depends on nothing but the seed, the position, the
    logits and the history. Equal scores go to the lowest id.

    Args:
        sampling: the request's choice.
        context_ids: the prompt. Only the repetition penalty reads it; without one it may stay empty.
        vocabulary: the tokens that the logits stand for, ascending, where they are not of all tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        context_ids: Sequence[int] = (),
        vocabulary: NDArray[np.int64] | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._min_p = sampling.min_p
        self._penalty = sampling.repetition_penalty
        self._top_k = sampling.top_k
        self._seed = sampling.seed
        # The scores' noise makes the race of exponential clocks: the first of them is less than a factor f ahead of
        # the second in at most 1 - 1 / f of all races, whatever the rates are.
        self._leniency = -math.log1p(-sampling.accept_distance)
        self._context_length = len(context_ids)
        self._history = list(context_ids)

    @property
    def history(self) -> list[int]:
        """A copy of the context ids and the accepted tokens."""
        return list(self._history)

    @property
    def generated(self) -> int:
        """Number of accepted tokens."""
        return len(self._history) - self._context_length

    def sample(self, logits: NDArray[np.float32], position: int, guess: int | None = None) -> int:
        """Choose the token at a position; the history stays as it is until `accept`.

        Args:
            logits: ``[vocab_size]``, or of the sampler's own vocabulary; left unchanged.
            position: of the token to be chosen: the number of tokens before it, prompt included.
            guess: at that token, which matters only with an ``accept_distance``.

        Raises:
            BundleError: the logits hold NaN, or their maximum is infinite.
            RequestError: a token of the history lies outside the vocabulary.
        """
        greatest = self._greatest(logits, position)
        lenient = guess is not None and self._leniency > 0
        if self._temperature == 0.0 and self._penalty == 1.0 and not lenient:
            return self._token(greatest)
        kept, scores = self._scored(logits, position)
        best = int(scores.argmax())
        if guess is not None and lenient:
            place = int(np.searchsorted(kept, self.index(guess)))
            is_kept = place < len(kept) and kept[place] == self.index(guess)
            if is_kept and scores[place] + self._leniency >= scores[best]:
                best = place
        return self._token(int(kept[best]))

    def rank(self, logits: NDArray[np.float32], position: int, count: int) -> list[int]:
        """The tokens that `sample` would choose first, second and so on if the ones before were not there."""
        self._greatest(logits, position)
        kept, scores = self._scored(logits, position)
        count = min(count, scores.size)
        best = np.argpartition(scores, -count)[-count:]
        return [self._token(int(kept[index])) for index in best[np.argsort(-scores[best])]]

    def _greatest(self, logits: NDArray[np.float32], position: int) -> int:
        greatest = int(logits.argmax())  # NumPy's argmax points to NaN if there is one
        if not math.isfinite(logits[greatest]):
            raise BundleError(
                f"logits at position {position} hold NaN or infinity: they must be finite; "
                "the weights are damaged or their precision is too low: check or repeat the export"
            )
        return greatest

    def _scored(self, logits: NDArray[np.float32], position: int) -> tuple[NDArray[np.intp], NDArray[np.floating]]:
        """Indices of the logits that may be chosen, ascending, and the scores of which the greatest is."""
        scores: NDArray[np.floating] = logits
        if self._penalty != 1.0 and self._history:
            scores = self._penalise(logits)
        if self._temperature == 0.0:
            return np.arange(scores.size), scores
        scores = scores.astype(np.float64) / self._temperature
        kept = self._filter(scores)
        tokens = kept if self._vocabulary is None else self._vocabulary[kept]
        return kept, scores[kept] + gumbel(self._seed, position, tokens)

    def index(self, token: int) -> int:
        """Where a token of the sampler's vocabulary stands among the logits."""
        return token if self._vocabulary is None else int(np.searchsorted(self._vocabulary, token))

    def _token(self, index: int) -> int:
        return index if self._vocabulary is None else int(self._vocabulary[index])

    def accept(self, token: int) -> None:
        """Append a token to the history: the one sampled here, or the one that the server chose."""
        self._history.append(token)

    def rollback(self, generated: int) -> None:
        """Forget all but the first ``generated`` accepted tokens.

        Raises:
            RequestError: fewer than ``generated`` tokens were accepted.
        """
        if not 0 <= generated <= self.generated:
            raise RequestError(f"rollback to {generated} generated tokens: there are {self.generated}")
        del self._history[self._context_length + generated :]

    def _penalise(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        ids = np.array(self._history, np.int64)
        if self._vocabulary is not None:
            ids = np.flatnonzero(np.isin(self._vocabulary, ids))
            if not ids.size:
                return logits.astype(np.float64)
        if ids.min() < 0 or ids.max() >= logits.size:
            raise RequestError(
                f"token ids from {ids.min()} to {ids.max()} in the history: must lie in [0, {logits.size})"
            )
        scores = logits.astype(np.float64)
        seen = scores[ids]
        # A repeated id writes the same value again.
        scores[ids] = np.where(seen < 0, seen * self._penalty, seen / self._penalty)
        return scores

    def _filter(self, scores: NDArray[np.float64]) -> NDArray[np.intp]:
        """Ids that pass top-k, top-p and min-p, ascending."""
        kept: NDArray[np.intp] = np.arange(scores.size)
        if 0 < self._top_k < scores.size:
            kept = np.flatnonzero(scores >= np.partition(scores, -self._top_k)[-self._top_k])
        if self._top_p == 1.0 and self._min_p == 0.0:
            return kept
        weights = np.exp(scores[kept] - scores.max())
        lowest = self._min_p  # the greatest weight is 1
        if self._top_p < 1.0:
            lowest = max(lowest, _nucleus_threshold(weights, self._top_p))
        kept = kept[weights >= lowest]
        return kept


def _nucleus_threshold(weights: NDArray[np.float64], top_p: float) -> float:
    """Least weight in the smallest set of greatest weights whose share of the sum reaches ``top_p``."""
    total = weights.sum()
    # Weights below this make up less than 1 - top_p together, so none of them is in the set: most of the
    # vocabulary need not be sorted.
    bound = (1.0 - top_p) * total / weights.size
    descending = np.sort(weights[weights >= bound])[::-1]
    last = int(np.searchsorted(np.cumsum(descending), top_p * total))
    return float(descending[min(last, descending.size - 1)])
