"""`isthmus serve` as a process: its line, its signals, its errors."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

import pytest

from isthmus.cli.main import main
from isthmus.errors import LinkError
from isthmus.runtime.server.server import BackServer

# The command with a back half that needs no model.
PROGRAM = """
import argparse, sys
from dataclasses import dataclass
from types import SimpleNamespace
from isthmus.cli import serve
from isthmus.errors import IsthmusError
from isthmus.runtime.server.server import BackServer

def from_bundle(folder, listen, *, threads, security, limits, memory_limit_mb, metrics, audit):
    architecture = SimpleNamespace(layers=30, d_model=16, vocab_size=256)
    manifest = SimpleNamespace(split=10, architecture=architecture, max_length=64, codecs=("raw32",))
    engine = SimpleNamespace(manifest=manifest, manifest_sha256="a" * 64)
    return BackServer(engine, listen, security=security, limits=limits, metrics=metrics, audit=audit)

BackServer.from_bundle = from_bundle
parser = argparse.ArgumentParser()
serve.configure(parser)
try:
    sys.exit(serve.run(parser.parse_args()))
except IsthmusError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def serve(tmp_path):
    processes = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, "out/server", *arguments]
        environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_line_when_ready_and_a_clean_end(serve, number):
    process = serve("--listen", "127.0.0.1:0")
    line = process.stdout.readline()
    assert line.startswith("isthmus: serving layers 10–29 on 127.0.0.1:")
    assert "tls, certificate " in line
    assert "dev-cert.pem" in line
    process.send_signal(number)
    rest, errors = process.communicate(timeout=20)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_plaintext_only_where_asked(serve):
    assert "(plaintext)" in serve("--listen", "127.0.0.1:0", "--insecure").stdout.readline()


def test_a_port_in_use_is_an_error(serve):
    address = serve("--listen", "127.0.0.1:0", "--insecure").stdout.readline().split(" on ")[1].split()[0]
    second = serve("--listen", address, "--insecure")
    output, errors = second.communicate(timeout=20)
    assert second.returncode == 1
    assert output == ""
    assert f"LinkError: cannot listen on {address}" in errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tls-cert", "missing.pem", "--tls-key", "missing.key"], "SecurityError: certificate missing.pem"),
        (["--tls-cert", "missing.pem"], "SecurityError: a certificate and its key"),
        (["--lease", "0"], "RequestError: lease_s=0"),
        (["--prefix-cache", "64"], "RequestError: size '64'"),
        (["--device-frames", "-1"], "RequestError: frames_per_s_per_device=-1"),
        (["--listen", "7070"], "LinkError: address '7070'"),
    ],
)
def test_options_of_no_use_are_errors(serve, arguments, named):
    process = serve("--listen", "127.0.0.1:0", *arguments)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert named in errors


def test_a_cache_of_prompts_may_be_sized_shared_or_left_out(monkeypatch):
    taken = {}

    def from_bundle(folder, listen, *, limits, **rest):
        taken["limits"] = limits
        raise LinkError("seen")

    monkeypatch.setattr(BackServer, "from_bundle", from_bundle)
    for arguments, expected in (
        ([], (64_000_000, False, 1000.0)),
        (["--prefix-cache", "0"], (0, False, 1000.0)),
        (["--prefix-cache", "1.5GB", "--prefix-cache-shared", "--device-frames", "7"], (1_500_000_000, True, 7.0)),
    ):
        assert main(["serve", "out/server", *arguments]) == 1
        limits = taken["limits"]
        assert (limits.prefix_cache_bytes, limits.prefixes_shared, limits.frames_per_s_per_device) == expected


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_sighup_ends_nothing(serve):
    process = serve("--listen", "127.0.0.1:0")
    assert process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "tgkill"), reason="needs glibc to signal a thread")
def test_a_signal_may_be_given_to_any_thread(serve):
    """As the system does above all when a process that was stopped goes on."""
    process = serve("--listen", "127.0.0.1:0")
    assert process.stdout.readline()
    main, other, *_ = sorted(map(int, os.listdir(f"/proc/{process.pid}/task")))
    assert main == process.pid
    assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM) == 0
    assert process.wait(20) == 0
