"""How many frames a second each device may send."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

BURST_S = 1.0  # of frames that may come at once: a prompt's, or drafts


class FrameRate:
    """A bucket of tokens for each device, as the generic cell rate algorithm (ITU-T I.371) keeps it: by one time.

    Nothing is refused: a frame too many waits for its turn, and what lies behind it stays in the network, where
    HTTP/2's flow control holds the device back. So a running generation becomes slower and does not end.

    Args:
        per_second: frames of one device.
        clock: gives seconds.

    Attributes:
        held: frames that had to wait so far.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = monotonic) -> None:
        self._interval = 1.0 / per_second
        self._clock = clock
        self._due: dict[str, float] = {}  # when the bucket of a device will be full again
        self.held = 0

    def wait(self, device: str) -> float:
        """Take note of a device's frame; seconds until it may be looked at."""
        now = self._clock()
        due = max(self._due.get(device, now), now)
        self._due[device] = due + self._interval
        delay = max(0.0, due + self._interval - now - max(BURST_S, self._interval))
        self.held += delay > 0
        return delay
