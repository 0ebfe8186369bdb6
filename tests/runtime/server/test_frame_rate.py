"""Frames a second of one device: those above the rate wait, and nothing else happens to them."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.request import urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import RequestError
from isthmus.runtime.server.frame_rate import BURST_S, FrameRate
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.metrics import parse_metrics
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity
from isthmus.runtime.wire.tokens import issue_token

PROMPT = [3, 1, 4, 1, 5]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 50), st.lists(st.floats(0, 0.5), min_size=1, max_size=200))
def test_no_stretch_of_time_has_more_than_the_rate_and_a_burst(rate: int, pauses: list[float]) -> None:
    """Of a device that waits as it is told, and then sends after a pause or at once."""
    clock = Clock()
    frames = FrameRate(rate, clock)
    passed: list[float] = []
    for pause in pauses:
        clock.now += pause
        clock.now += frames.wait("kitchen")
        passed.append(clock.now)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            assert last - first + 1 <= rate * (passed[last] - passed[first] + BURST_S) + 1e-6


def test_who_keeps_to_the_rate_never_waits_and_devices_do_not_wait_for_each_other() -> None:
    clock = Clock()
    frames = FrameRate(4.0, clock)
    for _ in range(40):
        clock.now += 0.25
        assert frames.wait("steady") == 0
    delays = [frames.wait("fast") for _ in range(10)]
    assert delays == pytest.approx([0] * 4 + [0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
    assert frames.wait("steady") == 0
    assert frames.held == 6


def test_less_than_one_a_second_and_no_limit_at_all() -> None:
    clock = Clock()
    slow = FrameRate(0.5, clock)
    assert [slow.wait("a"), slow.wait("a")] == [0, 2.0]
    assert [FrameRate(math.inf, clock).wait("a") for _ in range(9)] == [0] * 9
    with pytest.raises(RequestError, match="frames_per_s_per_device"):
        ServerLimits(frames_per_s_per_device=0)


@pytest.fixture
def server(engine, user_config, tmp_path: Path, monkeypatch):
    """Of 16 frames a second, by a clock that stands still: the bucket is never filled again."""
    monkeypatch.setattr("isthmus.runtime.server.server.FrameRate", lambda rate: FrameRate(rate, clock=lambda: 0.0))
    security = ServerSecurity(insecure=True, tokens=tmp_path / "tokens")
    for name in ("kitchen", "phone"):
        (tmp_path / name).write_text(issue_token(tmp_path / "tokens", name))
    limits = ServerLimits(frames_per_s_per_device=16)
    with BackServer(engine, security=security, limits=limits, metrics="127.0.0.1:0") as server:
        yield server


def held(server: BackServer) -> float:
    with urlopen(f"http://{server.metrics_address}/metrics") as answer:
        return parse_metrics(answer.read().decode())["frames_held"]


def test_a_generation_above_the_rate_waits_and_comes_out_right(server, make_generation, expected, tmp_path):
    kitchen, phone = (
        ChannelSecurity(insecure=True, token=(tmp_path / name).read_text()) for name in ("kitchen", "phone")
    )
    fast = make_generation(server.address, PROMPT, security=kitchen, on_server_loss="fail")
    assert fast.run(16) == expected(PROMPT, 16)
    assert held(server) == 2  # of Open, two frames of the prompt, and a frame for each token but the last
    other = make_generation(server.address, PROMPT, security=phone, on_server_loss="fail")
    assert other.run(4) == expected(PROMPT, 4)
    assert held(server) == 2
    # All streams of a device share its rate; a new session waits as a running one does.
    again = make_generation(server.address, PROMPT, security=kitchen, on_server_loss="fail")
    assert held(server) == 3
    assert again.run(1) == expected(PROMPT, 1)


def test_peers_without_a_name_are_not_told_apart(make_server, make_generation, expected):
    server = make_server(frames_per_s_per_device=1)
    assert make_generation(server.address, PROMPT).run(20) == expected(PROMPT, 20)
