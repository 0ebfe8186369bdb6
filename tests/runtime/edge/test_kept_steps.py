"""What the journal of sent steps takes, and that the device's memory sum knows of it."""

from __future__ import annotations

import tracemalloc

import pytest

from isthmus.devices.budget import JOURNAL_BYTES, MemoryNeeds, estimate_memory
from isthmus.errors import MemoryLimitError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.generate import PREFILL_CHUNK
from isthmus.runtime.edge.journal import Journal
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.memory import half_memory, kept_bytes, longest_context
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import step_message

KEPT = "sent steps, to make the session again"


@pytest.mark.parametrize(("codec", "payload"), [("raw32", 4 * 64), ("raw16", 2 * 64), ("klt", 50), ("ids", 2)])
def test_a_position_takes_no_more_than_is_counted_and_not_much_less(codec, payload):
    steps = 2000
    tracemalloc.start()
    try:
        journal = Journal()
        before = tracemalloc.get_traced_memory()[0]
        for step in range(steps):
            journal.sent(step + 1, step, step_message(step + 1, step, 1, True, bytes(payload)))
            journal.answered(pb.Result(step=step + 1, token=step, length=step + 1))
        taken = (tracemalloc.get_traced_memory()[0] - before) / steps
    finally:
        tracemalloc.stop()
    assert 0.6 * kept_bytes(codec, 64) < taken + (64 - payload if codec == "klt" else 0) < 1.05 * kept_bytes(codec, 64)


def test_steps_that_went_on_from_a_wrong_guess_are_not_kept():
    journal = Journal()
    journal.sent(1, 0, step_message(1, 0, 1, True, b"root"))
    for step in range(2, 6):
        journal.sent(step, 1, step_message(step, 1, 1, True, b"wrong", [step]))
    journal.sent(6, 1, step_message(6, 1, 1, True, b"right", [9]))
    journal.answered(pb.Result(step=1, token=9, length=1))
    for step in range(2, 6):
        journal.answered(pb.Result(step=step, length=1))
    journal.answered(pb.Result(step=6, tokens=[7], length=2))
    assert [b"wrong" in message for message in journal.messages] == [False, False]


def test_the_sum_counts_it_up_to_its_limit():
    sizes = {"positions": 10, "chunk": 1, "d_model": 8, "d_ff": 8, "qkv_width": 8}
    parts = estimate_memory(MemoryNeeds((), 0, **sizes, journal_bytes=5_000_000)).parts
    assert parts[KEPT] == 5.0
    assert KEPT not in estimate_memory(MemoryNeeds((), 0, **sizes)).parts
    full = estimate_memory(MemoryNeeds((), 0, **sizes, journal_bytes=10 * JOURNAL_BYTES)).parts
    assert full[KEPT] == JOURNAL_BYTES / 1e6


def test_only_a_device_that_may_make_its_session_again_counts_it(repeating):
    def refused(**options: str) -> str:
        with pytest.raises(MemoryLimitError) as refusal:
            EdgeModel(repeating / "device", server="127.0.0.1:1", memory_limit_mb=1, **options)
        return str(refusal.value)

    assert KEPT in refused()
    assert KEPT in refused(on_server_loss="wait", codec="raw32")
    assert KEPT not in refused(on_server_loss="fail")


def test_the_longest_context_leaves_room_for_it(repeating):
    bundle = open_bundle(repeating, "device")
    fixed = {"chunk": PREFILL_CHUNK, "process_mb": 200.0}
    limit = half_memory(bundle, 200, kept_bytes=100_000, **fixed).total_mb + 0.01
    assert longest_context(bundle, limit_mb=limit, kept_bytes=100_000, **fixed) == 200
    assert longest_context(bundle, limit_mb=limit, **fixed) == 256
