"""Channels: how a link's rate and round trip change over time, and what rate a fading one holds.

A trace is a text file with one line for each change; a line's values hold until the next line's time. Cells are parted
by commas or blanks, ``#`` begins a comment. The columns are time in s (from 0, rising), rate in Mbit/s both ways and
round trip in ms, or those that a first line names, each with its unit::

    time_s  up_mbit_s  down_mbit_s  rtt_ms
    0       10         20           40
    12.5    0.2        1            90

A rate of 0 is an outage.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LinkError
from .link import LinkProfile

_PLAIN_COLUMNS = ("time_s", "rate_mbit_s", "rtt_ms")
_COLUMNS = {
    "time_s": ("time", 1.0),
    "time_ms": ("time", 1e-3),
    "rate_mbit_s": ("rate", 1.0),
    "rate_kbit_s": ("rate", 1e-3),
    "up_mbit_s": ("up", 1.0),
    "up_kbit_s": ("up", 1e-3),
    "down_mbit_s": ("down", 1.0),
    "down_kbit_s": ("down", 1e-3),
    "rtt_ms": ("rtt", 1.0),
    "rtt_s": ("rtt", 1e3),
}
_MOST = {"time": math.inf, "rtt": 3.6e6, "rate": 1e6, "up": 1e6, "down": 1e6}


@dataclass(frozen=True)
class Trace:
    """A link's rates and round trip over time.

    Attributes:
        times_s: when each of the values below begins to hold; the first is 0.
        rtt_ms: round trips.
        up_mbit_s: rates from device to server.
        down_mbit_s: rates from server to device.
        loop: whether the trace begins anew at its last time, whose values are then not used; otherwise they hold for
            ever.

    Raises:
        LinkError: times that do not rise from 0, a value out of range, or a rate of 0 that never ends.
    """

    times_s: tuple[float, ...]
    rtt_ms: tuple[float, ...]
    up_mbit_s: tuple[float, ...]
    down_mbit_s: tuple[float, ...]
    loop: bool = False

    def __post_init__(self) -> None:
        if not self.times_s or self.times_s[0] != 0:
            raise LinkError(
                f"a trace that begins at {', '.join(map(str, self.times_s[:1])) or 'no time'}: must begin at 0 s"
            )
        for before, after in zip(self.times_s, self.times_s[1:], strict=False):
            if not before < after < math.inf:
                raise LinkError(f"a trace with {after:g} s after {before:g} s: times must rise")
        if self.loop and len(self.times_s) < 2:
            raise LinkError("a trace of one line cannot loop: its last line is where it begins anew; add one")
        for rates in (self.up_mbit_s, self.down_mbit_s):
            if not (any(rates[:-1]) if self.loop else rates[-1] > 0):
                raise LinkError("a trace whose rate stays 0: nothing would pass any more; end it with a rate above 0")

    @classmethod
    def steady(cls, link: LinkProfile) -> Trace:
        """The trace of a link that does not change."""
        return cls((0.0,), (link.rtt_ms,), (link.up_mbit_s,), (link.down_mbit_s,))

    @classmethod
    def read(cls, path: Path, *, loop: bool = False) -> Trace:
        """Read a file of the module's form.

        Raises:
            LinkError: it cannot be read, a line has another form, or its values break the rules of `Trace`.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LinkError(f"trace {path}: cannot be read ({error})") from error
        rows = [
            (number, cells)
            for number, line in enumerate(text.splitlines(), 1)
            if (cells := line.partition("#")[0].replace(",", " ").split())
        ]
        names: Sequence[str] = _PLAIN_COLUMNS
        if rows and not _is_number(rows[0][1][0]):
            names = [cell.lower() for cell in rows.pop(0)[1]]
        kinds = [_COLUMNS[name][0] for name in names if name in _COLUMNS]
        if sorted(kinds) not in (["rate", "rtt", "time"], ["down", "rtt", "time", "up"]) or len(kinds) != len(names):
            raise LinkError(
                f"trace {path}: columns {', '.join(names)}; must be a time, a rate or both up and down, and rtt, each "
                f"once and with its unit: {', '.join(_COLUMNS)}"
            )
        columns: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number, cells in rows:
            if len(cells) != len(names):
                raise LinkError(f"trace {path}, line {number}: {len(cells)} values for {len(names)} columns")
            for name, cell in zip(names, cells, strict=True):
                kind, unit = _COLUMNS[name]
                value = float(cell) * unit if _is_number(cell) else math.nan
                if not 0 <= value <= _MOST[kind]:
                    raise LinkError(
                        f"trace {path}, line {number}: {name} {cell!r} must be a number from 0 to "
                        f"{_MOST[kind] / unit:g}"
                    )
                columns[kind].append(value)
        both = columns.get("rate", [])
        try:
            return cls(
                tuple(columns["time"]),
                tuple(columns["rtt"]),
                tuple(columns.get("up", both)),
                tuple(columns.get("down", both)),
                loop,
            )
        except LinkError as error:
            raise LinkError(f"trace {path}: {error}") from error

    def rtt_ms_at(self, seconds: float) -> float:
        """The round trip in ms at a time."""
        return self.rtt_ms[self._at(seconds)[0]]

    def rate_mbit_s_at(self, seconds: float, *, up: bool) -> float:
        """The rate of one direction in Mbit/s at a time."""
        return (self.up_mbit_s if up else self.down_mbit_s)[self._at(seconds)[0]]

    def sent_s(self, start_s: float, bytes_: int, *, up: bool) -> float:
        """When the last of so many bytes has left, if the first leaves at ``start_s``."""
        rates = self.up_mbit_s if up else self.down_mbit_s
        bits, now = 8e-6 * bytes_, start_s  # in Mbit
        line, ends = self._at(start_s)
        while True:
            if rates[line] == math.inf:
                return now
            if rates[line] and (sent := now + bits / rates[line]) <= ends:
                return sent
            bits = max(0.0, bits - rates[line] * (ends - now))
            now, line = ends, line + 1
            if self.loop and line == len(self.times_s) - 1:
                line = 0
            ends = now + self._length(line)

    def _length(self, line: int) -> float:
        return self.times_s[line + 1] - self.times_s[line] if line + 1 < len(self.times_s) else math.inf

    def _at(self, seconds: float) -> tuple[int, float]:
        """The line that holds at a time, and when it ends."""
        begun = seconds // self.times_s[-1] * self.times_s[-1] if self.loop else 0.0
        line = min(bisect_right(self.times_s, seconds - begun) - 1, len(self.times_s) - (2 if self.loop else 1))
        line = max(0, line)
        return line, begun + self.times_s[line] + self._length(line)


def outage_rate_mbit_s(bandwidth_mhz: float, snr_db: float, outage: float) -> float:
    """The rate in Mbit/s that a Rayleigh block-fading channel fails to carry with probability ``outage``.

    ``R = BW * log2(1 + SNR * ln(1 / (1 - outage)))``: the channel's power gain is exponential with mean 1 and stays the
    same for one block, so that the block's capacity ``BW * log2(1 + SNR * gain)`` lies below ``R`` in that share of the
    blocks. It is the rate of the latency constraint in *Adaptive Split Computing* (arXiv 2511.04002), here in its usual
    form; the paper's own could not be read.

    Args:
        bandwidth_mhz: of the channel.
        snr_db: mean ratio of signal to noise.
        outage: share of blocks that may fail, above 0 and below 1.

    Raises:
        LinkError: an argument out of range.
    """
    if not 0 < bandwidth_mhz < math.inf or not abs(snr_db) <= 100:
        raise LinkError(
            f"{bandwidth_mhz:g} MHz at {snr_db:g} dB: a bandwidth above 0 and a ratio within 100 dB are needed"
        )
    if not 0 < outage < 1:
        raise LinkError(f"outage {outage:g}: must lie between 0 and 1, as the share of blocks that may fail")
    return bandwidth_mhz * math.log2(1 - 10 ** (snr_db / 10) * math.log1p(-outage))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
