"""Two hundred sessions at once against a real server process, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.runtime.edge.load import record, replay
from isthmus.runtime.wire.security import ChannelSecurity

SESSIONS, NEW_TOKENS = 200, 64


@pytest.fixture
def serve(tiny: Any, tmp_path: Path) -> Iterator[Callable[..., tuple[str, int]]]:
    """Starts a server; its address and process id."""
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[str, int]:
        folder = str(Path(tiny.bundle(bits=8, split=2)) / "server")
        command = [sys.executable, "-m", "isthmus.cli.main", "serve", folder]
        process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", "--insecure", "--threads", "1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)},
        )
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().split(" on ")[1].split()[0], process.pid

    yield start
    for process in processes:
        process.terminate()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def load(tiny: Any) -> Callable[[str], Any]:
    """Two hundred sessions against an address."""
    security, recordings = ChannelSecurity(insecure=True), []

    def run(address: str) -> Any:
        if not recordings:
            folder = Path(tiny.bundle(bits=8, split=2)) / "device"
            recordings.append(record(folder, address, new_tokens=NEW_TOKENS, security=security, threads=1))
        return replay(recordings[0], address, sessions=SESSIONS, security=security).to_dict()

    return run


def resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def counts(process: int) -> tuple[int, int]:
    """Threads and descriptors."""
    return len(os.listdir(f"/proc/{process}/task")), len(os.listdir(f"/proc/{process}/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_two_hundred_sessions_finish_with_their_tokens_and_leave_nothing(serve, load):
    address, process = serve("--max-sessions", str(SESSIONS))
    for _ in range(3):  # whatever is made once
        load(address)
    before, (threads, descriptors) = resident_mb(process), counts(process)
    report = load(address)
    assert report["finished"] == SESSIONS
    assert report["identical"]
    assert not report["errors"]
    assert resident_mb(process) <= 1.05 * before
    deadline = time.monotonic() + 10
    while counts(process)[1] > descriptors + 4 and time.monotonic() < deadline:
        time.sleep(0.1)  # connections that were closed end a little later
    threads_after, descriptors_after = counts(process)
    assert threads_after <= threads
    assert descriptors_after <= descriptors + 4


@pytest.mark.slow
def test_those_that_find_no_room_are_told_so_and_the_others_notice_nothing(serve, load):
    address, _ = serve("--max-sessions", "50")
    report = load(address)
    assert report["finished"] == 50
    assert report["errors"] == {"SERVER_FULL": SESSIONS - 50}
    assert report["identical"]
