"""Deadlines that the draft keeps, on a simulated link and clock; on a real one the server's cache stays exact."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isthmus.errors import RequestError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.draft_bundle import write_exits
from isthmus.runtime.edge import timely
from isthmus.runtime.edge.controller import Controller
from isthmus.runtime.edge.generate import StepReport, Token
from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.stream import Generation
from isthmus.runtime.edge.timely import RESERVE_S, TimelyTokens
from isthmus.runtime.edge.unsent_text import UnsentText
from isthmus.runtime.edge.verification import Answer
from isthmus.runtime.exit_measurement import ExitText, measure_exits
from isthmus.runtime.exits import ExitCurve
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire.security import ChannelSecurity

SIZES = [245, 186, 127, 103, 83, 65, 53]  # of payloads, as klt's levels are on SmolLM2
DEVICE_S, SERVER_S, RTT_S = 0.004, 0.010, 0.040
FALLS_AND_RECOVERS = ((0.0, 10.0), (6.0, 0.2), (18.0, 10.0))  # from which second on, Mbit/s


class Simulation:
    """Device, link and server of one generation, with a clock that only they move.

    The frames go through the link one after the other at the rate of the moment, and so do the answers.
    """

    def __init__(
        self, trace: Any, deadline_s: float, *, sure: float = 1.0, noise_s: float = 0.0, seed: int = 0
    ) -> None:
        self.now = 0.0
        self.controller = Controller(deadline_s, level=0, levels=len(SIZES), reserve_s=RESERVE_S)
        self.controller.expect(SIZES)
        self.onnxruntime_seconds = 0.0
        self.cache = SimpleNamespace(length=0)
        self.seen: list[int] = []  # positions that the server got
        self.collected: list[int] = []
        self._trace, self._sure, self._noise_s = trace, sure, noise_s
        self._rng = np.random.default_rng(0)
        self._free_at = 0.0  # the link
        self._answers: deque[tuple[float, float, int, int]] = deque()  # sent at, comes at, bytes, position

    def tokens(self, count: int, threshold: float = 0.0) -> list[Token]:
        """Generate so many."""
        fake: Any = self
        embedding: Any = SimpleNamespace(rows=np.array)
        text = UnsentText(
            embedding, fake, fake, [1] * 20, chunk_limit=self.chunk_limit(), max_new_tokens=count, end_tokens=()
        )
        return list(TimelyTokens(text, fake, threshold=threshold, controller=self.controller, split=1, layers=2))

    # The front and the draft.

    def forward(self, rows: Any) -> Any:
        self.now += DEVICE_S + self._noise()
        self.cache.length += len(rows)
        return np.zeros((len(rows), 1), np.float32)

    def observe(self, hidden: Any) -> None:
        pass

    def guesses(self, ids: Any, count: int) -> list[tuple[int, float]]:
        return [(7, self._sure)]

    # The back.

    def chunk_limit(self) -> int:
        return 128

    def submit(self, hidden: Any, position: int, token_ids: Any) -> None:
        self.seen += range(position, position + len(hidden))
        bytes_up = 24 + len(hidden) * SIZES[self.controller.level]
        s_per_byte = 8e-6 / next(rate for begin, rate in reversed(self._trace) if begin <= self.now)
        self._free_at = max(self._free_at, self.now) + s_per_byte * (bytes_up + 90)
        comes = self._free_at + RTT_S + SERVER_S + self._noise() + s_per_byte * 124
        if self._answers:
            comes = max(comes, self._answers[-1][1])
        self._answers.append((self.now, comes, bytes_up, position + len(hidden)))

    def answered(self, *, within_s: float = 0.0) -> bool:
        comes = self._answers[0][1]
        in_time = comes <= self.now + within_s
        self.now = max(self.now, comes) if in_time else self.now + within_s
        return in_time

    def collect(self) -> Answer:
        sent, comes, bytes_up, position = self._answers.popleft()
        self.now = max(self.now, comes)
        self.collected.append(position)
        return Answer((5,), StepReport(5, bytes_up, 50, 0.0, comes - sent, 0.0, 0.0, SERVER_S), bytes_up)

    def _noise(self) -> float:
        return abs(float(self._rng.normal(0, self._noise_s)))


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*args: Any, **options: Any) -> Simulation:
        simulation = Simulation(*args, **options)
        monkeypatch.setattr(timely, "perf_counter", lambda: simulation.now)
        return simulation

    return make


def late(tokens: list[Token], deadline_s: float) -> int:
    return sum(token.total_s > deadline_s for token in tokens[1:])


@pytest.mark.parametrize("noise_ms", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("deadline_ms", [60, 67, 72])
def test_over_a_link_that_falls_and_recovers_a_tenth_of_the_late_tokens_remains_whatever_the_noise(
    simulate, noise_ms, deadline_ms
):
    deadline_s = deadline_ms / 1e3
    fixed = simulate(FALLS_AND_RECOVERS, deadline_s, noise_s=noise_ms / 1e3)
    fixed.controller._choose = lambda: None
    without = late(fixed.tokens(400, threshold=2.0), deadline_s)  # it never exits, and stays at level 0
    paced = simulate(FALLS_AND_RECOVERS, deadline_s, noise_s=noise_ms / 1e3)
    tokens = paced.tokens(400)
    assert late(tokens, deadline_s) <= 0.1 * without
    if deadline_ms == 72 and noise_ms < 1:  # a coarser level keeps it
        assert sum(token.source == "exit" for token in tokens) < 0.1 * without


def test_tokens_are_the_server_s_before_the_fall_and_after_the_link_has_recovered(simulate):
    deadline_s = 0.060
    simulation = simulate(FALLS_AND_RECOVERS, deadline_s)
    tokens = simulation.tokens(420)
    at_s = np.cumsum([token.total_s for token in tokens])
    good = [token for token, at in zip(tokens, at_s, strict=True) if at < 5.9 or at > 18.5]
    slow = [token for token, at in zip(tokens, at_s, strict=True) if 6.5 < at < 17.5]
    assert {token.source for token in good} == {"server"}
    assert {token.source for token in slow} == {"exit"}
    assert {token.level for token in slow} == {None}


def test_a_stall_is_bridged_and_every_position_reaches_the_server_once(simulate):
    stall = ((0.0, 10.0), (1.0, 0.001), (4.0, 10.0))
    simulation = simulate(stall, 0.080)
    tokens = simulation.tokens(400)
    assert late(tokens, 0.080) <= 1
    assert simulation.seen == list(range(len(simulation.seen)))
    assert len(simulation.seen) > 390
    assert tokens[-1].source == "server"


def test_a_guess_that_is_not_sure_enough_is_not_taken(simulate):
    simulation = simulate(((0.0, 0.2),), 0.050, sure=0.5)
    tokens = simulation.tokens(50, threshold=0.6)
    assert {token.source for token in tokens} == {"server"}
    assert late(tokens, 0.050) == 49
    assert simulation.collected == list(range(20, 70))


def test_the_first_token_is_always_the_server_s(simulate):
    assert simulate(((0.0, 0.01),), 0.010).tokens(3)[0].source == "server"


# A real server.

PROMPT = "Whether the server has seen it or not."
NEW_TOKENS = 80


@pytest.fixture
def calibrated(repeating: Path, tmp_path: Path) -> Path:
    """The draft is the back's only layer itself: what it is taken for is right, unless a cache is not exact."""
    shutil.copytree(repeating, tmp_path / "copy")
    write_exits(open_bundle(tmp_path / "copy", "device"), ExitCurve((0.0, 0.02), (1000, 1000), (0, 1000)))
    return tmp_path / "copy"


def open_model(folder: Path, address: str, deadline_ms: float | None, **options: Any) -> EdgeModel:
    """With the exact codec, which has no levels, in place of each of them."""
    options = {"codec": "raw32", "threads": 1} | options
    model = EdgeModel(folder / "device", server=address, security=ChannelSecurity(insecure=True), **options)
    model._deadline_ms, model._levels = deadline_ms, [*model._levels] * 2
    return model


@pytest.mark.parametrize("share", [0.0, 0.5, None])
def test_whatever_was_taken_late_the_server_goes_on_from_there(calibrated, repeating_address, monkeypatch, share):
    plain = open_model(calibrated, repeating_address, None, draft="off").generate(PROMPT, max_new_tokens=NEW_TOKENS)
    seen: list[int] = []
    submit = RemoteBack.submit

    def watched(self: RemoteBack, hidden: np.ndarray, position: int, ids: Any, **options: Any) -> None:
        seen.extend(range(position, position + len(hidden)))
        submit(self, hidden, position, ids, **options)

    monkeypatch.setattr(RemoteBack, "submit", watched)
    model = open_model(calibrated, repeating_address, 60_000 if share is None else 2.1, exit_agreement=0.9)
    model._exit_threshold = surest(calibrated, plain, share) if share else 0.0
    result = model.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert result.token_ids == plain.token_ids
    assert result.tokens[0].source == "server"
    assert result.exited == pytest.approx(NEW_TOKENS * (1 - (1.0 if share is None else share)), abs=8)
    assert seen == list(range(len(seen)))


def surest(folder: Path, plain: Generation, share: float) -> float:
    """The confidence that the draft has in all tokens but this share."""
    device, server = open_bundle(folder, "device"), open_bundle(folder, "server")
    ids = [*plain.prompt_ids, *plain.token_ids]
    (measured,) = measure_exits(
        device, server, [ExitText(ids, np.arange(len(ids)) >= len(plain.prompt_ids))], threads=1
    )
    return float(np.quantile(measured.confidence, share))


def test_a_link_that_breaks_while_answers_are_due_changes_no_token(calibrated, repeating_address, make_proxy):
    plain = open_model(calibrated, repeating_address, None, draft="off").generate(PROMPT, max_new_tokens=NEW_TOKENS)
    proxy = make_proxy(repeating_address)
    model = open_model(calibrated, proxy.address, 2.1, exit_agreement=0.9)
    model._exit_threshold = surest(calibrated, plain, 0.5)
    with model.stream(PROMPT, max_new_tokens=NEW_TOKENS) as stream:
        for number, _ in enumerate(stream):
            if number in (3, 20, 50):
                proxy.cut()
    assert stream.result.token_ids == plain.token_ids


def test_an_agreement_of_0_promises_nothing_and_needs_a_deadline(calibrated, repeating):
    def opened(folder: Path, **options: Any) -> EdgeModel:
        return EdgeModel(folder / "device", server="127.0.0.1:1", codec="tabq", exit_agreement=0.0, **options)

    assert opened(calibrated, deadline_ms=50)._exit_threshold == 0
    assert opened(repeating, deadline_ms=50)._exit_threshold == 0  # no calibration is needed
    with pytest.raises(RequestError, match="between 0 and 1"):
        opened(calibrated)
    with pytest.raises(RequestError, match="greedy"):
        opened(calibrated, deadline_ms=50).generate(PROMPT, sampling=Sampling(temperature=0.5))
