"""How many workers there should be: a rule with two thresholds and two patiences."""

from __future__ import annotations

from dataclasses import dataclass

GROW_ABOVE, GROW_AFTER_S = 0.75, 2.0
SHRINK_BELOW, SHRINK_AFTER_S = 0.5, 60.0


@dataclass
class Scaler:
    """Adds a worker when those that there are have been full for a while, takes one away when it has not been needed.

    The load is the mean share of the workers' sessions or KV caches that is taken. Above 0.75 for 2 s, there is one
    worker more; if one worker less would have come to less than 0.5 for 60 s, there is one less. After each change both
    begin to count anew. What makes ``n`` workers grow is above ``0.75 n``, what makes ``n + 1`` shrink below ``0.5 n``:
    a steady load never makes the number swing.

    Args:
        least: workers.
        most: workers.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        self.wanted = self.least
        self._full_since: float | None = None
        self._idle_since: float | None = None

    def observe(self, load: float, workers: int, now: float) -> int:
        """Take note of the load; how many workers there should be.

        Args:
            load: mean of the workers that take sessions, 0 to 1.
            workers: how many they are; while they are not as many as wanted, nothing changes.
            now: seconds of any clock that never goes back.
        """
        full = workers == self.wanted < self.most and load > GROW_ABOVE
        idle = workers == self.wanted > self.least and load * workers < SHRINK_BELOW * (workers - 1)
        self._full_since = (now if self._full_since is None else self._full_since) if full else None
        self._idle_since = (now if self._idle_since is None else self._idle_since) if idle else None
        if self._full_since is not None and now - self._full_since >= GROW_AFTER_S:
            self._change(1)
        elif self._idle_since is not None and now - self._idle_since >= SHRINK_AFTER_S:
            self._change(-1)
        return self.wanted

    def _change(self, by: int) -> None:
        self.wanted += by
        self._full_since = self._idle_since = None
