"""A front and its workers: placing, pinning, losing, replacing, growing, rolling and draining."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest

from isthmus.errors import LinkError, ProtocolError, RequestError
from isthmus.runtime.fleet.front import FleetPlan
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.metrics import parse_metrics
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ServerSecurity

PROMPT = list(range(1, 120))
NEW_TOKENS = 24
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.1, top_k=40, repetition_penalty=1.1, seed=6),
}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(folder):
    """What one server gives."""
    from isthmus.runtime.edge.model import EdgeModel
    from isthmus.runtime.wire.security import ChannelSecurity

    with BackServer.from_bundle(folder / "server", security=ServerSecurity(insecure=True), threads=1) as server:
        model = EdgeModel(
            folder / "device",
            server=server.address,
            security=ChannelSecurity(insecure=True),
            codec="tabq",
            threads=1,
            draft="off",
        )
        tokens = {
            name: model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=sampling).token_ids
            for name, sampling in SAMPLINGS.items()
        }
    assert {len(ids) for ids in tokens.values()} == {NEW_TOKENS}  # none ends by itself
    return tokens


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_a_generation_is_that_of_one_server(make_fleet, open_model, undisturbed, kind):
    fleet = make_fleet()
    result = open_model(fleet.address).generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS[kind])
    assert result.token_ids == undisturbed[kind]
    assert not result.replays
    assert fleet.sessions() == [0, 0]  # closed is closed at once


def test_sessions_go_where_most_memory_is_free(make_fleet, open_model):
    fleet = make_fleet(3)
    streams = [
        open_model(fleet.address).tokens(PROMPT, max_new_tokens=tokens, sampling=Sampling())
        for tokens in (90, 8, 8, 8, 8)
    ]
    for stream in streams:
        next(iter(stream))
    assert sorted(fleet.sessions()) == [1, 2, 2]  # the long one has a worker for itself
    for stream in streams:
        stream.close()
    eventually(lambda: fleet.sessions() == [0, 0, 0])


@pytest.mark.parametrize("draft", ["off", "auto"])
@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("silent", [False, True], ids=["dead", "hanging"])
def test_the_sessions_of_a_lost_worker_go_on_at_another(make_fleet, open_model, undisturbed, kind, silent, draft):
    fleet = make_fleet()
    stream = open_model(fleet.address, draft=draft).tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS[kind])
    tokens = [next(iter(stream)).id for _ in range(5)]
    [worker] = fleet.busy()
    if silent:
        worker.silent = True
        eventually(lambda: fleet.fleet.lost == 1)
    else:
        worker.crash()
    tokens += [token.id for token in stream]
    assert tokens == undisturbed[kind]
    [replay] = stream.replays
    assert "SESSION_UNKNOWN" in replay.reason
    stream.close()
    eventually(lambda: len(fleet.sessions()) == 2 and fleet.fleet.lost == 1)  # there is a new one in its place


def test_while_no_worker_is_left_devices_wait_for_the_next(make_fleet, open_model, undisturbed):
    fleet = make_fleet(1)
    stream = open_model(fleet.address).tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS["sampled"])
    tokens = [next(iter(stream)).id for _ in range(5)]
    fleet.workers[0].crash()
    assert tokens + [token.id for token in stream] == undisturbed["sampled"]
    stream.close()


def test_a_device_that_can_go_on_alone_does(make_fleet, open_model, tiny):
    bundle = Path(tiny.bundle(bits=8, split=2, device_layers="all"))
    fleet = make_fleet(1, half=bundle / "server")
    model = open_model(fleet.address, half=bundle / "device", codec="raw32")
    expected = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS["sampled"]).token_ids
    stream = model.tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS["sampled"])
    tokens = [next(iter(stream)).id for _ in range(5)]
    fleet.workers[0].crash()
    tokens += [token.id for token in stream]
    assert tokens == expected
    assert stream.moves
    stream.close()


def test_a_device_comes_back_to_its_worker(make_fleet, open_model, make_proxy, undisturbed):
    fleet = make_fleet(3)
    proxy = make_proxy(fleet.address)
    stream = open_model(proxy.address).tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS["sampled"])
    tokens = [next(iter(stream)).id for _ in range(5)]
    before = fleet.sessions()
    proxy.cut()
    tokens += [token.id for token in stream]
    assert tokens == undisturbed["sampled"]
    assert not stream.replays
    assert fleet.sessions() == before
    stream.close()


def test_a_device_that_vanishes_leaves_nothing(make_fleet, open_model, make_proxy):
    fleet = make_fleet(2, lease_s=0.2)
    proxy = make_proxy(fleet.address)
    stream = open_model(proxy.address).tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=Sampling())
    next(iter(stream))
    proxy.accepting = False
    proxy.cut()
    eventually(lambda: fleet.sessions() == [0, 0])
    eventually(lambda: [worker.server.sessions for worker in fleet.workers] == [0, 0])


def test_a_full_fleet_says_so(make_fleet, open_model):
    fleet = make_fleet(2, max_sessions=1)
    streams = [open_model(fleet.address).tokens(PROMPT, max_new_tokens=8, sampling=Sampling()) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    with pytest.raises(ProtocolError, match="SERVER_FULL"):
        open_model(fleet.address).generate(PROMPT, max_new_tokens=1, sampling=Sampling())
    streams[0].close()
    assert open_model(fleet.address).generate(PROMPT, max_new_tokens=1, sampling=Sampling()).token_ids
    streams[1].close()


def test_a_fleet_grows_when_it_is_full(make_fleet, open_model, monkeypatch):
    monkeypatch.setattr("isthmus.runtime.fleet.scaling.GROW_AFTER_S", 0.1)
    monkeypatch.setattr("isthmus.runtime.fleet.scaling.SHRINK_AFTER_S", 0.2)
    fleet = make_fleet(1, 3, max_sessions=2)
    streams = []
    for count in (1, 2, 3):
        eventually(lambda count=count: len(fleet.sessions()) == count)
        for _ in range(2):
            streams.append(open_model(fleet.address).tokens(PROMPT, max_new_tokens=8, sampling=Sampling()))
            next(iter(streams[-1]))
    for stream in streams:
        stream.close()
    eventually(lambda: fleet.sessions() == [0])


def test_a_new_bundle_takes_over_without_ending_a_session(make_fleet, open_model, tiny, folder, tmp_path, undisturbed):
    current = tmp_path / "current"
    current.symlink_to(folder)
    fleet = make_fleet(2, half=current / "server")
    stream = open_model(fleet.address).tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS["sampled"])
    tokens = [next(iter(stream)).id for _ in range(5)]
    second = Path(tiny.bundle(bits=4, split=2))
    current.unlink()
    current.symlink_to(second)
    fleet.call(fleet.fleet.roll)
    eventually(lambda: fleet.fleet.current.manifest.back_bits == 4)
    assert open_model(fleet.address, half=second / "device").generate(PROMPT, max_new_tokens=3).token_ids
    with pytest.raises(ProtocolError, match="MANIFEST_MISMATCH"):
        open_model(fleet.address).generate(PROMPT, max_new_tokens=3)
    # Even a worker that dies now does not end the old bundle's session.
    eventually(lambda: len(fleet.sessions()) == 3)
    [worker] = fleet.busy()
    worker.crash()
    tokens += [token.id for token in stream]
    assert tokens == undisturbed["sampled"]
    assert len(stream.replays) == 1
    stream.close()
    eventually(lambda: len(fleet.sessions()) == 2)  # the new bundle's


def test_a_fleet_rolls_back(make_fleet, open_model, tiny, folder, tmp_path, undisturbed):
    current = tmp_path / "current"
    current.symlink_to(folder)
    fleet = make_fleet(1, half=current / "server")
    streams = {}
    for bits, bundle in ((8, folder), (4, Path(tiny.bundle(bits=4, split=2))), (8, folder)):
        current.unlink()
        current.symlink_to(bundle)
        fleet.call(fleet.fleet.roll)
        fleet.call(fleet.fleet.roll)  # once is enough
        eventually(lambda bits=bits: fleet.fleet.current.manifest.back_bits == bits)
        stream = open_model(fleet.address, half=bundle / "device").tokens(
            PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS["sampled"]
        )
        streams[stream] = [next(iter(stream)).id]
    for stream, tokens in streams.items():
        tokens += [token.id for token in stream]
        stream.close()
        assert not stream.replays
    first, _, third = streams.values()
    assert first == third == undisturbed["sampled"]
    eventually(lambda: len(fleet.sessions()) == 1)


def test_a_damaged_new_bundle_changes_nothing(make_fleet, open_model, tiny, folder, tmp_path, caplog):
    current = tmp_path / "current"
    current.symlink_to(folder)
    fleet = make_fleet(1, half=current / "server")
    broken = tmp_path / "broken"
    broken.mkdir()
    for half in ("device", "server"):
        os.symlink(Path(tiny.bundle(bits=4, split=2)) / half, broken / half)
    current.unlink()
    current.symlink_to(broken / "nothing")
    fleet.call(fleet.fleet.roll)
    eventually(lambda: "stays with" in caplog.text)
    assert open_model(fleet.address).generate(PROMPT, max_new_tokens=1).token_ids


def test_a_fleet_tells_how_it_is(make_fleet, open_model):
    fleet = make_fleet(2, metrics="127.0.0.1:0")

    def told() -> dict[str, float]:
        with urlopen(f"http://{fleet.front.metrics_address}/metrics", timeout=10) as answer:
            return parse_metrics(answer.read().decode())

    stream = open_model(fleet.address).tokens(PROMPT, max_new_tokens=8, sampling=Sampling())
    next(iter(stream))
    before = told()
    assert (before["workers"], before["sessions"], before["sessions_carried"]) == (2, 1, 1)
    assert 0 < before["kv_bytes"] < before["kv_budget_bytes"]
    eventually(lambda: told()["workers_sessions"] == 1 and told()["workers_kv_bytes"] > 0)
    fleet.busy()[0].crash()
    list(stream)
    stream.close()
    eventually(lambda: (told()["workers_lost"], told()["workers"]) == (1, 2))
    after = told()
    assert (after["sessions"], after["sessions_carried"], after["kv_bytes"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("given", "least", "most"),
    [
        ({}, 2, 2),
        ({"workers": 3}, 3, 3),
        ({"least": 1}, 1, 2),
        ({"least": 3}, 3, 3),
        ({"most": 1}, 1, 1),
        ({"most": 5}, 2, 5),
        ({"least": 1, "most": 4}, 1, 4),
    ],
)
def test_a_plan_fills_in_what_is_not_said(given, least, most):
    plan = FleetPlan.of(**given)
    assert (plan.least, plan.most) == (least, most)
    assert plan.options.threads >= 1


@pytest.mark.parametrize(
    "given", [{"workers": 2, "least": 1}, {"workers": 0}, {"least": 3, "most": 2}, {"stages": 0}], ids=str
)
def test_a_plan_that_contradicts_itself_is_refused(given):
    with pytest.raises(RequestError, match=r"give one|must be"):
        FleetPlan.of(**given)


@pytest.mark.parametrize("patience", [0.0, 30.0])
def test_a_fleet_drains(make_fleet, open_model, undisturbed, patience):
    first, second = make_fleet(2), make_fleet(1)
    stream = open_model(first.address, second.address).tokens(
        PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS["sampled"]
    )
    tokens = [next(iter(stream)).id for _ in range(5)]
    draining = threading.Thread(target=lambda: first.run(first.front.drain(patience)))
    draining.start()
    eventually(lambda: first.front._service.draining)
    if not patience:
        eventually(lambda: not first.fleet.pins.carried)
    with pytest.raises(LinkError):
        open_model(first.address).generate(PROMPT, max_new_tokens=1)
    tokens += [token.id for token in stream]
    stream.close()
    draining.join()
    assert tokens == undisturbed["sampled"]
    assert [replay.address for replay in stream.replays] == ([] if patience else [second.address])
