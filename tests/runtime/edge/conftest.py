"""Bundles whose tokens can be drafted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isthmus.export.export import export_bundle
from isthmus.runtime.bundle import open_bundle
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
    shutil.copy(scratch / "out" / "device" / "block-00-00.onnx", draft / "layer.onnx")
    shutil.copy(scratch / "out" / "device" / "head.onnx", draft)
    np.arange(256, dtype="<u4").tofile(draft / "vocabulary.bin")
    manifest = open_bundle(bundle, "device").manifest
    files = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(draft.iterdir())
    ]
    record = {
        "schema": 1,
        "source": {"name": "tiny", "files": manifest.source.files},
        "split": LAST,
        "d_model": 64,
        "kv_heads": 2,
        "head_dim": 16,
        "files": files,
    }
    (draft / "draft.json").write_text(json.dumps(record))


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
