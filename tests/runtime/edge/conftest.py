"""Bundles whose tokens can be drafted, and generations whose server comes and goes."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isthmus.export.export import export_bundle
from isthmus.runtime.bundle import FileEntry, open_bundle
from isthmus.runtime.draft_bundle import DRAFT_SCHEMA, DraftRecord
from isthmus.runtime.edge import server_watch
from isthmus.runtime.edge.draft_pace import DraftPace
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ServerSecurity

BITS: dict[str, Any] = dict.fromkeys(("front_bits", "back_bits", "embed_bits", "head_bits"), 4)
LAST = 3  # layer of the tiny models


def write_draft(bundle: Path, checkpoint: Path, write_checkpoint: Callable[..., Path], scratch: Path) -> None:
    """Put a draft into a bundle that is split before its last layer: that layer itself, and a head without odd ids."""
    weights = load_file(checkpoint / "model.safetensors")
    tail = {name.replace(f"layers.{LAST}.", "layers.0."): w for name, w in weights.items() if f".{LAST}." in name}
    tail |= {name: w for name, w in weights.items() if ".layers." not in name}
    write_checkpoint(scratch / "tail", num_hidden_layers=1)
    save_file(tail, scratch / "tail" / "model.safetensors")
    export_bundle(str(scratch / "tail"), scratch / "out", **BITS, split=None, calibration_tokens=0, max_length=256)
    draft = bundle / "device" / "draft"
    draft.mkdir()
    for path in (scratch / "out" / "device").glob("*.data"):
        shutil.copy(path, draft)
    for path in (scratch / "out" / "device").glob("*.onnx"):
        shutil.copy(path, draft)
    np.arange(256, dtype="<u4").tofile(draft / "vocabulary.bin")
    manifest = open_bundle(bundle, "device").manifest
    tail_manifest = open_bundle(scratch / "out", "device").manifest
    layer, head = (segment for segment in tail_manifest.segments if segment.kind != "embed")
    record = DraftRecord(
        schema=DRAFT_SCHEMA,
        source=manifest.source,
        split=LAST,
        d_model=64,
        segments=(layer, head),
        vocabulary=256,
        files=tuple(FileEntry.of(path) for path in sorted(draft.iterdir())),
        training={},
    )
    (draft / "draft.json").write_text(record.to_json())


@pytest.fixture(scope="session")
def repeating(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """A bundle with a draft whose greedy texts soon repeat themselves: the attention hardly counts."""
    root = tmp_path_factory.mktemp("repeating")
    checkpoint = write_checkpoint(root / "checkpoint", "llama", 1)
    weights = load_file(checkpoint / "model.safetensors")
    forgetful = {name: w * np.float32(0.01 if "o_proj" in name else 1) for name, w in weights.items()}
    save_file(forgetful, checkpoint / "model.safetensors")
    options = BITS | {"layers_per_block": 2, "split": LAST, "calibration_tokens": 0, "max_length": 256}
    export_bundle(str(checkpoint), root / "bundle", **options)
    write_draft(root / "bundle", checkpoint, write_checkpoint, root)
    return root / "bundle"


@pytest.fixture(scope="session")
def repeating_address(repeating: Path) -> Iterator[str]:
    """A server of it."""
    with BackServer.from_bundle(repeating / "server", threads=1, security=ServerSecurity(insecure=True)) as server:
        yield server.address


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be guessed is drafted, however long this machine takes for what."""
    monkeypatch.setattr(DraftPace, "pays", lambda self, guess, before, *, waited_s: True)
    monkeypatch.setattr(DraftPace, "emitted", lambda self, seconds, tokens: None)
    monkeypatch.setattr(DraftPace, "__init__", _always_drafting)


def _always_drafting(self: DraftPace, made: Callable[[DraftPace], None] = DraftPace.__init__) -> None:
    made(self)
    self.drafting = True


class Away:
    """A generation over a link that is there, then not, then there again."""

    def __init__(self, model: EdgeModel, proxy: Any, eventually: Callable[..., bool], prompt: Any, **options: Any):
        self.stream = model.tokens(prompt, **options)
        self.proxy = proxy
        self._left, self._eventually = iter(self.stream), eventually
        self.tokens: list[Any] = []

    @property
    def watched(self) -> bool:
        """Whether the device tries to find a server."""
        return "isthmus-server-watch" in [thread.name for thread in threading.enumerate()]

    def until(self, number: int) -> None:
        """Go on to so many tokens."""
        self.tokens += itertools.islice(self._left, number - len(self.tokens))

    def lose(self) -> None:
        """Let no connection through."""
        self.proxy.accepting = False
        self.proxy.cut()

    def find(self) -> None:
        """Let connections through, and wait until the device has noticed."""
        self.proxy.accepting = True
        assert self._eventually(lambda: not self.watched)

    def end(self, number: int) -> tuple[list[int], str, list[Any]]:
        """Ids, a letter for each that says who chose it, and moves as (to, new tokens, what was sent)."""
        self.until(number)
        self.stream.close()
        moves = [(move.to, move.token - len(self.stream.prompt_ids), move.send) for move in self.stream.moves]
        return [token.id for token in self.tokens], "".join(token.source[0] for token in self.tokens), moves


@pytest.fixture(autouse=True)
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is alone stays it for the length of a test, but for those with `make_away`."""
    monkeypatch.setattr(server_watch, "FIRST_PAUSE_S", 1000.0)
    monkeypatch.setattr(server_watch, "LONGEST_PAUSE_S", 1000.0)


@pytest.fixture
def make_away(
    unwatched: None, make_proxy: Callable[..., Any], eventually: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Away]:
    """Begin a generation of what a function opens for an address, with a proxy before the server."""
    monkeypatch.setattr(server_watch, "FIRST_PAUSE_S", 0.02)

    def make(server: BackServer, open_model: Callable[[str], EdgeModel], prompt: Any, **options: Any) -> Away:
        proxy = make_proxy(server.address)
        return Away(open_model(proxy.address), proxy, eventually, prompt, **options)

    return make
