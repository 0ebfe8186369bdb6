"""A session that is lost with its server is made again, and gives the tokens that it would have given."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import LinkError, RequestError
from isthmus.runtime.edge.journal import Journal
from isthmus.runtime.edge.link import MAX_ATTEMPTS
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import crc_matches, step_message
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
TEXT = "to be or not to be, that is the question"
SAMPLINGS = {
    "greedy": Sampling(),
    "penalty": Sampling(repetition_penalty=1.3),
    "filtered": Sampling(temperature=1.1, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=2**63),
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.runtime.edge.link._FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("isthmus.runtime.edge.link._LONGEST_DELAY_S", 0.05)


@pytest.mark.parametrize("lost_after", [0, 1, 2, 7])
def test_another_server_goes_on_with_the_same_tokens(make_server, make_generation, expected, lost_after):
    first, second = make_server(), make_server()
    generation = make_generation([first.address, second.address], PROMPT, seed=3)
    generation.run(lost_after)
    first.stop(0)
    assert generation.run(12 - lost_after) == expected(PROMPT, 12, seed=3)
    (replay,) = generation.link.replays
    assert replay.address == second.address
    assert replay.steps == (0 if not lost_after else 4 + lost_after - 1)
    assert generation.link.reattached == 0


def test_a_server_that_was_started_again_is_taken_too(engine, user_config, make_generation, expected):
    server = BackServer(engine)
    address = server.start()
    generation = make_generation(address, PROMPT)
    generation.run(3)
    server.stop(0)
    with BackServer(engine, address):
        assert generation.run(5) == expected(PROMPT, 8)
        assert [replay.address for replay in generation.link.replays] == [address]
        assert "SESSION_UNKNOWN" in generation.link.replays[0].reason or "broke" in generation.link.replays[0].reason


def test_a_session_that_failed_on_its_server_is_made_again(make_server, make_generation, engine, expected):
    generation = make_generation(make_server().address, PROMPT)
    generation.run(3)
    engine.fail_at = len(PROMPT) + 2

    def heal() -> None:
        engine.fail_at = -1

    timer = threading.Timer(0.05, heal)
    timer.start()
    assert generation.run(4) == expected(PROMPT, 7)
    timer.join()
    assert generation.link.replays


def test_a_session_can_be_lost_again_and_again(make_server, make_generation, expected):
    servers = [make_server() for _ in range(4)]
    generation = make_generation([server.address for server in servers], PROMPT, seed=9)
    for server in servers[:-1]:
        generation.run(2)
        server.stop(0)
    assert generation.run(4) == expected(PROMPT, 10, seed=9)
    assert len(generation.link.replays) == 3


def test_what_was_rolled_back_is_not_made_again(make_server, make_link, hidden):
    first, second = make_server(), make_server()
    link = make_link([first.address, second.address])
    link.open(64, Sampling())
    link.step(hidden(range(6), 0), 0, sample=True)
    link.step(hidden([9, 9], 6), 6, sample=True)
    link.step(hidden([7], 4), 4, sample=True)  # four positions are kept of the first step
    first.stop(0)
    again = link.step(hidden([8], 5), 5, sample=True).token
    assert link.replays[0].steps == 2
    other = make_link(second.address)
    other.open(64, Sampling())
    rows = np.concatenate([hidden(range(6), 0)[:4], hidden([7], 4), hidden([8], 5)])
    assert other.step(rows, 0, sample=True).token == again


def test_attempts_are_finite(make_server, make_generation):
    server = make_server()
    generation = make_generation(server.address, PROMPT)
    generation.run(1)
    server.stop(0)
    with pytest.raises(
        LinkError, match=f"{MAX_ATTEMPTS} attempts to restore the session failed: .*--on-server-loss wait"
    ):
        generation.run(1)


def test_waiting_ends_too(make_server, make_generation, monkeypatch):
    monkeypatch.setattr("isthmus.runtime.edge.link.WAIT_S", 0.5)
    server = make_server()
    generation = make_generation(server.address, PROMPT, on_server_loss="wait")
    generation.run(1)
    server.stop(0)
    with pytest.raises(LinkError, match="attempts to restore the session failed"):
        generation.run(1)


def test_who_is_to_fail_fails_at_once(make_server, make_generation):
    first, second = make_server(), make_server()
    generation = make_generation([first.address, second.address], PROMPT, on_server_loss="fail")
    generation.run(1)
    first.stop(0)
    with pytest.raises(LinkError):
        generation.run(1)
    assert generation.link.replays == []


def test_a_session_that_outgrew_its_journal_cannot_be_made_again(make_server, make_generation):
    first, second = make_server(), make_server()
    generation = make_generation([first.address, second.address], PROMPT, journal_bytes=2000)
    generation.run(30)
    first.stop(0)
    with pytest.raises(LinkError, match="more than the 0 MB that are kept"):
        generation.run(1)


def test_a_full_server_is_passed_over(make_server, make_generation, expected):
    first, full, third = make_server(), make_server(max_sessions=1), make_server()
    other = make_generation(full.address, [1])
    other.run(1)
    generation = make_generation([first.address, full.address, third.address], PROMPT)
    generation.run(2)
    first.stop(0)
    assert generation.run(3) == expected(PROMPT, 5)
    assert generation.link.replays[0].address == third.address
    assert other.run(1) == expected([1], 2)


def test_a_server_of_another_export_is_passed_over(make_server, make_generation, engine, expected, user_config):
    first, third = make_server(), make_server()
    stranger_engine = type(engine)(manifest_sha256="b" * 64)
    with BackServer(stranger_engine) as stranger:
        generation = make_generation([first.address, stranger.address, third.address], PROMPT)
        generation.run(2)
        first.stop(0)
        assert generation.run(3) == expected(PROMPT, 5)
        assert generation.link.replays[0].address == third.address


def test_opening_takes_the_first_server_that_is_there(make_server, make_generation, expected):
    gone, there = make_server(), make_server()
    gone.stop(0)
    assert make_generation([gone.address, there.address], PROMPT).run(2) == expected(PROMPT, 2)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("codec", ["raw32", "tabq"])
@pytest.mark.parametrize("draft", ["off", "auto"])
def test_a_real_model_goes_on_with_the_same_tokens(repeating: Path, user_config, eager, sampling, codec, draft):
    options: dict[str, Any] = {"codec": codec, "threads": 1, "draft": draft}
    security = ChannelSecurity(insecure=True)
    servers = [
        BackServer.from_bundle(repeating / "server", threads=1, security=ServerSecurity(insecure=True))
        for _ in range(2)
    ]
    addresses = [server.start() for server in servers]
    try:
        model = EdgeModel(repeating / "device", server=",".join(addresses), security=security, **options)
        plain = model.generate(TEXT, max_new_tokens=60, sampling=sampling)
        stream = model.tokens(TEXT, max_new_tokens=60, sampling=sampling)
        tokens = []
        for token in stream:
            tokens.append(token.id)
            if len(tokens) == 20:
                servers[0].stop(0)
        stream.close()
        assert tokens == plain.token_ids
        assert [replay.address for replay in stream.replays] == [addresses[1]]
    finally:
        for server in servers:
            server.stop(0)


@pytest.mark.parametrize("policy", ["local", "never"])
def test_a_policy_that_a_bundle_cannot_follow_is_refused(repeating: Path, policy):
    with pytest.raises(RequestError, match=policy):
        EdgeModel(repeating / "device", server="127.0.0.1:1", on_server_loss=policy)


def step(number: int, position: int, tokens: int, *, sample: bool = True, drafted: tuple[int, ...] = ()) -> bytes:
    return step_message(number, position, tokens, sample, b"x" * tokens, drafted)


def replayed(journal: Journal, acknowledged: int) -> list[tuple[int, int, int, bool, list[int]]]:
    messages, _ = journal.replay(acknowledged)
    steps = [pb.ClientMessage.FromString(message).step for message in messages]
    assert all(crc_matches(each) for each in steps)
    return [(s.step, s.position, s.frame.tokens, s.sample, list(s.frame.drafted)) for s in steps]


def test_steps_ask_again_from_the_last_one_that_is_no_guess():
    journal = Journal()
    journal.sent(1, 0, step(1, 0, 4))
    journal.answered(pb.Result(step=1, length=4, token=50))
    journal.sent(2, 4, step(2, 4, 1))
    journal.sent(3, 5, step(3, 5, 2, drafted=(51, 52)))
    journal.sent(4, 7, step(4, 7, 1, drafted=(51, 52, 53)))
    journal.sent(5, 8, step(5, 8, 1, drafted=(99,)))
    journal.answered(pb.Result(step=2, length=5, token=51))
    journal.answered(pb.Result(step=3, length=7, tokens=[52, 53]))
    journal.answered(pb.Result(step=4, length=8, tokens=[54]))
    journal.answered(pb.Result(step=5, length=8))
    assert replayed(journal, 5) == [
        (1, 0, 4, False, []),
        (2, 4, 1, True, []),
        (3, 5, 2, True, [51, 52]),
        (4, 7, 1, True, [51, 52, 53]),
    ]
    assert journal.replay(5)[1] == [50]


def test_only_the_last_step_asks_again():
    journal = Journal()
    journal.sent(1, 0, step(1, 0, 4))
    journal.answered(pb.Result(step=1, length=4, token=50))
    journal.sent(2, 4, step(2, 4, 3, drafted=(51, 52)))
    journal.answered(pb.Result(step=2, length=6, tokens=[51, 60]))
    journal.sent(3, 6, step(3, 6, 1))
    journal.answered(pb.Result(step=3, length=7, token=61))
    journal.sent(4, 7, step(4, 7, 1))
    assert replayed(journal, 3) == [(1, 0, 4, False, []), (2, 4, 3, False, []), (3, 6, 1, True, [])]
    assert journal.replay(3)[1] == [50, 51, 60]
    journal.renumber(3, {4: 4})
    assert replayed(journal, 4)[-1] == (4, 7, 1, True, [])
    assert journal.replay(4)[1] == [50, 51, 60, 61]
