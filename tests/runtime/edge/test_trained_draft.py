"""A trained draft that is known to be right: the back's only layer itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import BundleError, MemoryLimitError, RequestError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.draft_bundle import open_draft
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.trained_draft import TrainedDraft
from isthmus.runtime.memory import half_memory
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire.security import ChannelSecurity

PROMPT = "The same noise on both sides."


def open_model(folder: Path, address: str, **options: Any) -> EdgeModel:
    options = {"codec": "raw32", "threads": 1} | options
    return EdgeModel(folder / "device", server=address, security=ChannelSecurity(insecure=True), **options)


@pytest.fixture
def copy(repeating: Path, tmp_path: Path) -> Path:
    shutil.copytree(repeating, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0, seed=5), Sampling(temperature=0.9, top_k=9, repetition_penalty=1.2, seed=6)],
    ids=["greedy", "sampled", "filtered"],
)
def test_a_draft_that_is_the_back_itself_is_always_right(repeating, repeating_address, sampling, eager):
    model = open_model(repeating, repeating_address, draft="chain", draft_length=4, overlap=False)
    result = model.generate(PROMPT, max_new_tokens=60, sampling=sampling)
    drafts = result.drafts
    assert drafts.right == drafts.tried
    assert drafts.accepted > 30
    assert result.tokens_per_round_trip > 2


def test_a_draft_session_forgets_what_is_rolled_back(repeating):
    bundle = open_bundle(repeating, "device")
    trained = TrainedDraft(open_draft(bundle), 1)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((9, 64), np.float32)
    ids = list(range(10))
    plain = trained.session(32, Sampling(repetition_penalty=1.5), ids[:3])
    plain.observe(hidden)
    expected = plain.guesses(ids, 3)
    for kept in (3, 5):
        session = trained.session(32, Sampling(repetition_penalty=1.5), ids[:3])
        session.observe(hidden[:3])
        session.guesses(ids[:3], 1)
        session.observe(np.concatenate([hidden[3:kept], np.ones((4, 64), np.float32)]))
        if kept == 5:
            session.guesses([*ids[:5], 1, 2, 3, 4], 2)
        session.truncate(kept)
        session.observe(hidden[kept:])
        assert session.guesses(ids, 3) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split": 2}, "for split 2"),
        ({"source": {"name": "else", "format": "gguf", "files": {}}}, "a draft of else"),
    ],
)
def test_a_draft_of_something_else_is_refused(copy, repeating_address, change, named):
    path = copy / "device" / "draft" / "draft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=named):
        open_model(copy, repeating_address)
    assert open_model(copy, repeating_address, draft="ngram").generate(PROMPT, max_new_tokens=4).new_tokens == 4


def test_a_chain_without_a_trained_draft_is_refused(tiny):
    with pytest.raises(RequestError, match="no trained draft"):
        open_model(tiny.bundle(bits=4, split=2), "127.0.0.1:1", draft="chain")


def test_the_draft_counts_against_the_memory_limit(repeating, repeating_address):
    bundle = open_bundle(repeating, "device")
    without, with_draft = (
        half_memory(bundle, 256, chunk=128, draft=draft).total_mb for draft in (None, open_draft(bundle))
    )
    assert with_draft > without
    with pytest.raises(MemoryLimitError):
        open_model(repeating, repeating_address, memory_limit_mb=1)
