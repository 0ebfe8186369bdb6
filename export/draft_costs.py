"""What drafts are expected to bring: tokens of a round trip, their time and bytes, from how often drafts are right.

The loop is that with overlap (`isthmus.runtime.edge.drafting`): the device drafts on while it waits, a frame for each
draft, at most so many beyond the last sure token. A draft that is right gives its token as long after the one before as
it was sent after that; where none is, the token costs a round trip. How often drafts are right depends on how many the
wait has time for, and is measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..devices.budget import StoredWeight
from ..quant.opsc import Precision
from .footprint import Footprint

# Measured on the default model's draft: 4 bits everywhere cost 1.6 points of agreement, of which the map's 1.5.
BLOCK_SIZE = 32
MAP, OTHERS = Precision(8, BLOCK_SIZE), Precision(4, BLOCK_SIZE, "mse")

DRAFT_LENGTHS = (1, 2, 4, 6, 8)  # beside 0, none
FRONT_SHARE = 0.168  # of the front's weights that a guess reads, those of the map twice: about a seventh of its time
LEAST_FRONT_BITS = 4  # of the states that a draft is trained on; what it makes of coarser ones was not measured

_LONGEST_RUN = 64  # drafts right after each other, beyond which nothing is counted


def draft_d_ff(footprint: Footprint, split: int, vocabulary: int) -> int:
    """Width of the MLP that makes a draft `FRONT_SHARE` of the front: from a third of the model's to all of it."""
    arch = footprint.arch
    d_model, mlp = arch.d_model, 3 * arch.d_ff * arch.d_model
    layer = footprint.layer_parameters
    left = FRONT_SHARE * split * layer - (layer - mlp) - (2 * d_model + vocabulary) * d_model
    width = min(max(left / (3 * d_model), arch.d_ff / 3), arch.d_ff)
    return -(-round(width) // BLOCK_SIZE) * BLOCK_SIZE


@dataclass(frozen=True)
class Wait:
    """What came of a draft, by the time that the device waits for an answer.

    Attributes:
        drafts: as many could be made in that time.
        wrong: were made between two tokens that were not drafted, and turned out wrong.
        gap: from a right one to the next, in the time of one draft: others are made between them.
        acceptance: chance that a token was drafted in time, by how many were since the last that was not; the last one
            holds for all further ones.
    """

    drafts: float
    wrong: float
    gap: float
    acceptance: tuple[float, ...]

    def reached(self) -> list[float]:
        """Chances of at least 0, 1, … right drafts after each other."""
        chances, chance = [], 1.0
        for right in range(_LONGEST_RUN):
            chances.append(chance)
            chance *= self.acceptance[min(right, len(self.acceptance) - 1)]
        return chances


@dataclass(frozen=True)
class DraftFigures:
    """A trained draft, as far as a plan needs to know it.

    Attributes:
        d_ff: of its layer.
        vocabulary: rows of its head.
        waits: measured, from short to long.
    """

    d_ff: int
    vocabulary: int
    waits: tuple[Wait, ...]

    @classmethod
    def read(cls, path: Path) -> DraftFigures:
        """Read a file of what `benchmarks/drafted_plans.py` measured."""
        data = json.loads(path.read_text(encoding="utf-8"))
        waits = tuple(Wait(**row | {"acceptance": tuple(row["acceptance"])}) for row in data["waits"])
        return cls(data["d_ff"], data["vocabulary"], waits)

    def weights(self, footprint: Footprint) -> tuple[tuple[StoredWeight, ...], tuple[StoredWeight, ...]]:
        """Of its layer, with the map before it, and of its head."""
        d_model = footprint.arch.d_model
        shapes = {
            **footprint.matrices,
            **dict.fromkeys(("gate", "up"), (self.d_ff, d_model)),
            "down": (d_model, self.d_ff),
        }
        layer = [_stored(OTHERS, *shape) for shape in shapes.values()]
        return (*layer, _stored(MAP, d_model, d_model)), (_stored(OTHERS, self.vocabulary, d_model),)

    def drafted(self, times: StepTimes, length: int) -> Drafted:
        """What a token takes with at most ``length`` drafts beyond the last sure token."""
        wait = self._wait(times.answer_ms / times.draft_ms)
        wrong = wait.wrong * length / (length + 1)  # a shorter tree has less room for them
        reached = wait.reached()
        tokens = sum(reached)
        interval_ms = wait.gap * times.draft_ms
        sent = [times.front_ms]  # when the frame leaves whose answer is the first token, the second, …
        came = [0.0, sent[0] + times.answer_ms]
        for number in range(1, _LONGEST_RUN):
            begun = max(sent[-1], came[number - length]) if number > length else sent[-1]
            sent.append(begun + interval_ms)
            came.append(max(sent[-1] + times.answer_ms, came[-1] + times.frame_ms))
        gaps = (later - before for before, later in pairwise(came))
        # Frames of wrong drafts that the link has not yet carried when the next token's is sent behind them.
        queued_ms = max(0.0, wrong * times.frame_ms - max(0.0, times.answer_ms - times.frame_ms))
        cycle_ms = queued_ms + sum(chance * gap for chance, gap in zip(reached, gaps, strict=True))
        return Drafted(cycle_ms / tokens, tokens, (wrong + tokens) / tokens)

    def _wait(self, drafts: float) -> Wait:
        """Between measured ones on the line through them, beyond them as at the last."""
        at = [wait.drafts for wait in self.waits]

        def between(values: Sequence[float]) -> float:
            return float(np.interp(drafts, at, values))

        acceptance = zip(*(wait.acceptance for wait in self.waits), strict=True)
        return Wait(
            drafts,
            between([wait.wrong for wait in self.waits]),
            between([wait.gap for wait in self.waits]),
            tuple(map(between, acceptance)),
        )


class Drafted(NamedTuple):
    """What drafts are expected to bring.

    Attributes:
        ms_per_token: mean over all.
        tokens: for each that waits for a round trip, itself included.
        frames: sent for each token, those of wrong drafts included.
    """

    ms_per_token: float
    tokens: float
    frames: float


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
