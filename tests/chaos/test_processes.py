"""Real server processes that are killed, stopped and started again while devices generate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import LinkError
from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire.security import ChannelSecurity

PROMPT = list(range(1, 200)) * 2  # several frames
NEW_TOKENS = 40
SAMPLED = Sampling(temperature=1.1, top_k=40, repetition_penalty=1.1, seed=5)


class Server:
    """An ``isthmus serve`` process."""

    def __init__(self, folder: Path, home: Path, listen: str = "127.0.0.1:0", *options: str) -> None:
        command = [sys.executable, "-m", "isthmus.cli.main", "serve", str(folder), "--listen", listen, "--insecure"]
        environment = os.environ | {"HOME": str(home), "XDG_CONFIG_HOME": str(home)}
        self._process = subprocess.Popen(
            [*command, "--threads", "1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().split(" on ")[1].split()[0]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)

    def drain(self) -> None:
        self._process.terminate()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.go_on()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def folder(tiny: Any) -> Path:
    return Path(tiny.bundle(bits=8, split=2))


@pytest.fixture
def serve(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(listen: str = "127.0.0.1:0", *options: str) -> Server:
        servers.append(Server(folder / "server", tmp_path, listen, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RemoteBack.__init__.__kwdefaults__, "step_timeout", 2.0)
    monkeypatch.setitem(RemoteBack.__init__.__kwdefaults__, "connect_timeout", 2.0)


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The undisturbed run."""
    server = Server(folder / "server", tmp_path_factory.mktemp("home"))
    try:
        tokens = open_model(folder, server.address).generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)
    finally:
        server.end()
    return tokens.token_ids


def open_model(folder: Path, *addresses: str, **options: Any) -> EdgeModel:
    options = {"codec": "tabq", "threads": 1} | options
    return EdgeModel(folder / "device", server=",".join(addresses), security=ChannelSecurity(insecure=True), **options)


class At:
    """Does something when the device computes its n-th chunk: the prompt has four, then each token or draft is one."""

    def __init__(self, embedding: Any, chunk: int, action: Callable[[], None]) -> None:
        self._embedding, self._left, self._action = embedding, chunk, action

    def rows(self, ids: list[int]) -> Any:
        self._left -= 1
        if self._left == 0:
            self._action()
        return self._embedding.rows(ids)


PHASES = {"as the prompt begins": 1, "in the prompt": 3, "at the first token": 5, "in the text": 17}


@pytest.mark.parametrize("draft", ["off", "auto"])
@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_another_server_takes_over(folder, serve, expected, phase, fault, draft):
    first, second = serve(), serve()
    model = open_model(folder, first.address, second.address, draft=draft)
    model._embedding = At(model._embedding, phase, getattr(first, fault))  # type: ignore[assignment]
    result = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)
    assert result.token_ids == expected
    assert [replay.address for replay in result.replays] == [second.address]


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_server_that_is_gone_before_it_begins_is_passed_over(folder, serve, expected, fault):
    first, second = serve(), serve()
    getattr(first, fault)()
    model = open_model(folder, first.address, second.address)
    assert model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED).token_ids == expected


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_server_that_is_gone_at_the_end_costs_nothing(folder, serve, expected, fault):
    server = serve()
    model = open_model(folder, server.address)
    stream = model.tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)
    tokens = [token.id for token in stream]
    getattr(server, fault)()
    stream.close()
    assert tokens == expected


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_a_server_that_stood_still_goes_on(folder, serve, expected, phase):
    server = serve()

    def pause() -> None:
        server.stop()
        timer = threading.Timer(3.0, server.go_on)
        timer.daemon = True
        timer.start()

    model = open_model(folder, server.address)
    model._embedding = At(model._embedding, phase, pause)  # type: ignore[assignment]
    result = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)
    assert result.token_ids == expected


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_a_server_that_is_started_again_gets_its_sessions_back(folder, serve, expected, phase):
    server = serve()

    def restart() -> None:
        server.kill()
        serve(server.address)

    model = open_model(folder, server.address)
    model._embedding = At(model._embedding, phase, restart)  # type: ignore[assignment]
    result = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)
    assert result.token_ids == expected
    assert [replay.address for replay in result.replays] == [server.address]


def test_a_server_that_drains_lets_short_generations_end(folder, serve, expected):
    server = serve()
    model = open_model(folder, server.address)
    model._embedding = At(model._embedding, 8, server.drain)  # type: ignore[assignment]
    result = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)
    assert result.token_ids == expected
    assert not result.replays


@pytest.mark.parametrize("draft", ["off", "auto"])
def test_a_server_that_drains_sends_long_generations_elsewhere(folder, serve, expected, draft):
    first, second = serve("127.0.0.1:0", "--drain-timeout", "0.1"), serve()
    model = open_model(folder, first.address, second.address, draft=draft)
    stream = model.tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)
    tokens = []
    for token in stream:
        tokens.append(token.id)
        if len(tokens) == 6:
            first.drain()
            time.sleep(1.0)
    stream.close()
    assert tokens == expected
    assert [replay.address for replay in stream.replays] == [second.address]
    assert "DRAINING" in stream.replays[0].reason
    other = open_model(folder, first.address, second.address).generate(PROMPT, max_new_tokens=3, sampling=SAMPLED)
    assert other.token_ids == expected[:3]


def test_without_another_server_the_error_names_what_to_do(folder, serve, monkeypatch):
    monkeypatch.setattr("isthmus.runtime.edge.remote_session.MAX_ATTEMPTS", 3)
    server = serve()
    model = open_model(folder, server.address)
    model._embedding = At(model._embedding, 8, server.kill)  # type: ignore[assignment]
    with pytest.raises(LinkError, match=r"attempts to restore the session failed: .*further addresses"):
        model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)


def test_many_devices_go_through_a_restart(folder, serve, expected):
    server = serve()
    gate, results, started = threading.Event(), [], threading.Semaphore(0)

    def device() -> None:
        model = open_model(folder, server.address, draft="off")
        stream = model.tokens(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLED)
        tokens = []
        for token in stream:
            tokens.append(token.id)
            if len(tokens) == 5:
                started.release()
                gate.wait(60)
        stream.close()
        results.append(tokens)

    threads = [threading.Thread(target=device) for _ in range(20)]
    for thread in threads:
        thread.start()
    for _ in threads:
        started.acquire(timeout=60)
    server.kill()
    serve(server.address)
    gate.set()
    for thread in threads:
        thread.join(120)
    assert results == [expected] * len(threads)
