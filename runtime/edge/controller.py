"""The controller: chooses each frame's codec level, and bounds the drafts, so that a token keeps its deadline.

A token's time is the device's part, the server's part and the link's: a delay and a time for each byte. The first two
are running means. The link's two numbers come from a Kalman filter over the frames' sizes and times (recursive least
squares with a slow random walk), which tells delay and rate apart by the sizes that differ: those of the prompt's
frames, of other levels, of one token and the next. One time that surprises is taken for a hiccup and hardly counts; a
second one in a row is a change of the link, which is then learned anew, as a change of rate rather than of delay.

A level is held to take its predicted time and `MARGIN` mean deviations, like TCP's timeout (Jacobson 1988). Above the
deadline the level goes down at once, as far as needed; where no level keeps the deadline, as far as that makes tokens
clearly faster, or late ones rarer. It goes up only after a finer one was predicted to hold for `HOLD` tokens in a row,
and if that soon proves wrong, it waits twice as long the next time: it does not oscillate.

Drafts give way after the level: at the level that was chosen, so many frames may follow one as the link carries before
the next is due, or later if the deadline allows. What is left is the device's exit, see `isthmus.runtime.edge.timely`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RequestError
from ...quant.codec import Codec

logger = logging.getLogger(__name__)

MARGIN = 2.5  # mean deviations above the predicted time; two standard deviations of a normal one
HOLD = 16  # tokens
_LONGEST_HOLD = 512
_HEADROOM = 0.03  # of the deadline, that a finer level must leave besides
_SAVING = 0.02  # of the deadline, that a coarser level must save if it does not keep it
_RISK = 0.02  # by which a coarser level must lessen the chance of a late token then, else

_SURPRISE = 4.0  # standard deviations
_FIRST_DELAY_S, _FIRST_S_PER_BYTE = 1.0, 1e-4  # standard deviations before the first frame: 80 kbit/s
_DRIFT = 0.1  # of the mean deviation, by which delay and bytes' time may change from token to token
_RATE_SPREAD = 0.1  # of a frame's time on the link, by which it varies
_LEAST_DEVIATION_S = 2e-4
_SIZE_WEIGHT = 1 / 16
_SIZE_SPREAD = 2.0  # most that one frame's size counts for or against the expected one
_SAMPLES = 4  # frames whose size is measured at every level: the first token of a text may be unlike all others
_FRAME_BYTES = 24  # of a step beside its payload
_PACKET_BYTES = 90  # of TLS, HTTP/2, TCP and IP around it
_MORE_ROOM = 1.25  # than for more drafts, before there are more
_DRAFT_LIMITS = (0, 1, 2, 4, 8, 24)  # few, so that it does not change with every token


class LevelChange(NamedTuple):
    """One change of the level.

    Attributes:
        token: number of the first token that was sent at the new level, from 0.
        level: the new one.
        before: the one before.
        reason: with the controller's estimates, for a person to read.
    """

    token: int
    level: int
    before: int
    reason: str


class RunningMean:
    """A running mean and mean deviation, in seconds, that one outlier hardly moves."""

    def __init__(self) -> None:
        self.mean_s = 0.0
        self.deviation_s = 0.0
        self._count = 0

    def add(self, seconds: float) -> None:
        """Take a value."""
        self._count += 1
        if self._count == 1:
            self.mean_s = seconds
            return
        limit = max(4 * self.deviation_s, 0.1 * abs(self.mean_s), _LEAST_DEVIATION_S)
        error = min(max(seconds - self.mean_s, -limit), limit)
        self.mean_s += error / min(self._count, 8)
        self.deviation_s += (abs(error) - self.deviation_s) / min(self._count, 8)


class LinkEstimator:
    """A link's delay and time per byte, from sizes and times of what crossed it.

    Attributes:
        delay_s: round trip of an empty frame.
        s_per_byte: of a frame's bytes.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.s_per_byte = 0.0
        self._covariance = np.diag([_FIRST_DELAY_S**2, _FIRST_S_PER_BYTE**2])
        self._deviation_s = _LEAST_DEVIATION_S
        self._surprise = 0  # sign of the last time, if it was one
        self._count = 0

    def seconds(self, bytes_: float) -> float:
        """Expected time of so many bytes."""
        return self.delay_s + self.s_per_byte * bytes_

    def observe(self, bytes_: int, seconds: float) -> None:
        """Learn from one frame."""
        self._count += 1
        sizes = np.array([1.0, bytes_])
        drift = _DRIFT * self._deviation_s
        self._covariance += np.diag([drift**2, (drift / bytes_) ** 2])
        error = seconds - self.seconds(bytes_)
        noise = (1.25 * self._deviation_s) ** 2 + (_RATE_SPREAD * self.s_per_byte * bytes_) ** 2
        spread = float(np.sqrt(sizes @ self._covariance @ sizes + noise))
        before, self._surprise = self._surprise, 0
        if abs(error) > _SURPRISE * spread:
            sign = 1 if error > 0 else -1
            if before == sign:
                # The rate has changed, or, half as likely, the delay.
                self._covariance += np.diag([(error / 2) ** 2, (error / bytes_) ** 2])
            else:
                self._surprise = sign
                error = sign * spread
        self._update(sizes, error, noise)
        if self._count > 2:  # two frames fit any delay and rate
            self._deviation_s += (min(abs(error), _SURPRISE * spread) - self._deviation_s) / 8
            self._deviation_s = max(self._deviation_s, _LEAST_DEVIATION_S)

    def _update(self, sizes: NDArray[np.float64], error: float, noise: float) -> None:
        along = self._covariance @ sizes
        gain = along / (sizes @ along + noise)
        self.delay_s += float(gain[0]) * error
        self.s_per_byte += float(gain[1]) * error
        self._covariance -= np.outer(gain, along)
        # Neither is negative; what one has too little of, the other has too much.
        if self.s_per_byte < 0:
            self.delay_s += self.s_per_byte * float(sizes[1])
            self.s_per_byte = 0.0
        if self.delay_s < 0:
            self.s_per_byte = max(0.0, self.s_per_byte + self.delay_s / float(sizes[1]))
            self.delay_s = 0.0


class Controller:
    """Chooses the level of the next frame; it sees sizes and times, and no clock.

    Args:
        deadline_s: for each token but the first.
        level: of the first frame.
        levels: how many there are, from 0, the finest.
        reserve_s: of the deadline, by which answers have to come before it.

    Attributes:
        level: of the next frame.
        drafts: most that may be on the way behind a frame.
        least_drafts: the smallest number that was so far, None if there was no bound.
        changes: of the level so far.

    Raises:
        RequestError: a deadline that is not positive, or a level that is none.
    """

    def __init__(self, deadline_s: float, *, level: int, levels: int, reserve_s: float = 0.0) -> None:
        if not reserve_s < deadline_s < math.inf:
            raise RequestError(f"deadline {1e3 * deadline_s:g} ms: must be above {1e3 * reserve_s:g}")
        if not 0 <= level < levels:
            raise RequestError(f"level {level}: must lie between 0 and {levels - 1}")
        self.deadline_s = deadline_s
        self._answer_by_s = deadline_s - reserve_s
        self.level = level
        self.drafts = _DRAFT_LIMITS[-1]
        self.least_drafts: int | None = None
        self.changes: list[LevelChange] = []
        self.link = LinkEstimator()
        self._device, self._server, self._residual = RunningMean(), RunningMean(), RunningMean()
        self._sizes = np.ones(levels)
        self._tokens = 0
        self._held = 0  # tokens for which a finer level was predicted to hold
        self._held_level = 0  # the finest that was for all of them
        self._hold = HOLD
        self._finer_at: int | None = None  # token of the last change to a finer level

    def expect(self, sizes: ArrayLike) -> None:
        """Learn how many bytes one token's payload takes at each level."""
        self._sizes = np.asarray(sizes, np.float64) + _FRAME_BYTES

    def predicted_s(self, level: int) -> float:
        """Expected time of a token at a level."""
        return self._device.mean_s + self._server.mean_s + self.link.seconds(float(self._sizes[level]))

    def observe(
        self,
        *,
        bytes_up: int,
        device_s: float,
        server_s: float,
        link_s: float,
        prompt: bool = False,
        alone: bool = True,
    ) -> None:
        """Learn from a token, and choose the next frame's level.

        Args:
            bytes_up: of its frame, or of all the prompt's.
            device_s: front and codec.
            server_s: queue, codec, back and sampling.
            link_s: the rest of the time until the token.
            prompt: whether it is the first token: its frames tell of the link, its other times of no other token.
            alone: whether the frame held one position, at the present level; others are not what is predicted.
        """
        expected_s = self.predicted_s(self.level)
        if not prompt:
            self._device.add(device_s)
            self._server.add(server_s)
        if not prompt and alone:
            if self._tokens > 1:  # before, the expectation knows neither device nor server
                self._residual.add(device_s + server_s + link_s - expected_s)
            ratio = float(np.clip(bytes_up / self._sizes[self.level], 1 / _SIZE_SPREAD, _SIZE_SPREAD))
            self._sizes *= 1 + _SIZE_WEIGHT * (ratio - 1)
        self.link.observe(bytes_up, max(0.0, link_s))
        self._tokens += 1
        if not prompt:
            self._choose()
            self._bound_drafts()

    def _late(self, level: int) -> float:
        """Chance that a token is late at a level, its time normally distributed."""
        spread_s = max(1.25 * self._residual.deviation_s, _LEAST_DEVIATION_S)
        return 0.5 * math.erfc((self._answer_by_s - self.predicted_s(level)) / (math.sqrt(2) * spread_s))

    def _choose(self) -> None:
        margin_s = MARGIN * self._residual.deviation_s
        times = [self.predicted_s(level) + margin_s for level in range(len(self._sizes))]
        least = self._late(len(times) - 1)

        def holds(level: int, room_s: float, share: float = 1.0) -> bool:
            # Where no level keeps the deadline, one that saves hardly anything is not worth its errors.
            saves_little = times[level] <= times[-1] + share * _SAVING * self._answer_by_s
            return times[level] <= room_s or (saves_little and self._late(level) <= least + share * _RISK)

        if not holds(self.level, self._answer_by_s):
            self._held = 0
            early = self._finer_at is not None and self._tokens - self._finer_at < 2 * self._hold
            self._hold = min(2 * self._hold, _LONGEST_HOLD) if early else HOLD
            level = next(level for level in range(self.level + 1, len(times)) if holds(level, self._answer_by_s))
            self._change(level, times[self.level])
            return
        room_s = (1 - _HEADROOM) * self._answer_by_s
        finer = [level for level in range(self.level) if holds(level, room_s, 0.5)]
        if not finer:
            self._held = 0
            return
        self._held_level = max(self._held_level, finer[0]) if self._held else finer[0]
        self._held += 1
        if self._held >= self._hold:
            self._finer_at = self._tokens
            self._held = 0
            self._change(self._held_level, times[self._held_level])

    def _bound_drafts(self) -> None:
        """Let so many frames follow one as the link carries before the next, or after it within the deadline."""
        frame_s = self.link.s_per_byte * (float(self._sizes[self.level]) + _PACKET_BYTES)
        token_s = self.predicted_s(self.level)
        slack_s = max(0.0, self._answer_by_s - token_s - MARGIN * self._residual.deviation_s)
        room = (token_s - self._device.mean_s - frame_s + slack_s) / max(frame_s, 1e-9)
        fitting = [max(limit for limit in _DRAFT_LIMITS if limit <= max(each, 0)) for each in (room, room / _MORE_ROOM)]
        drafts = min(fitting[0], max(fitting[1], self.drafts))
        if drafts != self.drafts:
            logger.info("token %d: at most %d drafts on the way after %d", self._tokens, drafts, self.drafts)
            self.least_drafts = min(drafts, self.drafts if self.least_drafts is None else self.least_drafts)
        self.drafts = drafts

    def _change(self, level: int, seconds: float) -> None:
        what = "would take" if level < self.level else "takes"
        rate = f"{8e-6 / self.link.s_per_byte:.3g} Mbit/s" if self.link.s_per_byte > 8e-12 else "no limit of rate"
        reason = (
            f"level {min(level, self.level)} {what} up to {1e3 * seconds:.0f} ms of {1e3 * self.deadline_s:.0f}: link "
            f"{1e3 * self.link.delay_s:.0f} ms and {rate}, device {1e3 * self._device.mean_s:.0f} ms, server "
            f"{1e3 * self._server.mean_s:.0f} ms"
        )
        logger.info("token %d: level %d after %d: %s", self._tokens, level, self.level, reason)
        self.changes.append(LevelChange(self._tokens, level, self.level, reason))
        self.level = level


class PacedCodec:
    """A codec at the level that a controller chooses, frame by frame; a payload says itself which it is.

    Args:
        codecs: one codec at each of its levels, from the finest.
        controller: what chooses.
    """

    def __init__(self, codecs: Sequence[Codec], controller: Controller) -> None:
        self._codecs = codecs
        self._controller = controller
        self._sizes: list[list[int]] = []

    @property
    def name(self) -> str:
        """The codec's name, as the handshake carries it."""
        return self._codecs[0].name

    def encode(self, hidden: NDArray[np.float32], token_ids: Sequence[int] = ()) -> bytes:
        """Encode at the controller's level; of the first frames, tell it what the last token takes at every level."""
        if len(self._sizes) < _SAMPLES:
            last = hidden[-1:], token_ids[-1:]
            self._sizes.append([len(codec.encode(*last)) for codec in self._codecs])
            self._controller.expect(np.median(self._sizes, axis=0))
        return self._codecs[self._controller.level].encode(hidden, token_ids)

    def decode(self, payload: bytes, tokens: int, d_model: int) -> NDArray[np.float32]:
        """Decode a payload of any level."""
        return self._codecs[0].decode(payload, tokens, d_model)
