"""Signals to wait for, rather than exceptions out of nowhere."""

from __future__ import annotations

import contextlib
import queue
import signal
from types import FrameType

from .background import BackgroundService

# Between looks at a service that may have ended. A signal is also seen then if the system gave it to another thread:
# Python's handler runs in the main thread only, once that is awake.
_LOOK_S = 0.5


class Signals:
    """The signals of some kinds that come from now on. To be made in the main thread.

    A handler that raises does so wherever the main thread is: within `threading.Event.wait` it can leave the event's
    lock held, for which the next thread then waits for ever, and within `logging` it is swallowed.
    """

    def __init__(self, *numbers: int) -> None:
        self._came: queue.SimpleQueue[int] = queue.SimpleQueue()  # whose put() may come amid its get()
        for number in numbers:
            signal.signal(number, self._note)

    def wait(self, service: BackgroundService) -> int | None:
        """Block until the next signal, and return its number; None if the service ends by itself."""
        while not service.wait(0):
            with contextlib.suppress(queue.Empty):
                return self._came.get(timeout=_LOOK_S)
        return None

    def _note(self, number: int, _: FrameType | None) -> None:
        self._came.put(number)
