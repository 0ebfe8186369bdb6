"""Signals reach the one who waits for them, and none leaves a service that cannot end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from concurrent.futures import Future

import pytest

from isthmus.devices.background import BackgroundService
from isthmus.devices.signals import Signals


class Idle(BackgroundService):
    def __init__(self) -> None:
        super().__init__("idle service")

    async def _serve(self, started: Future[str]) -> None:
        started.set_result("127.0.0.1:1")
        await self._stopping.wait()


class Ends(Idle):
    async def _serve(self, started: Future[str]) -> None:
        started.set_result("127.0.0.1:1")
        await asyncio.sleep(0.05)


class AlarmError(Exception):
    pass


@pytest.fixture(autouse=True)
def handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_each_signal_is_told_once_in_its_order():
    signals = Signals(signal.SIGINT, signal.SIGTERM)
    with Idle() as service:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert signals.wait(service) == signal.SIGTERM
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert [signals.wait(service) for _ in range(3)] == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]


def test_the_end_of_the_service_ends_the_wait():
    signals = Signals(signal.SIGTERM)
    with Ends() as service:
        assert signals.wait(service) is None


def test_a_handler_may_end_the_service():
    with Idle() as service:
        signal.signal(signal.SIGTERM, lambda *_: service.end())
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert service.wait(20)


def test_exceptions_out_of_handlers_leave_a_service_that_ends():
    """As Ctrl-C does in a program that only calls `wait`."""

    def alarm(*_: object) -> None:
        raise AlarmError

    signal.signal(signal.SIGALRM, alarm)
    delays = random.Random(0)
    for _ in range(60):
        service = Idle()
        service.start()
        with pytest.raises(AlarmError):
            signal.setitimer(signal.ITIMER_REAL, 0.05 + delays.uniform(0, 0.002))
            service.wait()
            time.sleep(1)
        stop = threading.Thread(target=service.stop, daemon=True)
        stop.start()
        stop.join(20)
        assert not stop.is_alive()
