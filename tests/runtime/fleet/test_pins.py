from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.runtime.fleet.pins import PinTable
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.wire.framing import Refusal


def worker() -> Any:
    return SimpleNamespace(pins=set())


def test_a_session_belongs_to_the_device_that_opened_it():
    table, backend = PinTable(ServerLimits()), worker()
    pin = table.reserve(backend, "one", 10)
    table.opened(pin, b"id")
    assert table.attach(b"id", "two") is None
    assert table.attach(b"no", "one") is None
    assert table.attach(b"id", "one") is pin
    assert (table.carried, len(table), backend.pins) == (1, 1, {pin})


def test_a_device_has_its_number_in_the_fleet_as_a_whole():
    table = PinTable(ServerLimits(max_sessions_per_device=2))
    pins = [table.reserve(worker(), "one", 10) for _ in range(2)]
    with pytest.raises(Refusal, match="all 2 sessions of a device"):
        table.reserve(worker(), "one", 10)
    table.reserve(worker(), "two", 10)
    table.free(pins[0])
    table.free(pins[0])  # once is enough
    table.reserve(worker(), "one", 10)
    with pytest.raises(Refusal):
        table.reserve(worker(), "one", 10)
    for _ in range(5):
        table.reserve(worker(), "", 10)  # where nobody is asked for a name, there is no such number


def test_a_session_that_was_not_opened_ends_with_its_stream():
    table, backend = PinTable(ServerLimits()), worker()
    table.detach(table.reserve(backend, "", 10))
    assert (len(table), backend.pins) == (0, set())


def test_a_lease_begins_when_the_last_stream_ends():
    async def scenario() -> None:
        table, backend = PinTable(ServerLimits(lease_s=0.01)), worker()
        pin = table.reserve(backend, "", 10)
        table.opened(pin, b"id")
        assert table.attach(b"id", "") is pin  # a second stream takes it over
        table.detach(pin)
        assert pin.lease is None
        table.detach(pin)
        assert pin.lease is not None
        assert table.attach(b"id", "") is pin
        assert pin.lease is None
        table.detach(pin)
        await asyncio.sleep(1.2)  # the lease, and a margin
        assert (len(table), backend.pins) == (0, set())

    asyncio.run(scenario())
