"""How sure a draft must be of its token for the device to take it: a promise kept with a stated risk.

Source: Learn then Test (arXiv 2110.01052), fixed-sequence testing. For each threshold the null hypothesis is that the
tokens of at least that confidence agree with the full model less often than promised; its p-value is the binomial
tail, which is where the Clopper-Pearson bound ends. Thresholds are tested from the highest down, and the last one that
is rejected before the first that is not is taken: with a probability of at least ``1 - risk`` over the measured
tokens, it keeps the promise. Ours: the promise is about the exited tokens and not about all, which is stricter; and
the sequence begins where enough tokens are above the threshold, which does not depend on whether they agreed.

Tokens of one text depend on each other, where the bound takes them as independent; docs/results/exits.md measures what
that costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

RISK = 0.05
# Lower ends of the bins of confidence, the draft's probability of its likeliest token.
THRESHOLDS = tuple(round(0.02 * at, 2) for at in range(48)) + tuple(round(0.96 + 0.002 * at, 3) for at in range(20))
_ENOUGH = 4  # times the tokens without which not even a perfect draft could pass


@dataclass(frozen=True)
class ExitCurve:
    """How often a draft agreed with the full model on held-out text, by its confidence.

    Attributes:
        thresholds: rising lower ends of the bins, from 0 on.
        tokens: measured ones in each bin.
        agreed: of them, those that the full model chose, too.
        text: what they are of, for people.
    """

    thresholds: tuple[float, ...]
    tokens: tuple[int, ...]
    agreed: tuple[int, ...]
    text: str = ""

    def __post_init__(self) -> None:
        sizes = {len(self.thresholds), len(self.tokens), len(self.agreed)}
        if len(sizes) != 1 or not self.thresholds or any(np.diff(self.thresholds) <= 0):
            raise ValueError("an exit curve needs as many counts as rising thresholds")
        if any(not 0 <= right <= count for right, count in zip(self.agreed, self.tokens, strict=True)):
            raise ValueError("an exit curve has more tokens that agree than there are")

    @classmethod
    def of(cls, confidence: NDArray[np.floating], agreed: NDArray[np.bool_], text: str = "") -> ExitCurve:
        """Count measured tokens ``[tokens]`` into `THRESHOLDS`."""
        bins = np.searchsorted(THRESHOLDS, confidence, side="right") - 1
        size = len(THRESHOLDS)
        tokens, right = np.bincount(bins, minlength=size), np.bincount(bins[agreed], minlength=size)
        return cls(THRESHOLDS, tuple(map(int, tokens)), tuple(map(int, right)), text)

    def threshold(self, agreement: float, risk: float = RISK) -> float | None:
        """The least confidence from which exited tokens keep a promise; None if none does.

        Args:
            agreement: promised share of the exited tokens that the full model would have chosen.
            risk: most probability, over the measured tokens, that the promise does not hold.

        Raises:
            RequestError: one of them is not between 0 and 1.
        """
        for name, value in (("exit agreement", agreement), ("exit risk", risk)):
            if not 0 < value < 1:
                raise RequestError(f"{name} {value:g}: must lie between 0 and 1, as 0.95 does")
        enough = _ENOUGH * math.ceil(math.log(risk) / math.log(agreement))
        found, tokens, agreed = None, 0, 0
        for threshold, count, right in reversed(list(zip(self.thresholds, self.tokens, self.agreed, strict=True))):
            tokens, agreed = tokens + count, agreed + right
            if tokens < enough:
                continue
            if binomial_tail(tokens - agreed, tokens, 1 - agreement) > risk:
                break
            found = threshold
        return found

    def share(self, threshold: float) -> float:
        """Share of the measured tokens that are as sure."""
        sure = sum(count for low, count in zip(self.thresholds, self.tokens, strict=True) if low >= threshold)
        return sure / max(1, sum(self.tokens))


def binomial_tail(events: int, trials: int, chance: float) -> float:
    """Probability of at most so many events in independent trials."""
    logs: Sequence[float] = [
        math.lgamma(trials + 1)
        - math.lgamma(at + 1)
        - math.lgamma(trials - at + 1)
        + at * math.log(chance)
        + (trials - at) * math.log1p(-chance)
        for at in range(events + 1)
    ]
    highest = max(logs)
    return min(1.0, math.exp(highest) * sum(math.exp(each - highest) for each in logs))
