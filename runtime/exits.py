"""How sure a draft must be of its token for the device to take it: a promise kept with a stated risk.

Source: Learn then Test (arXiv 2110.01052), fixed-sequence testing. The promise is about all tokens of a generation: at
least so many are what the full model would have chosen after the same ids; the server's are so by themselves. For each
threshold the null hypothesis is that it is not kept; its p-value is the binomial tail, which is where the
Clopper-Pearson bound ends. Thresholds are tested from the highest down, and the last one that is rejected before the
first that is not is taken: with a probability of at least ``1 - risk`` over the measured texts it keeps the promise.

Ours: tokens of one text depend on each other, where the bound takes them as independent. So the counts are divided by
the design effect of cluster sampling (Kish), the variance between whole texts over that of independent tokens. That
makes the bound an approximation; docs/results/exits.md measures how often it fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

RISK = 0.05
# Lower ends of the bins of confidence, the draft's probability of its likeliest token.
THRESHOLDS = tuple(round(0.02 * at, 2) for at in range(48)) + tuple(round(0.96 + 0.002 * at, 3) for at in range(20))
_FEW = 20  # wrong tokens, of which no variance is estimated


@dataclass(frozen=True)
class ExitCurve:
    """How often a draft agreed with the full model on held-out text, by its confidence.

    Attributes:
        thresholds: rising lower ends of the bins, from 0 on.
        tokens: measured ones in each bin.
        agreed: of them, those that the full model chose, too.
        dependence: as how many tokens of one text an independent one counts, at least 1.
        text: what they are of, for people.
    """

    thresholds: tuple[float, ...]
    tokens: tuple[int, ...]
    agreed: tuple[int, ...]
    dependence: float = 1.0
    text: str = ""

    def __post_init__(self) -> None:
        sizes = {len(self.thresholds), len(self.tokens), len(self.agreed)}
        if len(sizes) != 1 or not self.thresholds or any(np.diff(self.thresholds) <= 0):
            raise ValueError("an exit curve needs as many counts as rising thresholds")
        if any(not 0 <= right <= count for right, count in zip(self.agreed, self.tokens, strict=True)):
            raise ValueError("an exit curve has more tokens that agree than there are")
        if not self.dependence >= 1:
            raise ValueError(f"an exit curve has a dependence of {self.dependence}, which is at least 1")

    @classmethod
    def of(cls, texts: Sequence[tuple[NDArray[np.floating], NDArray[np.bool_]]], text: str = "") -> ExitCurve:
        """Count measured tokens into `THRESHOLDS`: of each text confidence and agreement, ``[tokens]``."""
        size = len(THRESHOLDS)
        tokens, right = np.zeros((2, len(texts), size), np.int64)
        for row, (confidence, agreed) in enumerate(texts):
            bins = np.searchsorted(THRESHOLDS, confidence, side="right") - 1
            tokens[row], right[row] = np.bincount(bins, minlength=size), np.bincount(bins[agreed], minlength=size)
        wrong = (tokens - right)[:, ::-1].cumsum(axis=1)  # of the tokens from each threshold on, the highest first
        lengths = tokens.sum(axis=1)
        effect = max([1.0, *(_design_effect(each, lengths) for each in wrong.T if each.sum() >= _FEW)])
        counted, confirmed = (tuple(map(int, counts.sum(axis=0))) for counts in (tokens, right))
        return cls(THRESHOLDS, counted, confirmed, effect, text)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExitCurve:
        """Read its JSON form; raises `ValueError` and other errors of what is not one."""
        tokens, agreed = (tuple(map(int, data[name])) for name in ("tokens", "agreed"))
        thresholds = tuple(map(float, data["thresholds"]))
        return cls(thresholds, tokens, agreed, float(data["dependence"]), str(data["text"]))

    def threshold(self, agreement: float, risk: float = RISK) -> float | None:
        """The least confidence from which exited tokens keep a promise; None if none does.

        Args:
            agreement: promised share of all tokens, exited or not, that the full model would have chosen.
            risk: most probability, over the measured texts, that the promise does not hold.

        Raises:
            RequestError: one of them is not between 0 and 1.
        """
        for name, value in (("exit agreement", agreement), ("exit risk", risk)):
            if not 0 < value < 1:
                raise RequestError(f"{name} {value:g}: must lie between 0 and 1, as 0.95 does")
        trials = math.floor(sum(self.tokens) / self.dependence)
        found, wrong = None, 0
        for threshold, count, right in reversed(list(zip(self.thresholds, self.tokens, self.agreed, strict=True))):
            wrong += count - right
            if binomial_tail(min(trials, math.ceil(wrong / self.dependence)), trials, 1 - agreement) > risk:
                break
            found = threshold
        return found

    def share(self, threshold: float) -> float:
        """Share of the measured tokens that are as sure."""
        sure = sum(count for low, count in zip(self.thresholds, self.tokens, strict=True) if low >= threshold)
        return sure / max(1, sum(self.tokens))


def _design_effect(events: NDArray[np.int64], lengths: NDArray[np.int64]) -> float:
    """Variance of a ratio over whole texts (its linearisation), over that of as many independent tokens."""
    total, texts = int(lengths.sum()), len(lengths)
    rate = events.sum() / total
    if texts < 2 or rate == 1:
        return 1.0
    between = ((events - rate * lengths) ** 2).sum() * texts / (texts - 1) / total**2
    return float(between / (rate * (1 - rate) / total))


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
