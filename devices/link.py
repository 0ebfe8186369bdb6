"""Links between device and server: what they do to bytes, as data.

A link delays by half its round trip each way, passes bits at a rate of its own in each direction, and may vary, lose or
stall. Loss is that of TCP as a program sees it: nothing is missing, but what was lost, and all behind it, comes one
retransmission timeout later. The rate that TCP gives up after a loss is not modelled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import LinkError

SEGMENT_BYTES = 1460  # that TCP puts in one Ethernet packet

_LEAST_TIMEOUT_MS = 200.0  # of retransmission, as Linux has it
_LONGEST_S = 3600.0
_RATES_MBIT_S = 1e-4, 1e6
_HIGHEST_LOSS = 0.5

_DURATIONS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATES = {"bit": 1e-6, "kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}  # a second
_SIZES = {"b": 1, "kb": 1000, "mb": 1_000_000}
_NUMBER_AND_UNIT = re.compile(r"(-?(?:\d+\.?\d*|\.\d+))\s*([a-z%]*)(?:/s)?", re.ASCII)


@dataclass(frozen=True)
class Stall:
    """A time in which nothing passes, as in a tunnel.

    Attributes:
        at_s: seconds until it begins.
        for_s: seconds that it lasts.
        every_s: seconds from one begin to the next; 0 if there is only one.
    """

    at_s: float
    for_s: float
    every_s: float = 0.0

    def __post_init__(self) -> None:
        _between("a stall's begin", self.at_s, 0, _LONGEST_S, "s")
        _between("a stall's length", self.for_s, 1e-3, _LONGEST_S, "s")
        if self.every_s and not self.for_s < self.every_s <= _LONGEST_S:
            raise LinkError(
                f"a stall of {self.for_s:g} s every {self.every_s:g} s: must be shorter than its period, which is at "
                f"most {_LONGEST_S:g} s"
            )

    def release(self, seconds: float) -> float:
        """The first time from ``seconds`` on at which something passes."""
        since = seconds - self.at_s
        if since >= 0 and self.every_s:
            since %= self.every_s
        return seconds + self.for_s - since if 0 <= since < self.for_s else seconds

    @classmethod
    def parse(cls, text: str) -> Stall:
        """Read ``AT,FOR`` or ``AT,FOR,EVERY``, each with its unit, such as ``20s,3s``.

        Raises:
            LinkError: another form, or a value out of range.
        """
        parts = text.split(",")
        if len(parts) not in (2, 3):
            raise LinkError(f"stall {text!r}: must be AT,FOR or AT,FOR,EVERY with units, as in 20s,3s")
        return cls(*(parse_duration_s(part) for part in parts))


@dataclass(frozen=True)
class LinkProfile:
    """A link as the device sees it.

    Attributes:
        rtt_ms: round trip of a small packet, half of it each way.
        up_mbit_s: rate from the device to the server; infinite where it does not count.
        down_mbit_s: rate from the server to the device.
        jitter_ms: each way's delay varies by as much, up and down, uniformly; what is sent first arrives first.
        loss: share of the packets that are lost.
        stall: when nothing passes.
    """

    name: str
    rtt_ms: float = 0.0
    up_mbit_s: float = math.inf
    down_mbit_s: float = math.inf
    jitter_ms: float = 0.0
    loss: float = 0.0
    stall: Stall | None = None

    def __post_init__(self) -> None:
        _between("rtt", self.rtt_ms, 0, 1e3 * _LONGEST_S, "ms")
        for what, rate in (("rate up", self.up_mbit_s), ("rate down", self.down_mbit_s)):
            if rate != math.inf:
                _between(what, rate, *_RATES_MBIT_S, "Mbit/s")
        _between("loss", self.loss, 0, _HIGHEST_LOSS, "of the packets")
        if not 0 <= self.jitter_ms <= self.rtt_ms / 2:
            raise LinkError(
                f"jitter {self.jitter_ms:g} ms: must lie between 0 and the delay of one way, {self.rtt_ms / 2:g} ms, "
                "half of the round trip"
            )

    def rate_mbit_s(self, *, up: bool) -> float:
        """The rate of one direction."""
        return self.up_mbit_s if up else self.down_mbit_s

    def transfer_ms(self, bytes_: float, *, up: bool) -> float:
        """Expected time in ms from the first of so many bytes leaving until the last arrives, one way.

        The sum of the way's delay, the bytes at the link's rate, one timeout if any packet is lost, and the part of
        repeated stalls in the time, as the mean over when it is sent.
        """
        packets = max(1, math.ceil(bytes_ / SEGMENT_BYTES))
        moving = self.rtt_ms / 2 + 8e-3 * bytes_ / self.rate_mbit_s(up=up)
        moving += (1 - (1 - self.loss) ** packets) * retransmission_ms(self.rtt_ms)
        if self.stall is None or not self.stall.every_s:
            return moving
        # One that starts in a stall waits half of it on average; one that moves meets every_s's share of them.
        stalled = self.stall.for_s / self.stall.every_s
        return moving / (1 - stalled) + stalled * 1e3 * self.stall.for_s / 2

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus link --list --json`` prints; an infinite rate is null."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}


def retransmission_ms(rtt_ms: float) -> float:
    """TCP's retransmission timeout at a round trip: what one loss costs."""
    return _LEAST_TIMEOUT_MS + rtt_ms


def link_profile(text: str) -> LinkProfile:
    """Read a link: a preset's name, a description, or a preset with changes.

    For example ``lte``, ``rtt=80ms,rate=10mbit`` or ``wifi,loss=2%``. The keys are ``rtt``, ``rate`` (both ways),
    ``up``, ``down``, ``jitter`` and ``loss``.

    Raises:
        LinkError: no such preset or key, no unit, or a value out of range.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    if "=" in first:
        base, changes = LinkProfile(text), [first, *rest]
    elif first in LINKS:
        base, changes = LINKS[first], rest
    else:
        raise LinkError(
            f"link {first!r}: is no preset; choose one of {', '.join(LINKS)}, or describe it, as in "
            "rtt=80ms,rate=10mbit"
        )
    values: dict[str, float] = {}
    for change in changes:
        key, separator, value = (part.strip() for part in change.partition("="))
        if not separator or key not in _KEYS:
            raise LinkError(f"link {text!r}: {change!r} is none of {'=…, '.join(_KEYS)}=…")
        parse, names = _KEYS[key]
        values |= dict.fromkeys(names, parse(value))
    return replace(base, name=text, **values) if values else base  # type: ignore[arg-type]


def parse_duration_s(text: str) -> float:
    """Seconds of ``80ms``, ``1.5s`` or ``300us``; raises `LinkError` without a unit or below 0."""
    return _parse("duration", text, _DURATIONS_S)


def parse_rate_mbit_s(text: str) -> float:
    """Mbit/s of ``10mbit``, ``200kbit`` or ``1gbit``; raises `LinkError` without a unit or below 0."""
    return _parse("rate", text, _RATES)


def parse_size_bytes(text: str) -> int:
    """Bytes of ``500kB`` or ``2MB`` (powers of ten); raises `LinkError` without a unit or below 0."""
    return round(_parse("size", text, _SIZES))


def parse_share(text: str) -> float:
    """The share that ``2%`` or ``0.02`` is; raises `LinkError` if it is neither or below 0."""
    return _parse("share", text, {"%": 0.01, "": 1.0})


def _parse(what: str, text: str, units: Mapping[str, float]) -> float:
    match = _NUMBER_AND_UNIT.fullmatch(text.strip().lower())
    if match is None or match[2] not in units:
        named = ", ".join(unit for unit in units if unit)
        raise LinkError(
            f"{what} {text!r}: must be a number with its unit, one of {named}, as in 10{named.split(',')[0]}"
        )
    if match[1].startswith("-"):
        raise LinkError(f"{what} {text!r}: must not be negative")
    return float(match[1]) * units[match[2]]


def _between(what: str, value: float, least: float, most: float, unit: str) -> None:
    if not least <= value <= most:
        raise LinkError(f"{what} {value:g} {unit}: must lie between {least:g} and {most:g}")


_KEYS: dict[str, tuple[Callable[[str], float], tuple[str, ...]]] = {
    "rtt": (lambda text: 1e3 * parse_duration_s(text), ("rtt_ms",)),
    "rate": (parse_rate_mbit_s, ("up_mbit_s", "down_mbit_s")),
    "up": (parse_rate_mbit_s, ("up_mbit_s",)),
    "down": (parse_rate_mbit_s, ("down_mbit_s",)),
    "jitter": (lambda text: 1e3 * parse_duration_s(text), ("jitter_ms",)),
    "loss": (parse_share, ("loss",)),
}

# Figures with their sources; where a source has none, the jitter and loss are ours.
LINKS: dict[str, LinkProfile] = {
    link.name: link
    for link in (
        LinkProfile("loopback"),
        # IEEE 802.3ab's rate; the round trip of a switch and two hosts.
        LinkProfile("ethernet", 0.3, 1000, 1000),
        # Rates and delay of the profile "Wi-Fi" in Apple's Network Link Conditioner.
        LinkProfile("wifi", 2, 33, 40, jitter_ms=1),
        # Profile "LTE" of WebPageTest (12 Mbit/s both ways, 70 ms).
        LinkProfile("lte", 70, 12, 12, jitter_ms=10, loss=0.001),
        # 3GPP release 13, Cat-M1, half duplex: 375 kbit/s up, 300 down. The radio takes 10 to 15 ms of the round trip,
        # the operator's network the rest.
        LinkProfile("lte-m", 100, 0.375, 0.3, jitter_ms=20, loss=0.001),
        # 3GPP release 13, Cat-NB1: 62 kbit/s up, 26 down, latency 1.6 to 10 s, of which this is the best case.
        LinkProfile("nb-iot", 1600, 0.062, 0.026, jitter_ms=200, loss=0.005),
        # Geostationary: medians of HughesNet and Viasat in the USA, Speedtest 2021 (19 Mbit/s down, 2.5 to 3 up,
        # 630 to 740 ms).
        LinkProfile("satellite", 650, 2.7, 19, jitter_ms=20, loss=0.005),
        # Ours, no published figure: LTE at the edge of its cells, with a tunnel of 4 s every minute.
        LinkProfile("flaky-train", 120, 2, 5, jitter_ms=40, loss=0.01, stall=Stall(20, 4, 60)),
    )
}
