"""Generation with exits over real sockets. The draft is the back's only layer itself, so that whatever it is sure of is
right: tokens that differ from the full model's would tell of a cache that is not exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import BundleError, LinkError, RequestError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.draft_bundle import open_draft, write_exits
from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.trained_draft import TrainedDraft
from isthmus.runtime.exit_measurement import ExitText, measure_exits
from isthmus.runtime.exits import ExitCurve
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

PROMPT = "Whether the server has seen it or not."
NEW_TOKENS = 80


def open_model(folder: Path, address: str, **options: Any) -> EdgeModel:
    options = {"codec": "raw32", "threads": 1, "exit_agreement": 0.9} | options
    return EdgeModel(folder / "device", server=address, security=ChannelSecurity(insecure=True), **options)


def sure_from(threshold: float) -> ExitCurve:
    """A curve whose promise of 0.9 holds from a confidence on."""
    if not threshold:
        return ExitCurve((0.0,), (1000,), (1000,))
    return ExitCurve((0.0, threshold), (1000, 1000), (0, 1000))


@pytest.fixture(scope="module")
def plain(repeating: Path, repeating_address: str) -> list[int]:
    model = open_model(repeating, repeating_address, draft="off", exit_agreement=None)
    return model.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids


@pytest.fixture(scope="module")
def median_confidence(repeating: Path, plain: list[int]) -> float:
    """Above which the draft is for about half of the tokens."""
    device, server = open_bundle(repeating, "device"), open_bundle(repeating, "server")
    ids = [*range(1, 9), *plain]
    (measured,) = measure_exits(device, server, [ExitText(ids, np.arange(len(ids)) >= 8)], threads=1)
    return float(np.median(measured.confidence))


@pytest.fixture
def calibrated(repeating: Path, tmp_path: Path) -> Any:
    """Give a copy of the bundle a curve."""
    shutil.copytree(repeating, tmp_path / "copy")

    def calibrate(threshold: float) -> Path:
        write_exits(open_bundle(tmp_path / "copy", "device"), sure_from(threshold))
        return tmp_path / "copy"

    return calibrate


def test_an_exit_that_is_always_sure_asks_nobody(calibrated, repeating_address, plain):
    result = open_model(calibrated(0), repeating_address).generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert result.token_ids == plain
    assert result.round_trips == 0
    assert result.exited == NEW_TOKENS
    assert result.to_dict()["mean_layers"] == 4  # three in the front, and the draft's
    assert {token.source for token in result.tokens} == {"exit"}


def test_an_exit_that_is_never_sure_changes_nothing(calibrated, repeating_address, plain):
    result = open_model(calibrated(1.0), repeating_address).generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert result.token_ids == plain
    assert result.exited < NEW_TOKENS / 2


@pytest.mark.parametrize("rows", [1, 2, 5, 128])
def test_exited_states_ride_along_and_leave_the_server_s_cache_exact(calibrated, median_confidence, plain, rows):
    folder = calibrated(median_confidence)
    limits = ServerLimits(max_frame_tokens=rows)
    with BackServer.from_bundle(
        folder / "server", threads=1, security=ServerSecurity(insecure=True), limits=limits
    ) as server:
        result = open_model(folder, server.address).generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert result.token_ids == plain
    assert 10 < result.exited < NEW_TOKENS - 10
    assert result.round_trips == NEW_TOKENS - result.exited
    assert {token.source for token in result.tokens} == {"exit", "server"}
    assert all(token.bytes_up == 0 for token in result.tokens[1:] if token.source == "exit" and rows == 128)


def test_what_the_server_gets_is_every_position_once(calibrated, repeating_address, median_confidence, monkeypatch):
    seen: list[int] = []
    step = RemoteBack.step

    def watched(self: RemoteBack, hidden: np.ndarray, position: int, ids: Any = (), *, sample: bool) -> Any:
        assert len(ids) == len(hidden)
        seen.extend(range(position, position + len(hidden)))
        return step(self, hidden, position, ids, sample=sample)

    monkeypatch.setattr(RemoteBack, "step", watched)
    model = open_model(calibrated(median_confidence), repeating_address)
    model.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert seen == list(range(len(seen)))


def test_a_cut_link_changes_no_token(calibrated, repeating_address, median_confidence, plain, make_proxy):
    proxy = make_proxy(repeating_address)
    model = open_model(calibrated(median_confidence), proxy.address)
    with model.stream(PROMPT, max_new_tokens=NEW_TOKENS) as stream:
        for number, _ in enumerate(stream):
            if number in (3, 20, 50):
                proxy.cut()
    assert stream.result.token_ids == plain


def test_a_lost_session_is_made_again(calibrated, median_confidence, plain):
    folder = calibrated(median_confidence)

    def serve() -> BackServer:
        return BackServer.from_bundle(folder / "server", threads=1, security=ServerSecurity(insecure=True))

    with serve() as first, serve() as second:
        model = open_model(folder, f"{first.address},{second.address}")
        with model.stream(PROMPT, max_new_tokens=NEW_TOKENS) as stream:
            for number, _ in enumerate(stream):
                if number == 30:
                    first.stop(0)
    assert stream.result.token_ids == plain
    assert len(stream.result.replays) == 1


def test_without_the_server_the_device_goes_on_with_its_draft(calibrated, median_confidence, plain, make_proxy):
    folder = calibrated(median_confidence)
    with BackServer.from_bundle(folder / "server", threads=1, security=ServerSecurity(insecure=True)) as server:
        proxy = make_proxy(server.address)
        model = open_model(folder, proxy.address, on_server_loss="local")
        with model.stream(PROMPT, max_new_tokens=NEW_TOKENS) as stream:
            for number, _ in enumerate(stream):
                if number == 20:
                    proxy.close()
    result = stream.result
    assert result.token_ids == plain
    assert result.finish_reason == "length"
    (move,) = result.moves
    assert move.to == "local"
    lost = move.token - (len(result.prompt_ids) + 1)
    assert {token.source for token in result.tokens[lost:]} == {"exit", "local"}


@pytest.mark.parametrize("rows", [3, 128])
def test_with_a_server_again_the_device_asks_it_again(calibrated, median_confidence, plain, make_away, rows):
    folder = calibrated(median_confidence)
    security, limits = ServerSecurity(insecure=True), ServerLimits(max_frame_tokens=rows)
    with BackServer.from_bundle(folder / "server", threads=1, security=security, limits=limits) as server:
        away = make_away(server, lambda address: open_model(folder, address, on_server_loss="local"), PROMPT)
        for lost, found in ((15, 30), (45, 60)):
            away.until(lost)
            away.lose()
            away.until(found)
            away.find()
        ids, chosen_by, moves = away.end(NEW_TOKENS)
    assert ids == plain
    assert [(to, send) for to, _, send in moves] == [("local", ""), ("server", "hidden")] * 2
    first_lost, first_found, lost, found = (at - 1 for _, at, _ in moves)
    assert (first_found, found) == (30, 60)
    for part, alone in (
        (slice(first_lost), False),
        (slice(first_lost, 30), True),
        (slice(30, lost), False),
        (slice(lost, 60), True),
        (slice(60, None), False),
    ):
        assert set(chosen_by[part]) == (set("el") if alone else set("es"))


def test_a_server_that_is_lost_again_at_once_is_found_again(calibrated, median_confidence, plain, make_away):
    folder = calibrated(median_confidence)
    security, limits = ServerSecurity(insecure=True), ServerLimits(max_frame_tokens=3)
    with BackServer.from_bundle(folder / "server", threads=1, security=security, limits=limits) as server:
        away = make_away(server, lambda address: open_model(folder, address, on_server_loss="local"), PROMPT)
        away.until(15)
        away.lose()
        away.until(30)
        away.find()
        away.lose()
        away.until(40)
        away.find()
        ids, chosen_by, moves = away.end(NEW_TOKENS)
    assert ids == plain
    assert [(to, send) for to, _, send in moves] == [("local", ""), ("server", "hidden")]
    assert set(chosen_by[40:]) == set("es")


def test_a_lost_server_ends_a_generation_that_may_not_go_on(calibrated, median_confidence, make_proxy):
    folder = calibrated(median_confidence)
    with BackServer.from_bundle(folder / "server", threads=1, security=ServerSecurity(insecure=True)) as server:
        proxy = make_proxy(server.address)
        model = open_model(folder, proxy.address, on_server_loss="fail")
        with model.stream(PROMPT, max_new_tokens=NEW_TOKENS) as stream, pytest.raises(LinkError):
            for number, _ in enumerate(stream):
                if number == 20:
                    proxy.close()


def test_one_generation_can_leave_exits_out(calibrated, repeating_address, plain):
    result = open_model(calibrated(0), repeating_address).generate(PROMPT, max_new_tokens=9, draft="off")
    assert result.exited == 0
    assert result.token_ids == plain[:9]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exit_agreement": 1.0}, "between 0 and 1"),
        ({"exit_agreement": 0.9999}, "cannot promise"),
        ({"draft": "chain"}, "nothing is drafted"),
        ({"deadline_ms": 50, "codec": "tabq", "on_server_loss": "local"}, "no deadline"),
        ({"exit_agreement": 0.0}, "between 0 and 1"),
        ({"exit_agreement": None, "on_server_loss": "local"}, "to go on with"),
    ],
)
def test_what_cannot_be_promised_is_refused(calibrated, options, named):
    with pytest.raises(RequestError, match=named):
        open_model(calibrated(0), "127.0.0.1:1", **options)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.5), Sampling(repetition_penalty=1.1)])
def test_the_promise_is_for_greedy_tokens(calibrated, sampling):
    with pytest.raises(RequestError, match="greedy"):
        open_model(calibrated(0), "127.0.0.1:1").generate(PROMPT, sampling=sampling)


def test_a_draft_without_a_calibration_is_no_exit(repeating, tiny):
    with pytest.raises(RequestError, match="no calibration of its draft"):
        open_model(repeating, "127.0.0.1:1")
    with pytest.raises(RequestError, match="no trained draft"):
        open_model(tiny.bundle(bits=4, split=2), "127.0.0.1:1")


def test_a_damaged_curve_is_refused(calibrated):
    folder = calibrated(0)
    path = folder / "device" / "draft" / "draft.json"
    record = json.loads(path.read_text())
    record["exits"]["agreed"] = [2000]
    path.write_text(json.dumps(record))
    with pytest.raises(BundleError, match="more tokens that agree"):
        open_model(folder, "127.0.0.1:1")


def test_measured_confidence_is_what_a_generation_sees(repeating, plain):
    device, server = open_bundle(repeating, "device"), open_bundle(repeating, "server")
    ids = [*range(1, 9), *plain]
    progress: list[tuple[str, int, int]] = []
    texts = [ExitText(ids, np.arange(len(ids)) >= 8), ExitText(ids[:20], np.zeros(20, np.bool_))]
    measured, nothing = measure_exits(device, server, texts, threads=1, progress=lambda *told: progress.append(told))
    assert measured.agreed.all()
    assert len(measured.confidence) == len(plain)
    assert len(nothing.agreed) == 0
    assert progress == [("measuring exits", 1, 2), ("measuring exits", 2, 2)]
    model = EdgeModel(repeating / "device", server="127.0.0.1:1", threads=1, codec="raw32")
    front = model._stack.session(len(ids))
    draft = TrainedDraft(open_draft(device), 1).session(len(ids), Sampling(), ids)
    shares = []
    for at in range(len(ids) - 1):
        draft.observe(front.forward(model._embedding.rows(ids[at : at + 1])).copy())
        shares.append(draft.guesses(ids[: at + 1], 1)[0][1])
    np.testing.assert_allclose(measured.confidence, shares[7:], rtol=1e-5)
