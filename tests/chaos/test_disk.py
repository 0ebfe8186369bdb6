"""A disk that fills up under the audit log while devices generate."""

from __future__ import annotations

import json
from collections import Counter

import pytest

resource = pytest.importorskip("resource", reason="limits the size of files")


def test_an_audit_log_that_cannot_grow_loses_lines_and_nothing_else(serve, device, expected, tmp_path):
    audit = tmp_path / "audit.jsonl"
    server = serve("127.0.0.1:0", "--audit", audit, limits={resource.RLIMIT_FSIZE: 700})
    for _ in range(4):
        assert device(server.address).generate().token_ids == expected
    assert audit.stat().st_size <= 700
    events = Counter(json.loads(line)["event"] for line in audit.read_text().splitlines())  # no half line
    assert 4 <= events.total() < 16
    assert server.end() == 0
