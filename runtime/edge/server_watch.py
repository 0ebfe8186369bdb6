"""Whether a server that was lost grants sessions again, found out while the device goes on alone."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from ...errors import LinkError
from .remote_session import passes

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0

logger = logging.getLogger(__name__)


class ServerWatch:
    """Tries in a thread of its own, with growing pauses, until a trial succeeds or none ever will.

    Args:
        trial: opens a session and ends it; raises `LinkError`.
        losses: before this one; each doubles the first pause.
    """

    def __init__(self, trial: Callable[[], None], losses: int) -> None:
        self._trial = trial
        self._found, self._stopped = threading.Event(), threading.Event()
        threading.Thread(target=self._run, args=(losses,), name="isthmus-server-watch", daemon=True).start()

    @property
    def found(self) -> bool:
        """Whether a trial has succeeded."""
        return self._found.is_set()

    def stop(self) -> None:
        """Begin no further trial; does not wait for one that runs."""
        self._stopped.set()

    def _run(self, doublings: int) -> None:
        while not self._stopped.wait(_pause_s(doublings)):
            try:
                self._trial()
            except LinkError as error:
                if not passes(error):
                    logger.warning("%s; the device stays alone", str(error))
                    return
                logger.info("%s; trying again", str(error))
                doublings += 1
            else:
                self._found.set()
                return


def _pause_s(doublings: int) -> float:
    """Jittered, so that the devices of a server do not come back together."""
    return min(FIRST_PAUSE_S * 2**doublings, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
