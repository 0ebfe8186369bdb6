"""`isthmus link` as a process: its line, its signals, its errors, and a generation through it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from isthmus.devices.link import LINKS
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

PROMPT = "A prompt of bytes."


@pytest.fixture
def link(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "isthmus.cli.main", "-v", "link", *map(str, arguments)]
        pipe = subprocess.PIPE
        environment = os.environ | {"HOME": str(tmp_path)}
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def target() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_line_when_ready_and_a_clean_end(link, target, number):
    process = link("--listen", "127.0.0.1:0", "--connect", target, "--rtt", "80ms", "--rate", "10mbit", "--loss", "1%")
    line = process.stdout.readline()
    assert line.startswith("isthmus: link on 127.0.0.1:")
    assert line.endswith(f" to {target} (80 ms, 10 Mbit/s up, 10 Mbit/s down, 1 % lost)\n")
    host, port = line.split(" on ")[1].split()[0].split(":")
    with socket.create_connection((host, int(port))):
        process.send_signal(number)
        rest, errors = process.communicate(timeout=20)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_options_change_a_preset(link, target):
    process = link("--connect", target, "--preset", "flaky-train", "--rate-up", "1mbit", "--stall", "5s,1s")
    assert "(120 ms, 1 Mbit/s up, 5 Mbit/s down, ± 40 ms, 1 % lost, stalls 1 s at 5 s)" in process.stdout.readline()


def test_a_trace_takes_the_place_of_the_preset(link, target, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,rate_mbit_s,rtt_ms\n0,10,40\n5,0.2,40\n10,10,40\n")
    assert f"(trace {trace})" in link("--connect", target, "--trace", trace, "--loop").stdout.readline()


def test_the_presets_are_listed_as_a_table_and_as_json(link):
    table, errors = link("--list").communicate(timeout=20)
    assert not errors
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(LINKS)
    text, _ = link("--list", "--json").communicate(timeout=20)
    presets = {preset["name"]: preset for preset in json.loads(text)}
    assert presets["lte"]["rtt_ms"] == LINKS["lte"].rtt_ms
    assert presets["loopback"]["up_mbit_s"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no target: give its address with --connect"),
        (["--connect", "localhost"], "address 'localhost': must be HOST:PORT"),
        (["--connect", "127.0.0.1:1"], "cannot reach the target 127.0.0.1:1: "),
        (["--connect", "127.0.0.1:1", "--listen", "7070"], "address '7070'"),
        (["--connect", "127.0.0.1:1", "--preset", "5g"], "'5g': is no preset; choose one of"),
        (["--connect", "127.0.0.1:1", "--rtt", "80"], "duration '80': must be a number with its unit"),
        (["--connect", "127.0.0.1:1", "--rate", "fast"], "rate 'fast'"),
        (["--connect", "127.0.0.1:1", "--loss", "2"], "loss 2 of the packets"),
        (["--connect", "127.0.0.1:1", "--stall", "3s"], "stall '3s': must be AT,FOR"),
        (["--connect", "127.0.0.1:1", "--drop-after", "20"], "drop after '20'"),
        (["--connect", "127.0.0.1:1", "--trace", "none.csv"], "trace none.csv: cannot be read"),
        (["--connect", "127.0.0.1:1", "--json"], "--json needs --list"),
        (["--connect", "127.0.0.1:1", "--loop"], "--loop needs --trace"),
        (["--connect", "127.0.0.1:1", "--trace", "t", "--rtt", "1ms"], "--trace with --rtt"),
    ],
)
def test_options_of_no_use_are_errors(link, arguments, message):
    output, errors = (process := link(*arguments)).communicate(timeout=20)
    assert process.returncode == 1
    assert output == ""
    assert errors.startswith("isthmus: error: ")
    assert message in errors
    assert "Traceback" not in errors


def test_a_target_that_is_down_is_no_error_if_so_asked(link):
    assert "link on" in link("--connect", "127.0.0.1:1", "--no-check").stdout.readline()


def test_a_generation_through_a_bad_link_gives_the_same_tokens(tiny, link):
    folder = tiny.bundle(bits=4, split=2)
    plain = ServerSecurity(insecure=True)
    with BackServer.from_bundle(folder / "server", threads=1, security=plain) as server:

        def generate(address: str) -> tuple[list[int], int]:
            security = ChannelSecurity(insecure=True)
            options = {"codec": "raw16", "threads": 1, "draft": "off"}  # as many bytes in every run
            model = EdgeModel(folder / "device", server=address, security=security, **options)
            result = model.generate(PROMPT, max_new_tokens=24)
            return result.token_ids, result.bytes_up

        expected = generate(server.address)
        shaped = ["--rtt", "10ms", "--rate", "5mbit", "--jitter", "4ms", "--stall", "100ms,200ms"]
        process = link("--connect", server.address, *shaped)
        assert generate(process.stdout.readline().split(" on ")[1].split()[0]) == expected
        process = link("--connect", server.address, "--drop-after", "4kB")
        tokens, _ = generate(process.stdout.readline().split(" on ")[1].split()[0])
    assert tokens == expected[0]
    process.send_signal(signal.SIGINT)
    assert "connection ended: dropped after" in process.communicate(timeout=20)[1]
