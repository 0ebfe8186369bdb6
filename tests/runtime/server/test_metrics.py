"""What a server tells of itself, over real sockets."""

from __future__ import annotations

import json
from urllib.request import urlopen

import pytest

from isthmus.cli.main import main
from isthmus.errors import LinkError, ProtocolError
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.metrics import parse_metrics
from isthmus.runtime.server.server import BackServer

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture
def server(engine, user_config):
    with BackServer(engine, limits=ServerLimits(max_sessions=1), metrics="127.0.0.1:0") as server:
        yield server


def scrape(server: BackServer) -> dict[str, float]:
    with urlopen(f"http://{server.metrics_address}/metrics") as answer:
        return parse_metrics(answer.read().decode())


def test_what_passes_is_counted(server, make_generation, make_link):
    assert scrape(server)["sessions"] == 0
    generation = make_generation(server.address, PROMPT)
    generation.run(3)
    with pytest.raises(ProtocolError, match="SERVER_FULL"):
        make_link(server.address, on_server_loss="fail").open(8, Sampling())
    found = scrape(server)
    assert found["sessions"] == found["sessions_carried"] == found["sessions_opened_total"] == 1
    assert found["tokens_total"] == 3
    assert found["steps_total"] == 4  # the prompt went up in two frames
    assert found["steps_run"] == found["runs"] == 4
    assert found["payload_bytes_total{codec=raw32}"] == 4 * 16 * (len(PROMPT) + 2)
    assert found["faults_total{code=SERVER_FULL}"] == 1
    assert found["step_seconds_count{part=compute}"] == 4
    assert found["kv_bytes"] == 64 * 512
    assert found["prefix_tokens_asked"] == len(PROMPT) - 1  # the last one's row runs in any case
    assert found["prefix_tokens_reused"] == found["prefix_cache_bytes"] == found["frames_held"] == 0


def test_top_shows_them(server, make_generation, capsys):
    make_generation(server.address, PROMPT).run(2)
    assert main(["top", server.metrics_address, "--once"]) == 0
    printed = capsys.readouterr().out
    assert "MB received, raw32" in printed
    assert "1, 1" in printed
    assert main(["top", server.metrics_address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_total"] == 2


def test_an_address_without_metrics_is_named(capsys):
    assert main(["top", "127.0.0.1:1", "--once"]) == 1
    assert "isthmus serve --metrics" in capsys.readouterr().err


def test_a_metrics_port_in_use_is_named(server, engine):
    with pytest.raises(LinkError, match="for metrics"):
        BackServer(engine, metrics=server.metrics_address).start()


def test_without_metrics_there_is_no_port(engine, user_config):
    with BackServer(engine) as server:
        assert server.metrics_address is None
