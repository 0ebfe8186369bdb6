from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.devices.channel import Trace, outage_rate_mbit_s
from isthmus.devices.link import LinkProfile
from isthmus.errors import LinkError

FALLING = Trace((0.0, 10.0, 20.0), (40.0, 90.0, 60.0), (10.0, 1.0, 5.0), (20.0, 2.0, 20.0))


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "trace.txt"
        path.write_text(text)
        return path

    return write


def test_a_steady_trace_is_its_link():
    trace = Trace.steady(LinkProfile("x", 80, up_mbit_s=1))
    assert [trace.rtt_ms_at(t) for t in (0, 1e6)] == [80, 80]
    assert trace.sent_s(5, 125_000, up=True) == pytest.approx(6)
    assert trace.sent_s(5, 125_000, up=False) == 5


def test_values_hold_until_the_next_line():
    assert [FALLING.rtt_ms_at(t) for t in (0, 9.99, 10, 19.99, 20, 1e6)] == [40, 40, 90, 90, 60, 60]
    assert FALLING.rate_mbit_s_at(12, up=True) == 1
    assert FALLING.rate_mbit_s_at(12, up=False) == 2


def test_a_transfer_goes_on_at_the_rate_of_each_line_that_it_meets():
    # 20 Mbit: 10 in the last second before the fall, 10 more in the ten seconds of 1 Mbit/s.
    assert FALLING.sent_s(9, 20_000_000 // 8, up=True) == pytest.approx(20)
    assert FALLING.sent_s(9, 25_000_000 // 8, up=True) == pytest.approx(21)


def test_nothing_is_sent_in_an_outage():
    trace = Trace((0.0, 1.0, 3.0), (0.0,) * 3, (8.0, 0.0, 8.0), (8.0,) * 3)
    assert trace.sent_s(0.5, 1_000_000, up=True) == pytest.approx(3.5)
    assert trace.sent_s(1.5, 0, up=True) == pytest.approx(3)


def test_a_loop_begins_anew_at_its_last_line():
    loop = Trace((0.0, 1.0, 2.0), (10.0, 20.0, 99.0), (1.0, 2.0, 99.0), (1.0,) * 3, loop=True)
    assert [loop.rtt_ms_at(t) for t in (0.5, 1.5, 2.5, 3.5, 1e6 + 1.5)] == [10, 20, 10, 20, 20]
    # 3 Mbit in each loop of 2 s
    assert loop.sent_s(0, 9_000_000 // 8, up=True) == pytest.approx(6)


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    st.floats(0, 100),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_bytes_sent_one_after_the_other_take_what_they_take_together(lengths, start, first, second, loop):
    times = (0.0, *np.cumsum(lengths).tolist())
    rates = tuple(0.5 + i % 3 for i in range(len(times)))
    trace = Trace(times, (0.0,) * len(times), rates, rates, loop)
    together = trace.sent_s(start, first + second, up=True)
    assert trace.sent_s(trace.sent_s(start, first, up=True), second, up=True) == pytest.approx(together, abs=1e-6)
    assert together >= start


@pytest.mark.parametrize(
    "text",
    [
        "0 10 40\n10 1 90  # the tunnel\n\n20 5 60\n",
        "0,10,40\n10,1,90\n20,5,60",
        "# measured\ntime_s, rate_mbit_s, rtt_ms\n0, 10, 40\n10, 1, 90\n20, 5, 60\n",
        "rtt_s time_ms rate_kbit_s\n0.04 0 10000\n0.09 10000 1000\n0.06 20000 5000\n",
        "time_s up_mbit_s down_kbit_s rtt_ms\n0 10 10000 40\n10 1 1000 90\n20 5 5000 60\n",
    ],
)
def test_a_file_is_read_in_any_of_its_forms(written, text):
    trace = Trace.read(written(text))
    assert trace.times_s == pytest.approx((0, 10, 20))
    assert trace.rtt_ms == pytest.approx((40, 90, 60))
    assert trace.up_mbit_s == pytest.approx((10, 1, 5))
    assert trace.down_mbit_s == pytest.approx((10, 1, 5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins at no time"),
        ("time_s,rate_mbit_s,rtt_ms\n", "begins at no time"),
        ("1 10 40\n", "begins at 1.0: must begin at 0 s"),
        ("0 10 40\n5 1 90\n5 1 90\n", "5 s after 5 s: times must rise"),
        ("0 10 40\n5 1\n", "line 2: 2 values for 3 columns"),
        ("0 10 40\n5 fast 90\n", "line 2: rate_mbit_s 'fast' must be a number from 0"),
        ("0 10 40\n5 -1 90\n", "line 2: rate_mbit_s '-1' must be a number from 0"),
        ("0 nan 40\n", "line 1: rate_mbit_s 'nan'"),
        ("0 1e9 40\n", r"must be a number from 0 to 1e\+06"),
        ("0 10 40\n5 0 90\n", "rate stays 0"),
        ("time rate rtt\n0 10 40\n", "columns time, rate, rtt; must be a time, a rate"),
        ("time_s rate_mbit_s\n0 10\n", "columns time_s, rate_mbit_s; must be"),
        ("time_s up_mbit_s rtt_ms\n0 10 40\n", "must be a time, a rate or both up and down"),
        ("time_s time_ms rate_mbit_s rtt_ms\n0 0 10 40\n", "each once"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused(written, text, message):
    with pytest.raises(LinkError, match=message):
        Trace.read(written(text))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(LinkError, match="cannot be read"):
        Trace.read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(LinkError, match="cannot be read"):
        Trace.read(tmp_path / "binary")


def test_a_loop_needs_two_lines_and_a_rate(written):
    with pytest.raises(LinkError, match="one line cannot loop"):
        Trace.read(written("0 10 40"), loop=True)
    with pytest.raises(LinkError, match="rate stays 0"):
        Trace.read(written("0 0 40\n5 10 40"), loop=True)


@pytest.mark.parametrize(("snr_db", "outage"), [(0, 0.1), (10, 0.01), (20, 0.05), (20, 0.5)])
def test_the_outage_rate_fails_in_its_share_of_fading_blocks(snr_db, outage):
    rate = outage_rate_mbit_s(5.0, snr_db, outage)
    blocks = 200_000
    rng = np.random.default_rng(0)
    gain = (
        np.abs(rng.normal(scale=math.sqrt(0.5), size=blocks) + 1j * rng.normal(scale=math.sqrt(0.5), size=blocks)) ** 2
    )
    capacity = 5.0 * np.log2(1 + 10 ** (snr_db / 10) * gain)
    deviation = math.sqrt(outage * (1 - outage) / blocks)
    assert np.mean(capacity < rate) == pytest.approx(outage, abs=5 * deviation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 10, 0), "outage 0: must lie between 0 and 1"),
        ((5, 10, 1), "outage 1"),
        ((5, 10, math.nan), "outage nan"),
        ((0, 10, 0.1), "0 MHz at 10 dB"),
        ((-1, 10, 0.1), "-1 MHz"),
        ((5, 400, 0.1), "5 MHz at 400 dB"),
        ((5, math.nan, 0.1), "5 MHz at nan dB"),
    ],
)
def test_a_channel_that_breaks_a_rule_is_refused(arguments, message):
    with pytest.raises(LinkError, match=message):
        outage_rate_mbit_s(*arguments)
