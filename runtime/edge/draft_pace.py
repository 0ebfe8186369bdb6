"""How far to draft: until another draft costs more time than it is expected to save.

A draft saves a round trip if it and all before it are right. The chance of that is the product of the drafts'
chances, each calibrated by how often guesses of its kind were right so far: of an n-gram by the length of its match, of
a trained draft by the probability that it gives to its token. Guesses count whether or not they were sent, so that
drafting that did not pay starts again when it would.

Where the device drafts on while steps are on their way, a draft costs nothing unless it keeps the device busy when an
answer arrives: at most the time of one draft. Until shortly before that, all that may come is drafted. Where the device
drafts first and waits then, every draft delays the answer, and the expected tokens per second decide.

All this holds if drafts take nothing from others. On a short link they may slow the server down, or the device. So what
came of it decides in the end: the time a token takes with drafts and without, each tried now and then, the slower one
less and less often.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

from .controller import RunningMean

DraftSource = Literal["draft", "ngram"]

_WINDOW = 24  # tokens over which a way's time is averaged
_PAUSE, _LONGEST_PAUSE = 96, 2048  # tokens between trials of the slower way
_WORST = 2.0  # times as slow as a way counts at most: a hiccup may have hit its last trial
_LEAST_CHANCE = 0.025  # below, a draft is not worth its energy
_MARGIN = 2.0  # mean deviations before the expected answer, from when on a draft may be in its way
_PRIOR_WEIGHT = 4.0  # guesses that the first expectation counts for
_MEMORY = 64.0  # guesses after which old ones fade
_SHARES = (0.01, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)  # bounds of a trained draft's probabilities
_NGRAM_PRIORS = {1: 0.15, 2: 0.35, 3: 0.5, 4: 0.6, 5: 0.65, 6: 0.75}


class Guess(NamedTuple):
    """A token that is expected at a position.

    Attributes:
        kind: length of an n-gram's match, or class of a trained draft's probability.
        chance: calibrated, that it is right if all before it are.
    """

    token: int
    source: DraftSource
    kind: int
    chance: float


class _Trial:
    """What a token took one way, with drafts or without, and when that is to be tried again."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens  # of one trial
        self.token_s: float | None = None
        self._seen = 0  # tokens that this is the mean of
        self.won = False  # whether it was the faster way since it began
        self.pause = _PAUSE  # tokens until the next one, while the other way is faster
        self.idle = 0  # tokens since the last one

    def add(self, seconds: float, tokens: int) -> None:
        """Take tokens that came this way."""
        self._seen = min(_WINDOW, self._seen + tokens)
        weight = min(1.0, tokens / self._seen)
        token_s = seconds / tokens
        self.token_s = token_s if self.token_s is None else self.token_s + weight * (token_s - self.token_s)
        self.idle = 0

    def begin(self) -> None:
        """Measure anew: what was before the pause may have been a hiccup."""
        self._seen, self.won = 0, False


class DraftPace:
    """What drafts gain and cost on this device, link and text; it outlives a generation.

    Attributes:
        drafting: whether drafts are made at all.
    """

    def __init__(self) -> None:
        self.drafting = False
        self._trials = {False: _Trial(4), True: _Trial(16)}
        self._left = self._trials[False].tokens  # tokens until the way is chosen again
        self._mixed = True  # the next answer tells of both ways
        self._right: dict[tuple[DraftSource, int], tuple[float, float]] = {}  # right, all
        self._answer = RunningMean()
        self._server = RunningMean()
        self._draft: dict[DraftSource, RunningMean] = {"draft": RunningMean(), "ngram": RunningMean()}

    def ngram(self, token: int, length: int) -> Guess:
        """A guess by a match of ``length`` tokens."""
        return Guess(token, "ngram", length, self._chance("ngram", length, _NGRAM_PRIORS[length]))

    def trained(self, token: int, probability: float) -> Guess:
        """A guess by the trained draft."""
        kind = bisect_left(_SHARES, min(probability, 1.0))
        lower = _SHARES[kind - 1] if kind else 0.0
        return Guess(token, "draft", kind, self._chance("draft", kind, (lower + _SHARES[kind]) / 2))

    def learn(self, guess: Guess, right: bool) -> None:
        """Take note of what a guess came to."""
        key = guess.source, guess.kind
        hits, count = self._right.get(key, (0.0, 0.0))
        fade = 1.0 if count < _MEMORY else 1 - 1 / _MEMORY
        self._right[key] = hits * fade + right, count * fade + 1

    def emitted(self, seconds: float, tokens: int) -> None:
        """Take note of tokens that came together, and of the time since the ones before; choose how to go on."""
        trial, other = self._trials[self.drafting], self._trials[not self.drafting]
        if not self._mixed:
            trial.add(seconds, tokens)
        self._mixed = False
        self._left -= tokens
        other.idle += tokens
        if self._left > 0 or trial.token_s is None:
            return
        if other.token_s is None or trial.token_s > other.token_s:
            if other.token_s is not None and not trial.won:  # the trial did not pay: the next one later
                trial.pause = min(2 * trial.pause, _LONGEST_PAUSE)
            self._change()
        elif other.idle >= other.pause * min(_WORST, max(1.0, other.token_s / trial.token_s)):
            other.begin()
            self._change()
        else:
            trial.pause, trial.won, self._left = _PAUSE, True, trial.tokens

    def _change(self) -> None:
        self.drafting = not self.drafting
        self._left, self._mixed = self._trials[self.drafting].tokens, True

    def answered(self, seconds: float, server_s: float) -> None:
        """Take note of a step that was sent while no other was on its way: until its answer, and the server's part."""
        self._answer.add(seconds)
        self._server.add(server_s)

    def drafted(self, source: DraftSource, seconds: float) -> None:
        """Take note of what a draft took: the guess, and the front's run over it."""
        self._draft[source].add(seconds)

    @property
    def server_s(self) -> float:
        """What the server takes for a step: frames need not follow each other faster."""
        return self._server.mean_s

    def pays(self, guess: Guess, before: Sequence[Guess], *, waited_s: float | None) -> bool:
        """Whether drafting ``guess`` after other unanswered ones is expected to save time.

        Args:
            guess: the next one.
            before: guesses on its path that are not answered yet.
            waited_s: since the step was sent whose answer comes next; None if the device drafts first and waits then.
        """
        chances = [each.chance for each in before]
        chance = prod(chances) * guess.chance
        draft_s, answer_s = self._draft[guess.source].mean_s, self._answer.mean_s
        if waited_s is not None:
            in_time = waited_s + draft_s < answer_s - _MARGIN * self._answer.deviation_s
            return chance > (_LEAST_CHANCE if in_time else draft_s / answer_s if answer_s else 1.0)
        expected = 1 + sum(prod(chances[: number + 1]) for number in range(len(chances)))
        seconds = answer_s + sum(self._draft[each.source].mean_s for each in before)
        return chance * seconds > expected * draft_s

    def _chance(self, source: DraftSource, kind: int, prior: float) -> float:
        hits, count = self._right.get((source, kind), (0.0, 0.0))
        return (hits + _PRIOR_WEIGHT * prior) / (count + _PRIOR_WEIGHT)
