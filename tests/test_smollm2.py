"""The default model cut in two: bit for bit the unsplit model, and as close to the float model as its bits allow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.export.catalog import pull
from isthmus.export.export import export_bundle
from isthmus.runtime.bundle import Manifest, open_bundle
from isthmus.runtime.draft_bundle import open_draft
from isthmus.runtime.edge.load import record, replay
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAYERS = 30
NEW_TOKENS = 64
PROMPTS = [
    "Once upon a time",
    "The three colours of the flag are",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius because",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def checkpoint() -> str:
    return str(pull("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def exported(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Exports each recipe once; the bundles are large, so that they go when the module is done."""
    root = tmp_path_factory.mktemp("smollm2")
    made: dict[str, Path] = {}

    def export(**options: Any) -> Path:
        key = str(sorted(options.items()))
        if key not in made:
            made[key] = root / str(len(made))
            export_bundle(checkpoint, made[key], **{"calibration_tokens": 0} | options)
        return made[key]

    yield export
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def unsplit(exported: Callable[..., Path]) -> Path:
    return exported(split=None, front_bits=4, max_length=128)


@pytest.fixture(scope="module")
def mixed(exported: Callable[..., Path]) -> Path:
    """4 bits in front of layer 10, 8 bits behind: the default recipe."""
    return exported(split=10, front_bits=4, back_bits=8)


def manifest_of(folder: Path) -> Manifest:
    return open_bundle(folder, "device", verify=False).manifest


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_threads_change_no_bit_at_4_and_8_bits(
    unsplit: Path, mixed: Path, local_model: Callable[..., Any], threads: int
) -> None:
    ids = np.random.default_rng(3).integers(0, 49152, 64).tolist()
    for folder in (unsplit, mixed):
        hidden, logits = local_model(folder, threads=1).run(ids, [64])
        for chunks in ([64], [1] * 64, [2] * 32, [1, 7, 2, 1, 33, 20]):
            again = local_model(folder, threads=threads).run(ids, chunks)
            assert np.array_equal(again[0], hidden)
            assert np.array_equal(again[1], logits)


def greedy(model: EdgeModel, prompts: list[list[int]]) -> list[list[int]]:
    """Token ids of `NEW_TOKENS` greedy tokens for each prompt, end tokens or not."""
    ids = []
    for prompt in prompts:
        stream = model.tokens(prompt, max_new_tokens=NEW_TOKENS, end_tokens=())
        ids.append([token.id for token in stream])
        stream.close()
    return ids


@pytest.mark.parametrize("split", [1, 10, 20, LAYERS - 1])
def test_every_split_over_the_wire_generates_what_the_unsplit_model_generates(
    unsplit: Path, exported: Callable[..., Path], split: int
) -> None:
    alone = EdgeModel(unsplit)
    prompts = [alone.tokenizer.encode(text) for text in PROMPTS]
    expected = greedy(alone, prompts)
    assert "Paris" in alone.tokenizer.decode(expected[-1])
    folder = exported(split=split, front_bits=4, back_bits=4, max_length=128)
    plaintext = ServerSecurity(insecure=True)
    with BackServer.from_bundle(folder / "server", "127.0.0.1:0", security=plaintext) as server:
        security = ChannelSecurity(insecure=True)
        assert greedy(EdgeModel(folder, server=server.address, security=security, codec="raw32"), prompts) == expected


@pytest.mark.parametrize("codec", ["raw32", "tabq"])
def test_drafts_of_every_kind_change_no_token(mixed: Path, codec: str) -> None:
    with BackServer.from_bundle(mixed / "server", threads=1, security=ServerSecurity(insecure=True)) as server:
        options: dict[str, Any] = {"security": ChannelSecurity(insecure=True), "codec": codec, "threads": 1}
        for overlap in (True, False):
            model = EdgeModel(mixed / "device", server=server.address, overlap=overlap, **options)
            ways = ("ngram", "chain", "tree", "auto") if open_draft(open_bundle(mixed, "device")) else ("ngram", "auto")
            for prompt in PROMPTS:
                plain = model.generate(prompt, max_new_tokens=NEW_TOKENS, draft="off").token_ids
                for way in ways:
                    assert model.generate(prompt, max_new_tokens=NEW_TOKENS, draft=way).token_ids == plain


def test_sessions_together_get_the_tokens_of_sessions_in_turn(mixed: Path) -> None:
    security = ChannelSecurity(insecure=True)
    plaintext = ServerSecurity(insecure=True)
    one_at_a_time = ServerLimits(max_batch=1)
    with BackServer.from_bundle(mixed / "server", security=plaintext, limits=one_at_a_time) as server:
        recordings = record(
            mixed / "device", server.address, prompt_tokens=(1, 7, 40, 150), new_tokens=NEW_TOKENS, security=security
        )
    with BackServer.from_bundle(mixed / "server", security=plaintext) as server:
        for sessions in (5, 24):
            report = replay(recordings, server.address, sessions=sessions, security=security)
            assert report.identical
            assert report.to_dict()["finished"] == sessions


def test_a_long_generation_ends_just_above_its_predicted_peak_and_is_refused_below_it(mixed: Path) -> None:
    with BackServer.from_bundle(mixed / "server", security=ServerSecurity(insecure=True)) as server:
        command = [sys.executable, "-m", "isthmus.cli.main", "generate", str(mixed / "device"), "--prompt-ids", "1,2,3"]
        command += [
            "-n",
            "512",
            "--server",
            server.address,
            "--insecure",
            "--codec",
            "raw16",
            "--context",
            "1024",
            "--json",
        ]

        def limited(megabytes: float) -> subprocess.CompletedProcess[str]:
            limit = ["--memory-limit", f"{megabytes:.1f}MB"]
            return subprocess.run([*command, *limit], capture_output=True, text=True, check=False)

        predicted = float(re.search(r"this needs (\d+) MB", limited(100).stderr)[1])
        enough, too_little = limited(1.05 * predicted), limited(0.8 * predicted)
    assert enough.returncode == 0, enough.stderr
    assert json.loads(enough.stdout)["new_tokens"] == 512 or json.loads(enough.stdout)["finish_reason"] == "stop"
    assert too_little.returncode == 1  # refused, not killed
    assert "KV cache" in too_little.stderr


def test_the_default_recipe_stays_close_to_the_float_model(mixed: Path) -> None:
    report = manifest_of(mixed).validation
    assert report["tokens"] == 512
    assert 0 < report["kl"] < 0.15
    assert 0.8 < report["top1_agreement"] <= 1
    assert report["perplexity"] < 1.1 * report["reference_perplexity"]


def test_the_float_model_is_that_of_transformers(exported: Callable[..., Path]) -> None:
    pytest.importorskip("transformers")
    folder = exported(split=None, front_bits=32, embed_bits=32, head_bits=32, compare_transformers=True)
    report = manifest_of(folder).validation
    shutil.rmtree(folder)
    assert report["tokens"] == 512
    assert report["transformers"]["logits_max_abs"] < 1e-3
    assert report["transformers"]["top1_agreement"] >= 0.99
