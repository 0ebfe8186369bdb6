"""A service on an event loop of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from ..errors import LinkError

_LOOK_S = 0.05  # between looks at whether the service has ended, for those who wait for that


class BackgroundService(ABC):
    """Listens from `start` to `stop`, and between the ends of a ``with``.

    Args:
        name: of what it is, for errors and its thread.
        loop_factory: makes its event loop; by default asyncio's own.
    """

    def __init__(self, name: str, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        self._name, self._loop_factory = name, loop_factory
        self._address: str | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._ended = threading.Event()

    @abstractmethod
    async def _serve(self, started: Future[str]) -> None:
        """Listen, give ``started`` the address, and serve until ``_stopping`` is set."""

    @property
    def address(self) -> str:
        """``HOST:PORT`` as bound; raises `LinkError` before `start`."""
        if self._address is None:
            raise LinkError(f"the {self._name} has no address before start(); call that first")
        return self._address

    def start(self) -> str:
        """Listen, and return the address; the service then runs until `stop`.

        Raises:
            LinkError: it runs already, or cannot be started.
        """
        if self._thread is not None:
            raise LinkError(f"the {self._name} was started already, on {self._address}")
        started: Future[str] = Future()
        self._stopping = asyncio.Event()
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, args=(started,), name=f"isthmus-{self._name}", daemon=True)
        self._thread.start()
        try:
            self._address = started.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise
        return self._address

    def end(self) -> None:
        """Have the service end soon. Returns at once, and may be called by a signal's handler."""
        self._call(self._stopping.set)

    def stop(self) -> None:
        """End the service, which closes what is open. Safe twice."""
        thread = self._thread
        if thread is None:
            return
        self.end()
        thread.join()
        self._thread = None

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the service has ended, or ``timeout`` seconds; whether it has."""
        # Not by the event's own wait(): Ctrl-C amid that can leave its lock held, and the service never ends.
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self._ended.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_LOOK_S, left))
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _call(self, function: Callable[[], Any]) -> None:
        """Have the loop call something, unless it has ended."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed already
                self._loop.call_soon_threadsafe(function)

    def _run(self, started: Future[str]) -> None:
        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                self._loop = runner.get_loop()
                runner.run(self._serve(started))
        except BaseException as error:
            # Before the start it is the caller's; afterwards the thread's own report is all there is.
            if started.done():
                raise
            started.set_exception(error)
        finally:
            self._ended.set()
