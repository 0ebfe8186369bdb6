"""What drafts are expected to bring: tokens of a round trip, their time and bytes, from how often drafts are right.

It is that of the loop with overlap (`isthmus.runtime.edge.drafting`): the device drafts on while it waits, a frame for
each draft, at most so many beyond the last sure token. A draft that is right gives its token as long after the one
before as it was sent after that; the first one that is wrong costs a round trip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..devices.budget import StoredWeight
from ..quant.opsc import Precision
from .footprint import Footprint

# Measured on the default model's draft: 4 bits everywhere cost 4 points of agreement, 8 bits everywhere more time.
BLOCK_SIZE = 32
LAYER, HEAD = Precision(8, BLOCK_SIZE), Precision(4, BLOCK_SIZE, "mse")

DRAFT_LENGTHS = (1, 2, 4, 6, 8)  # beside 0, none
LEAST_FRONT_BITS = 4  # of the states that a draft is trained on; what it makes of coarser ones was not measured

_LONGEST_RUN = 64  # drafts right after each other, beyond which nothing is counted


@dataclass(frozen=True)
class DraftFigures:
    """A trained draft, as far as a plan needs to know it.

    Attributes:
        split: whose hidden states it reads.
        d_ff: of its layer.
        vocabulary: rows of its head.
        acceptance: chance that a token was drafted in time, by how many were since the last that was not; the last one
            holds for all further ones.
        worthwhile: drafts that are made in a round trip at most, if it leaves the time; the others are too unlikely.
    """

    split: int
    d_ff: int
    vocabulary: int
    acceptance: tuple[float, ...]
    worthwhile: float

    @classmethod
    def read(cls, path: Path) -> DraftFigures:
        """Read a file of what `benchmarks/drafted_plans.py` measured."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(data["split"], data["d_ff"], data["vocabulary"], tuple(data["acceptance"]), data["worthwhile"])

    def weights(self, footprint: Footprint) -> tuple[tuple[StoredWeight, ...], tuple[StoredWeight, ...]]:
        """Of its layer, with the map before it, and of its head."""
        d_model = footprint.arch.d_model
        shapes = {
            **footprint.matrices,
            **dict.fromkeys(("gate", "up"), (self.d_ff, d_model)),
            "down": (d_model, self.d_ff),
            "map": (d_model, d_model),
        }
        return tuple(_stored(LAYER, *shape) for shape in shapes.values()), (_stored(HEAD, self.vocabulary, d_model),)

    def tokens_per_round_trip(self) -> float:
        """Expected number: the one that ends it, and the drafts that were right before."""
        return sum(self._reached())

    def frames_per_token(self, times: StepTimes) -> float:
        """Expected number, those of wrong drafts included."""
        tokens = self.tokens_per_round_trip()
        return (self._made(times) + tokens) / tokens

    def _made(self, times: StepTimes) -> float:
        """Drafts while the device waits for a round trip."""
        return min(self.worthwhile, times.answer_ms / times.draft_ms)

    def _reached(self) -> list[float]:
        """Chances of at least 0, 1, … right drafts after each other."""
        chances, chance = [], 1.0
        for right in range(_LONGEST_RUN):
            chances.append(chance)
            chance *= self.acceptance[min(right, len(self.acceptance) - 1)]
        return chances

    def cycle_ms(self, times: StepTimes, length: int) -> float:
        """Expected time of a round trip with the right drafts that follow it.

        Args:
            times: of the parts.
            length: most drafts beyond the last sure token.
        """
        sent = [times.front_ms]  # when the frame leaves whose answer is the first token, the second, …
        came = [0.0, sent[0] + times.answer_ms]
        for number in range(1, _LONGEST_RUN):
            begun = max(sent[-1], came[number - length]) if number > length else sent[-1]
            sent.append(begun + times.draft_ms)
            came.append(max(sent[-1] + times.answer_ms, came[-1] + times.frame_ms))
        gaps = (later - before for before, later in pairwise(came))
        # Frames of wrong drafts that the link has not yet carried when the next token's is sent behind them.
        queued_ms = max(0.0, self._made(times) * times.frame_ms - max(0.0, times.answer_ms - times.frame_ms))
        return queued_ms + sum(chance * gap for chance, gap in zip(self._reached(), gaps, strict=True))


class StepTimes(NamedTuple):
    """What the parts of a drafted step take, in ms.

    Attributes:
        front_ms: front and codec for one token.
        draft_ms: the same for a draft, its guess included.
        answer_ms: from a frame that leaves to its answer.
        frame_ms: that frames need at least between them: the link's time for the bytes of one.
    """

    front_ms: float
    draft_ms: float
    answer_ms: float
    frame_ms: float


def _stored(precision: Precision, rows: int, columns: int) -> StoredWeight:
    return StoredWeight(precision.bits, precision.block_size, precision.bytes_for(rows, columns))
