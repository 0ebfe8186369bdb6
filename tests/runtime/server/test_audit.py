"""The audit log: what a run leaves in it, and a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import LinkError, SecurityError
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.server.audit import AuditLog
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity
from isthmus.runtime.wire.tokens import issue_token


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_can_be_followed_and_no_secret_is_in_it(tiny, tmp_path):
    folder, path = Path(tiny.bundle(bits=8, split=2)), tmp_path / "audit.jsonl"
    token = issue_token(tmp_path / "tokens", "phone")
    security = ServerSecurity(insecure=True, tokens=tmp_path / "tokens")
    with BackServer.from_bundle(folder / "server", threads=1, security=security, audit=path) as server:

        def generate(shown: str | None) -> None:
            model = EdgeModel(
                folder / "device",
                server=server.address,
                security=ChannelSecurity(insecure=True, token=shown),
                threads=1,
                draft="off",
            )
            model.generate([1, 2, 3], max_new_tokens=3)

        generate(token)
        with pytest.raises(SecurityError):
            generate(None)
    written = lines(path)
    assert [line["event"] for line in written] == ["connected", "opened", "closed", "disconnected", "turned away"]
    assert {line.get("device") for line in written} == {"phone", None}
    assert written[1]["session"] == written[2]["session"]
    assert written[1]["tokens"] == 6
    assert written[4]["reason"] == "certificate or token"
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path, monkeypatch, caplog):
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        log.record("first")
        write = os.write

        def full(descriptor: int, data: bytes) -> int:
            write(descriptor, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def half(descriptor: int, data: bytes) -> int:
            return write(descriptor, data[:5])

        monkeypatch.setattr(os, "write", half)
        log.record("lost")
        monkeypatch.setattr(os, "write", full)
        log.record("lost, too")
        monkeypatch.setattr(os, "write", write)
        log.record("last")
        assert log.lost == 2
    assert caplog.text.count("lines of the audit log are lost") == 1
    assert "2 lines were lost" in caplog.text
    assert [line["event"] for line in lines(path)] == ["first", "last"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_server_serves_on_a_full_disk(tiny, tmp_path):
    folder = Path(tiny.bundle(bits=8, split=2))
    security = ServerSecurity(insecure=True)
    with BackServer.from_bundle(folder / "server", threads=1, security=security, audit="/dev/full") as server:
        model = EdgeModel(
            folder / "device", server=server.address, security=ChannelSecurity(insecure=True), threads=1, draft="off"
        )
        assert model.generate([1, 2, 3], max_new_tokens=3).new_tokens == 3


def test_a_file_that_was_rotated_is_begun_anew(tmp_path):
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        log.record("before", session="ab")
        path.rename(tmp_path / "audit.1")
        log.record("after", tokens=3)
    assert [line["event"] for line in lines(tmp_path / "audit.1")] == ["before"]
    assert [line["event"] for line in lines(path)] == ["after"]


def test_a_place_that_cannot_be_written_is_named_at_the_start(tmp_path):
    with pytest.raises(LinkError, match="audit"):
        AuditLog(tmp_path / "none" / "audit.jsonl")
