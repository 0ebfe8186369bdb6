from __future__ import annotations

import json
import math

import pytest

from isthmus.devices.link import (
    LINKS,
    LinkProfile,
    Stall,
    link_profile,
    parse_duration_s,
    parse_rate_mbit_s,
    parse_share,
    parse_size_bytes,
)
from isthmus.errors import LinkError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_duration_s, "80ms", 0.08),
        (parse_duration_s, "1.5s", 1.5),
        (parse_duration_s, " 300 us ", 3e-4),
        (parse_duration_s, "0s", 0.0),
        (parse_rate_mbit_s, "10mbit", 10.0),
        (parse_rate_mbit_s, "200kbit", 0.2),
        (parse_rate_mbit_s, "1Gbit/s", 1000.0),
        (parse_rate_mbit_s, ".5mbit", 0.5),
        (parse_size_bytes, "500kB", 500_000),
        (parse_size_bytes, "2MB", 2_000_000),
        (parse_share, "2%", 0.02),
        (parse_share, "0.02", 0.02),
    ],
)
def test_values_are_read_with_their_units(parse, text, value):
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize("parse", [parse_duration_s, parse_rate_mbit_s, parse_size_bytes])
@pytest.mark.parametrize("text", ["80", "", "ms", "80 parsecs", "1e3ms", "1,5s", "nan s", "infs", "٣ms", "10ms20ms"])
def test_a_value_without_a_known_unit_is_refused_by_name(parse, text):
    with pytest.raises(LinkError, match="must be a number with its unit, one of"):
        parse(text)


@pytest.mark.parametrize(
    ("parse", "text"), [(parse_duration_s, "-1ms"), (parse_rate_mbit_s, "-1mbit"), (parse_share, "-1%")]
)
def test_a_negative_value_is_refused(parse, text):
    with pytest.raises(LinkError, match="must not be negative"):
        parse(text)


@pytest.mark.parametrize("name", LINKS)
def test_a_preset_is_found_by_its_name(name):
    link = link_profile(name)
    assert link is LINKS[name]
    assert link.name == name
    json.dumps(link.to_dict(), allow_nan=False)


def test_a_description_sets_what_it_names_and_leaves_the_rest_ideal():
    assert link_profile("rtt=80ms, rate=10mbit") == LinkProfile("rtt=80ms, rate=10mbit", 80, 10, 10)
    link = link_profile("rtt=100ms,up=200kbit,jitter=5ms,loss=1%")
    assert (link.up_mbit_s, link.down_mbit_s, link.jitter_ms, link.loss) == (0.2, math.inf, 5, 0.01)


def test_a_preset_takes_changes():
    link = link_profile("flaky-train,rate=1mbit,down=3mbit")
    base = LINKS["flaky-train"]
    assert (link.up_mbit_s, link.down_mbit_s) == (1, 3)
    assert (link.rtt_ms, link.stall) == (base.rtt_ms, base.stall)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "5g",
            "'5g': is no preset; choose one of loopback, ethernet, wifi, lte, lte-m, nb-iot, satellite, flaky-train",
        ),
        ("", "is no preset"),
        ("rtt=80", "duration '80': must be a number with its unit"),
        ("wifi,fast", "'fast' is none of rtt=…"),
        ("wifi,speed=3mbit", "'speed=3mbit' is none of rtt=…"),
        ("rtt=2h", "one of us, ms, s"),
        ("rtt=9000s", r"rtt 9e\+06 ms: must lie between 0 and 3.6e\+06"),
        ("rate=1bit", "rate up 1e-06 Mbit/s: must lie between 0.0001"),
        ("down=9999gbit", "rate down"),
        ("loss=60%", "loss 0.6 of the packets: must lie between 0 and 0.5"),
        ("rtt=10ms,jitter=6ms", "jitter 6 ms: must lie between 0 and the delay of one way, 5 ms"),
    ],
)
def test_a_link_that_breaks_a_rule_is_refused(text, message):
    with pytest.raises(LinkError, match=message):
        link_profile(text)


def test_a_transfer_takes_half_a_round_trip_and_the_bytes_at_the_rate():
    link = LinkProfile("x", 80, up_mbit_s=1, down_mbit_s=10)
    assert link.transfer_ms(1000, up=True) == pytest.approx(40 + 8)
    assert link.transfer_ms(1000, up=False) == pytest.approx(40 + 0.8)
    assert LINKS["loopback"].transfer_ms(10**9, up=True) == 0


def test_loss_and_stalls_lengthen_the_expected_transfer():
    lossy = LinkProfile("x", 80, loss=0.1)
    assert lossy.transfer_ms(100, up=True) == pytest.approx(40 + 0.1 * (200 + 80))
    assert lossy.transfer_ms(2 * 1460, up=True) == pytest.approx(40 + 0.19 * (200 + 80))
    stalled = LinkProfile("x", 80, stall=Stall(0, 10, every_s=40))
    assert stalled.transfer_ms(100, up=True) == pytest.approx(40 / 0.75 + 0.25 * 5000)


def test_nothing_is_released_during_a_stall():
    once = Stall(20, 3)
    assert [once.release(t) for t in (0, 19.9, 20, 22, 23, 90)] == [0, 19.9, 23, 23, 23, 90]
    often = Stall(20, 3, every_s=60)
    assert [often.release(t) for t in (10, 21, 81, 140, 143)] == [10, 23, 83, 143, 143]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("20s", "must be AT,FOR or AT,FOR,EVERY"),
        ("1s,2s,3s,4s", "must be AT,FOR"),
        ("20,3s", "duration '20'"),
        ("20s,0s", "a stall's length 0 s: must lie between 0.001"),
        ("20s,3s,2s", "must be shorter than its period"),
        ("9000s,3s", "a stall's begin"),
    ],
)
def test_a_stall_that_breaks_a_rule_is_refused(text, message):
    with pytest.raises(LinkError, match=message):
        Stall.parse(text)


def test_a_stall_is_read():
    assert Stall.parse("20s,500ms") == Stall(20, 0.5)
    assert Stall.parse("20s,3s,60s") == Stall(20, 3, 60)
