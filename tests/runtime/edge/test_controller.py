"""The controller on simulated links, and on a real server behind an emulated one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cli.main import main
from isthmus.devices.link import LINKS, LinkProfile
from isthmus.devices.proxy import DropAfter, LinkProxy
from isthmus.errors import CodecError, RequestError
from isthmus.export.export import export_bundle
from isthmus.runtime.edge.controller import HOLD, Controller, LinkEstimator, PacedCodec
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.stream import Generation
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

SIZES = [245, 186, 127, 103, 83, 65, 53]  # of payloads, as klt's levels are on SmolLM2
DEVICE_MS, SERVER_MS = 3.0, 8.0
Phase = tuple[int, float, float]  # tokens, round trip in ms, Mbit/s


class Run:
    """A generation over a link that changes from phase to phase, without a clock."""

    def __init__(
        self,
        phases: list[Phase],
        deadline_ms: float,
        *,
        level: int = 2,
        fixed: int | None = None,
        noise_ms: float = 1.0,
        hiccups: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._noise_ms = noise_ms
        self._hiccups = hiccups
        self.controller = Controller(deadline_ms / 1e3, level=level, levels=len(SIZES))
        self.controller.expect(SIZES)
        prompt = 20 * SIZES[level]
        link_s = self._link_s(prompt, *phases[0][1:])
        self.controller.observe(bytes_up=prompt, device_s=0.03, server_s=0.05, link_s=link_s, prompt=True)
        self.late: list[list[bool]] = []
        self.levels: list[list[int]] = []
        for count, rtt_ms, mbit_s in phases:
            self.late.append([])
            self.levels.append([])
            for _ in range(count):
                level = self.controller.level if fixed is None else fixed
                size = int(SIZES[level] * self._rng.normal(1, 0.1)) + 24
                times = (
                    (DEVICE_MS + abs(self._rng.normal(0, 0.3))) / 1e3,
                    (SERVER_MS + abs(self._rng.normal(0, 0.6 * noise_ms))) / 1e3,
                    self._link_s(size, rtt_ms, mbit_s),
                )
                self.controller.observe(bytes_up=size, device_s=times[0], server_s=times[1], link_s=times[2])
                self.late[-1].append(1e3 * sum(times) > deadline_ms)
                self.levels[-1].append(level)

    def _link_s(self, bytes_: int, rtt_ms: float, mbit_s: float) -> float:
        """Both ways, with what TLS and HTTP add, and noise."""
        hiccup = self._rng.exponential(80) if self._rng.random() < self._hiccups else 0.0
        return (rtt_ms + 8e-3 * (bytes_ + 130) / mbit_s + abs(self._rng.normal(0, self._noise_ms)) + hiccup) / 1e3


GOOD, SLOW = (40.0, 10.0), (40.0, 0.2)


@pytest.mark.parametrize("seed", range(5))
def test_it_keeps_the_deadline_over_a_link_that_falls_and_recovers(seed):
    run = Run([(150, *GOOD), (150, *SLOW), (150, *GOOD)], deadline_ms=68, seed=seed)
    fixed_ms = DEVICE_MS + SERVER_MS + 40 + 8e-3 * (SIZES[0] + 24 + 130) / 0.2
    assert fixed_ms > 66  # at the finest level about all would be late, or close to it
    assert [sum(phase) <= 6 for phase in run.late] == [True] * 3
    for phase in (0, 2):  # the finest, where the link allows it
        assert run.levels[phase][-100:] == [0] * 100
    assert min(run.levels[1][10:]) > 0


@pytest.mark.parametrize("noise_ms", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("deadline_ms", [58, 60, 62, 64, 66])
def test_hardly_more_tokens_are_late_than_at_the_coarsest_level_even_if_that_is_too_slow(noise_ms, deadline_ms):
    phases = [(100, *GOOD), (200, *SLOW), (100, *GOOD)]
    coarsest, finest, paced = (
        sum(
            sum(map(sum, Run(phases, deadline_ms, fixed=fixed, noise_ms=noise_ms, seed=seed).late)) for seed in range(2)
        )
        for fixed in (len(SIZES) - 1, 0, None)
    )
    assert paced <= coarsest + 2 * 12  # it has to see that the link fell, and to try finer levels when it recovers
    if coarsest < 0.04 * finest:
        assert paced < 0.1 * finest


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rate", "deadline_ms"), [(0.2, 66), (0.2, 70), (0.1, 75), (10, 66), (10, 45)])
def test_it_does_not_oscillate_on_a_steady_link(seed, rate, deadline_ms):
    run = Run([(1000, 40, rate)], deadline_ms, seed=seed)
    assert len(run.controller.changes) <= 5
    assert len(set(run.levels[0][-300:])) <= 2


def test_a_finer_level_that_proves_wrong_is_tried_less_and_less_often():
    run = Run([(3000, *SLOW)], deadline_ms=66, hiccups=0.05)
    finer = [change.token for change in run.controller.changes if change.level < change.before]
    assert len(finer) < 3000 / (4 * HOLD)


def test_it_goes_coarser_at_the_second_late_token_and_finer_only_after_the_hold():
    run = Run([(100, *GOOD), (60, 40, 0.05), (100, *GOOD)], deadline_ms=80)
    coarser = next(change for change in run.controller.changes if change.token > 100)
    assert coarser.token <= 100 + 3
    finer = next(change for change in run.controller.changes if change.token > 161)
    assert finer.token >= 161 + HOLD
    assert finer.level < finer.before


def test_one_hiccup_changes_nothing():
    run = Run([(200, *GOOD)], deadline_ms=66)
    before = run.controller.level, run.controller.link.delay_s
    run.controller.observe(bytes_up=270, device_s=0.003, server_s=0.008, link_s=0.9)
    assert run.controller.level == before[0]
    assert run.controller.link.delay_s == pytest.approx(before[1], abs=0.005)


def test_where_no_level_keeps_the_deadline_the_coarsest_is_used_if_it_helps():
    slow = Run([(100, 90, 0.05)], deadline_ms=80)
    assert slow.levels[0][-50:] == [len(SIZES) - 1] * 50
    far = Run([(100, 200, 10)], deadline_ms=100, level=6)
    assert far.levels[0][-50:] == [0] * 50
    assert all(slow.late[0])
    assert all(far.late[0])


def test_a_slow_server_counts_as_well():
    run = Run([(100, *SLOW)], deadline_ms=76)
    assert run.controller.level == 0
    for _ in range(30):
        run.controller.observe(bytes_up=270, device_s=0.003, server_s=0.015, link_s=0.056)
    assert run.controller.level > 0
    assert "server 1" in run.controller.changes[-1].reason  # 8 ms before


def test_drafts_are_bounded_by_what_the_link_carries_while_it_waits_and_free_again_when_it_recovers():
    run = Run([(100, *GOOD)], deadline_ms=80)
    assert (run.controller.drafts, run.controller.least_drafts) == (24, None)
    assert 1 <= Run([(100, *SLOW)], deadline_ms=80).controller.drafts <= 8
    assert Run([(100, 40, 0.05)], deadline_ms=80).controller.drafts <= 2
    assert Run([(100, 40, 0.01)], deadline_ms=80).controller.drafts == 0
    again = Run([(100, *GOOD), (60, 40, 0.05), (100, *GOOD)], deadline_ms=80).controller
    assert again.drafts == 24
    assert again.least_drafts <= 2


def test_the_bound_on_drafts_does_not_oscillate_on_a_steady_link(caplog):
    caplog.set_level("INFO", "isthmus")
    for rate in (0.1, 0.2, 0.5, 1.0):
        caplog.clear()
        Run([(600, 40, rate)], deadline_ms=80)
        assert caplog.text.count("drafts on the way") <= 6


def test_changes_tell_token_levels_and_why():
    changes = Run([(100, *GOOD), (50, 40, 0.05)], deadline_ms=80).controller.changes
    assert [change.before for change in changes[1:]] == [change.level for change in changes[:-1]]
    assert changes[0] == (HOLD + 1, 0, 2, changes[0].reason)
    assert changes[0].reason.startswith("level 0 would take up to ")
    assert " ms of 80: link 4" in changes[0].reason


def test_the_estimator_tells_delay_from_rate():
    link = LinkEstimator()
    rng = np.random.default_rng(0)
    for size in rng.integers(60, 400, 60):
        link.observe(int(size), 0.05 + 8e-6 * size / 0.5 + rng.normal(0, 2e-4))
    assert link.delay_s == pytest.approx(0.05, abs=0.001)
    assert 8e-6 / link.s_per_byte == pytest.approx(0.5, rel=0.1)


def test_the_estimator_learns_a_delay_that_rose_from_frames_of_two_sizes():
    link = LinkEstimator()
    for delay in (0.04, 0.1):
        for number in range(40):
            link.observe(270 if number % 2 else 90, delay)
    assert link.seconds(90) == pytest.approx(0.1, abs=0.005)
    assert link.seconds(270) == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize(
    ("deadline_s", "level", "message"),
    [
        (0, 0, "deadline 0 ms"),
        (-1, 0, "deadline -1000 ms"),
        (float("inf"), 0, "deadline inf"),
        (1, 7, "level 7: must lie"),
    ],
)
def test_a_controller_of_no_use_is_refused(deadline_s, level, message):
    with pytest.raises(RequestError, match=message):
        Controller(deadline_s, level=level, levels=7)


class SizedCodec:
    """Its payload is its level, as often as its size says."""

    name = "sized"

    def __init__(self, level: int) -> None:
        self._level = level

    def encode(self, hidden: Any, token_ids: Any = ()) -> bytes:
        return bytes([self._level]) * (SIZES[self._level] * len(hidden))

    def decode(self, payload: bytes, tokens: int, d_model: int) -> Any:
        return payload


def test_a_paced_codec_encodes_at_the_controllers_level_and_tells_it_the_sizes():
    controller = Controller(1.0, level=3, levels=7)
    codec = PacedCodec([SizedCodec(level) for level in range(7)], controller)
    hidden = np.zeros((2, 4), np.float32)
    assert codec.name == "sized"
    assert codec.encode(hidden, [1, 2]) == bytes([3]) * 2 * SIZES[3]
    controller.observe(bytes_up=1000, device_s=0, server_s=0, link_s=0.1, prompt=True)
    assert controller.predicted_s(0) > controller.predicted_s(6)
    controller.level = 6
    assert codec.encode(hidden[:1], [1]) == bytes([6]) * SIZES[6]


class SinkCodec(SizedCodec):
    """Sends its first token raw, as klt does with an attention sink."""

    def encode(self, hidden: Any, token_ids: Any = ()) -> bytes:
        return bytes(1152) if token_ids[-1] == 0 else super().encode(hidden, token_ids)


def test_a_first_token_unlike_the_others_does_not_fix_the_sizes():
    controller = Controller(1.0, level=3, levels=7)
    codec = PacedCodec([SinkCodec(level) for level in range(7)], controller)
    for token in range(5):
        codec.encode(np.zeros((1, 4), np.float32), [token])
        link_s = 0.04 + 1e-5 * (1176 if token == 0 else SIZES[3] + 24)
        controller.observe(bytes_up=1176 if token == 0 else SIZES[3] + 24, device_s=0, server_s=0, link_s=link_s)
    assert controller.predicted_s(0) - controller.predicted_s(6) == pytest.approx(1e-5 * (SIZES[0] - SIZES[6]), rel=0.2)


PROMPT = "A prompt of bytes."
UNENDING = "Another prompt of bytes."  # the model goes on for 48 tokens and more where it is sent coarsely


@pytest.fixture(scope="module")
def calibrated(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    options = {"max_length": 128, "calibration_tokens": 2048, "cache": out.parent / "cache"}
    export_bundle(str(tiny.checkpoint()), out, split=2, front_bits=8, back_bits=8, **options)
    return out


@pytest.fixture(scope="module")
def server(calibrated: Path) -> Iterator[BackServer]:
    plain = ServerSecurity(insecure=True)
    with BackServer.from_bundle(calibrated / "server", threads=1, security=plain) as server:
        yield server


@pytest.fixture
def generate(calibrated: Path, server: BackServer) -> Callable[..., Generation]:
    def run(
        link: LinkProfile = LINKS["loopback"],
        drop: DropAfter | None = None,
        prompt: str = PROMPT,
        **options: Any,
    ) -> Generation:
        host, _, port = server.address.rpartition(":")
        with LinkProxy(("127.0.0.1", 0), (host, int(port)), link, drop=drop) as proxy:
            options = {"security": ChannelSecurity(insecure=True), "draft": "off", "threads": 1} | options
            model = EdgeModel(calibrated / "device", server=proxy.address, **options)
            return model.generate(prompt, max_new_tokens=48)

    return run


@pytest.mark.parametrize("codec", ["klt", "tabq", "tabq-rans"])
def test_a_deadline_that_the_finest_level_keeps_changes_no_token(generate, codec):
    fixed = generate(codec=codec, level=0)
    assert (fixed.deadline_ms, fixed.late_tokens, fixed.level_changes) == (None, None, ())
    assert {token.level for token in fixed.tokens} == {None}
    paced = generate(codec=codec, level=0, deadline_ms=60_000)
    assert paced.token_ids == fixed.token_ids
    assert (paced.deadline_ms, paced.late_tokens, paced.level_changes) == (60_000, 0, ())
    assert {token.level for token in paced.tokens} == {0}


def test_an_impossible_deadline_ends_at_the_coarsest_level_and_says_so(generate, caplog):
    caplog.set_level("INFO", "isthmus")
    result = generate(LinkProfile("slow", 5, 0.1, 0.1), prompt=UNENDING, codec="klt", level=0, deadline_ms=1)
    assert result.new_tokens == 48
    assert result.late_tokens == 47
    assert [token.level for token in result.tokens[:2]] == [0, 0]
    assert {token.level for token in result.tokens[24:]} == {6}
    assert result.level_changes[-1].level == 6
    assert "token 2: level 6 after 0" in caplog.text
    assert result.tokens[-1].bytes_up < result.tokens[1].bytes_up
    shown = json.loads(json.dumps(result.to_dict()))
    assert shown["late_tokens"] == 47
    assert shown["level_changes"][-1]["level"] == 6
    assert shown["tokens"][-1]["level"] == 6
    assert shown["tokens"][-1]["ms"] > 1


def test_an_easy_deadline_ends_at_the_finest_level(generate):
    result = generate(codec="klt", level=6, deadline_ms=60_000)
    assert [token.level for token in result.tokens] == [6] * (HOLD + 1) + [0] * (47 - HOLD)
    assert [(change.token, change.level) for change in result.level_changes] == [(HOLD + 1, 0)]


def test_a_connection_that_breaks_gets_the_same_tokens(generate):
    expected = generate(codec="klt", level=0).token_ids
    assert generate(drop=DropAfter(bytes_=3000), codec="klt", level=0, deadline_ms=60_000).token_ids == expected


def test_a_deadline_without_levels_or_without_a_link_is_refused(tiny, calibrated):
    with pytest.raises(RequestError, match="needs a codec with levels: raw16 has none; choose klt"):
        EdgeModel(calibrated / "device", server="127.0.0.1:1", codec="raw16", deadline_ms=100)
    with pytest.raises(RequestError, match="deadline 0 ms: must be above 0"):
        EdgeModel(calibrated / "device", server="127.0.0.1:1", deadline_ms=0)
    with pytest.raises(CodecError, match="levels 0"):
        EdgeModel(calibrated / "device", server="127.0.0.1:1", level=9, deadline_ms=100)
    with pytest.raises(RequestError, match="a deadline needs a split bundle"):
        EdgeModel(tiny.bundle() / "device", deadline_ms=100)


def test_the_command_shows_what_the_deadline_did(calibrated, server, capsys):
    remote = ["--server", server.address, "--insecure", "--threads", "1"]
    command = ["generate", str(calibrated / "device"), *remote, "-p", PROMPT, "-n", "24"]
    assert main([*command, "--deadline", "60s"]) == 0
    summary = capsys.readouterr().err
    assert "; deadline 60000 ms: 0 of " in summary
    assert " at level 2" in summary
    assert main([*command, "--deadline", "60"]) == 1
    assert "duration '60': must be a number with its unit" in capsys.readouterr().err
    assert main([*command, "--deadline", "60s", "--codec", "raw16"]) == 1
    assert "needs a codec with levels" in capsys.readouterr().err
