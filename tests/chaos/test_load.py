"""Two hundred sessions at once against a real server process, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.runtime.edge.load import record, replay
from isthmus.runtime.wire.security import ChannelSecurity

SESSIONS, NEW_TOKENS = 200, 64


@pytest.fixture
def load(folder: Path) -> Callable[[str], Any]:
    """Two hundred sessions against an address."""
    security, recordings = ChannelSecurity(insecure=True), []

    def run(address: str) -> Any:
        if not recordings:
            recordings.append(record(folder / "device", address, new_tokens=NEW_TOKENS, security=security, threads=1))
        return replay(recordings[0], address, sessions=SESSIONS, security=security).to_dict()

    return run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_two_hundred_sessions_finish_with_their_tokens_and_leave_nothing(serve, load, eventually):
    server = serve("127.0.0.1:0", "--max-sessions", str(SESSIONS))
    for _ in range(3):  # whatever is made once
        load(server.address)
    before, threads, descriptors = server.resident_mb, server.threads, server.open_files
    report = load(server.address)
    assert report["finished"] == SESSIONS
    assert report["identical"]
    assert not report["errors"]
    assert server.resident_mb <= 1.05 * before
    # Connections that were closed end a little later.
    assert eventually(lambda: server.open_files <= descriptors + 4)
    # Threads by which gRPC's pool grew under load end when they have had nothing to do for 20 seconds.
    assert eventually(lambda: server.threads <= threads, 40)


@pytest.mark.slow
def test_those_that_find_no_room_are_told_so_and_the_others_notice_nothing(serve, load):
    report = load(serve("127.0.0.1:0", "--max-sessions", "50").address)
    assert report["finished"] == 50
    assert report["errors"] == {"SERVER_FULL": SESSIONS - 50}
    assert report["identical"]
