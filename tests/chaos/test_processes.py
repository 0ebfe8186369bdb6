"""Real server processes that are killed, stopped and started again while devices generate."""

from __future__ import annotations

import threading
import time

import pytest

from isthmus.errors import LinkError

pytestmark = pytest.mark.usefixtures("impatient")

PHASES = {"as the prompt begins": 1, "in the prompt": 3, "at the first token": 5, "in the text": 17}
DEVICES = 50


@pytest.mark.parametrize("draft", ["off", "auto"])
@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_another_server_takes_over(serve, standby, device, expected, phase, fault, draft):
    first = serve()
    one = device(first.address, standby.address, draft=draft)
    one.at(phase, getattr(first, fault))
    result = one.generate()
    assert result.token_ids == expected
    assert [replay.address for replay in result.replays] == [standby.address]


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_server_that_is_gone_before_it_begins_is_passed_over(serve, standby, device, expected, fault):
    first = serve()
    getattr(first, fault)()
    assert device(first.address, standby.address).generate().token_ids == expected


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_server_that_is_gone_at_the_end_costs_nothing(serve, device, expected, fault):
    server = serve()
    stream = device(server.address).tokens()
    tokens = [token.id for token in stream]
    getattr(server, fault)()
    stream.close()
    assert tokens == expected


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_a_server_that_stood_still_goes_on(serve, device, expected, phase):
    server = serve()

    def pause() -> None:
        server.stop()
        timer = threading.Timer(3.0, server.go_on)
        timer.daemon = True
        timer.start()

    one = device(server.address)
    one.at(phase, pause)
    assert one.generate().token_ids == expected


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_a_server_that_is_started_again_gets_its_sessions_back(serve, device, expected, phase):
    server = serve()

    def restart() -> None:
        server.kill()
        serve(server.address)

    one = device(server.address)
    one.at(phase, restart)
    result = one.generate()
    assert result.token_ids == expected
    assert [replay.address for replay in result.replays] == [server.address]


def test_a_server_that_drains_lets_short_generations_end(serve, device, expected):
    server = serve()
    one = device(server.address)
    one.at(8, server.drain)
    result = one.generate()
    assert result.token_ids == expected
    assert not result.replays


@pytest.mark.parametrize("draft", ["off", "auto"])
def test_a_server_that_drains_sends_long_generations_elsewhere(serve, standby, device, expected, draft):
    first = serve("127.0.0.1:0", "--drain-timeout", "0.1")
    stream = device(first.address, standby.address, draft=draft).tokens()
    tokens = []
    for token in stream:
        tokens.append(token.id)
        if len(tokens) == 6:
            first.drain()
            time.sleep(1.0)
    stream.close()
    assert tokens == expected
    assert [replay.address for replay in stream.replays] == [standby.address]
    assert "DRAINING" in stream.replays[0].reason
    assert device(first.address, standby.address).generate(3).token_ids == expected[:3]


def test_without_another_server_the_error_names_what_to_do(serve, device, monkeypatch):
    monkeypatch.setattr("isthmus.runtime.edge.remote_session.MAX_ATTEMPTS", 3)
    server = serve()
    one = device(server.address)
    one.at(8, server.kill)
    with pytest.raises(LinkError, match=r"attempts to restore the session failed: .*further addresses"):
        one.generate()


def test_many_devices_go_through_a_restart(serve, device, expected):
    server = serve()
    gate, results, started = threading.Event(), [], threading.Semaphore(0)

    def generate() -> None:
        stream = device(server.address, draft="off").tokens()
        tokens = []
        for token in stream:
            tokens.append(token.id)
            if len(tokens) == 5:
                started.release()
                gate.wait(60)
        stream.close()
        results.append(tokens)

    threads = [threading.Thread(target=generate) for _ in range(DEVICES)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert started.acquire(timeout=60)
    server.kill()
    serve(server.address)
    gate.set()
    for thread in threads:
        thread.join(120)
    assert results == [expected] * DEVICES
