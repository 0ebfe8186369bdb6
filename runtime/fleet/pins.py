"""Which session lives on which worker, and whose it is."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..server.limits import ServerLimits
from ..wire.framing import Refusal

if TYPE_CHECKING:
    from .fleet import Backend

# A worker forgets a session when its lease has ended; the front does so a little later, never before.
_LEASE_MARGIN_S = 1.0


@dataclass(eq=False)
class Pin:
    """A session's place.

    Attributes:
        backend: the worker that has it.
        owner: identity of the device that opened it.
        kv_bytes: that it has reserved.
        id: that its worker gave it; nothing before it did.
        carriers: streams that carry it: two for a moment, when a new one takes it over.
    """

    backend: Backend
    owner: str
    kv_bytes: int
    id: bytes = b""
    carriers: int = 1
    lease: asyncio.TimerHandle | None = None


class PinTable:
    """All sessions of the fleet. Used on the event loop.

    Args:
        limits: of a worker; those of a device hold for the fleet as a whole.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._pins: dict[bytes, Pin] = {}
        self._owned: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._owned.total()

    @property
    def carried(self) -> int:
        """Sessions that a stream carries."""
        return sum(pin.carriers > 0 for pin in self._pins.values())

    def reserve(self, backend: Backend, owner: str, kv_bytes: int) -> Pin:
        """Take a place for a session that is about to be opened.

        Raises:
            Refusal: its device has as many sessions as one may have.
        """
        most = self._limits.max_sessions_per_device
        if owner and self._owned[owner] >= most:
            raise Refusal(
                "SERVER_FULL",
                f"all {most} sessions of a device are taken; end one of them",
                retry_after_ms=round(1000 * self._limits.retry_after_s),
            )
        pin = Pin(backend, owner, kv_bytes)
        backend.pins.add(pin)
        self._owned[owner] += 1
        return pin

    def opened(self, pin: Pin, session_id: bytes) -> None:
        """Its worker has made the session."""
        pin.id = session_id
        self._pins[session_id] = pin

    def attach(self, session_id: bytes, owner: str) -> Pin | None:
        """Have one more stream carry a session; None if there is none, or it is another device's."""
        pin = self._pins.get(session_id)
        if pin is None or pin.owner != owner:
            return None
        if pin.lease is not None:
            pin.lease.cancel()
            pin.lease = None
        pin.carriers += 1
        return pin

    def detach(self, pin: Pin) -> None:
        """A stream carries it no more; after the last one its lease begins."""
        pin.carriers -= 1
        if not pin.id:
            self.free(pin)
        elif not pin.carriers and self._pins.get(pin.id) is pin:
            delay = self._limits.lease_s + _LEASE_MARGIN_S
            pin.lease = asyncio.get_running_loop().call_later(delay, self.free, pin)

    def free(self, pin: Pin) -> None:
        """The session has ended; nothing happens the second time."""
        if pin not in pin.backend.pins:
            return
        pin.backend.pins.remove(pin)
        self._pins.pop(pin.id, None)
        self._owned[pin.owner] -= 1
        if not self._owned[pin.owner]:
            del self._owned[pin.owner]
        if pin.lease is not None:
            pin.lease.cancel()
