"""Calibration text and hidden states: what the model writes, what a file gives, what the front makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.cli.main import main
from isthmus.errors import ExportError
from isthmus.export import calibration
from isthmus.export.batched import BatchedHead, BatchedLayers
from isthmus.export.calibration import document_start, file_windows, self_written_windows, window_starts
from isthmus.export.checkpoint import Checkpoint, TokenizerFiles, open_checkpoint
from isthmus.export.export import export_bundle
from isthmus.export.families import family_of
from isthmus.export.families.common import EMBEDDING
from isthmus.export.front_states import hidden_states, typical_states
from isthmus.export.validate import float_logits
from isthmus.export.weights import Weights
from isthmus.quant.opsc import Recipe
from isthmus.runtime.bundle import Architecture, open_bundle

Models = Callable[[Path], Any]

WINDOW = 40
TOKENS = 10 * WINDOW
KINDS = ["llama", "llama-untied", "llama-yarn-rope", "mistral", "qwen2", "qwen2-window"]
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"


class Source:
    """A checkpoint, opened, and the calibration text that it writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.family: ModuleType = family_of(self.checkpoint.config)
        self.arch: Architecture = self.family.architecture(self.checkpoint.config)

    def write(self, cache: Path, **options: Any) -> list[list[int]]:
        options = {"tokens": TOKENS, "window": WINDOW} | options
        return self_written_windows(self.checkpoint, self.family, self.arch, cache=cache, **options)


@pytest.fixture
def source(tiny: Any) -> Source:
    return Source(tiny.checkpoint())


def refuse(*_: Any) -> Any:
    raise AssertionError("the calibration text is written again")


def test_windows_are_the_same_for_a_seed_and_others_for_another(source: Source, tmp_path: Path) -> None:
    first = source.write(tmp_path / "one")
    assert [len(ids) for ids in first] == [WINDOW] * 10
    assert all(0 <= token < source.arch.vocab_size for ids in first for token in ids)
    assert source.write(tmp_path / "two") == first
    assert source.write(tmp_path / "one", seed=1) != first
    start = document_start(source.checkpoint.tokenizer())
    assert {ids[0] for ids in first} == {start}
    assert len({tuple(ids) for ids in first}) == 10


def test_groups_of_any_size_fill_every_window(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_SEQUENCES", 3)
    calls: list[tuple[str, int, int]] = []
    windows = source.write(tmp_path, progress=lambda *call: calls.append(call))
    assert all(len(set(ids)) > WINDOW // 3 for ids in windows)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1:] == (TOKENS, TOKENS)


def test_a_chat_template_opens_every_other_window(tiny: Any, altered_checkpoint: Any, tmp_path: Path) -> None:
    folder = altered_checkpoint("llama")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    source = Source(folder)
    tokenizer = source.checkpoint.tokenizer()
    plain, chat = window_starts(tokenizer, source.arch.vocab_size, WINDOW)
    windows = source.write(tmp_path)
    assert len(chat) == len("[user]")
    assert all(ids[: len(chat)] == chat for ids in windows[1::2])
    assert all(ids[:1] == plain and ids[: len(chat)] != chat for ids in windows[::2])
    assert len({tuple(ids[len(chat) :]) for ids in windows[1::2]}) == 5
    assert window_starts(tokenizer, source.arch.vocab_size, 10) == [plain]
    for broken in ("{% if", "{{ raise_exception('no') }}", "no words"):
        assert window_starts(replace(tokenizer, chat_template=broken), source.arch.vocab_size, WINDOW) == [plain]
    dated = "{{ strftime_now('%d') }}{% generation %}" + CHAT + "{%- endgeneration -%}"
    assert len(window_starts(replace(tokenizer, chat_template=dated), source.arch.vocab_size, 100)) == 2


def test_a_second_export_of_the_model_writes_nothing_again(
    source: Source, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = source.write(tmp_path)
    monkeypatch.setattr(calibration, "_write_text", refuse)
    assert source.write(tmp_path) == windows
    for change in ({"seed": 1}, {"tokens": TOKENS + WINDOW}, {"window": WINDOW // 2}):
        with pytest.raises(AssertionError, match="written again"):
            source.write(tmp_path, **change)
    with pytest.raises(AssertionError, match="written again"):
        Source(tiny.checkpoint("qwen2")).write(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no array"),
        lambda path: np.save(path, np.zeros((10, WINDOW + 1), np.int32)),
        lambda path: np.save(path, np.full((10, WINDOW), 256, np.int32)),
        lambda path: np.save(path, np.zeros((10, WINDOW))),
        lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
    ],
    ids=["truncated", "empty", "foreign", "shape", "vocabulary", "type", "pickle"],
)
def test_a_corrupt_cache_is_made_again(source: Source, tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    windows = source.write(tmp_path)
    (path,) = (tmp_path / "calibration").iterdir()
    whole = path.read_bytes()
    spoil(path)
    assert source.write(tmp_path) == windows
    assert path.read_bytes() == whole
    assert list((tmp_path / "calibration").iterdir()) == [path]


def test_a_cache_that_cannot_be_written_to_is_no_error(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(source.write(tmp_path / "file")) == 10


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_in_a_batch_have_the_logits_of_each_alone(tiny: Any, tmp_path: Path, kind: str, bits: int) -> None:
    model = Source(tiny.checkpoint(kind))
    ids = np.random.default_rng(3).integers(0, 256, (5, WINDOW))
    weights = Weights.uniform(model.checkpoint, bits, 32)
    layers = BatchedLayers(tmp_path, weights, model.family, model.arch, range(model.arch.layers), capacity=WINDOW)
    head = BatchedHead(tmp_path, weights, model.arch)
    session, table = layers.session(len(ids)), model.checkpoint.tensor(EMBEDDING)
    steps = [head.logits(session.step(table[column])) for column in ids.T]
    for actual, text in zip(np.stack(steps, axis=1), ids, strict=True):
        expected = float_logits(model.folder, text.tolist())
        error = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
        # Tiny models amplify the int8 activations' noise; a wrong position or cache gives errors of one.
        assert np.median(error) < {32: 1e-5, 8: 0.15}[bits]
        assert error.max() < {32: 1e-4, 8: 0.5}[bits]


def test_tokens_are_drawn_with_their_probabilities() -> None:
    probabilities = np.array([0.5, 0.25, 0.2, 0.049, 0.001], np.float32)
    rows = 200_000
    drawn = calibration._sample(np.tile(np.log(probabilities), (rows, 1)), np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=5)
    assert (np.abs(counts - rows * probabilities) < 5 * np.sqrt(rows * probabilities)).all()


@pytest.mark.parametrize(
    ("bos", "tokens", "end", "start"),
    [
        ("<s>", ["<s>", "</s>"], (1,), "<s>"),
        ("<|im_start|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], (1,), "<|endoftext|>"),
        (None, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], (1,), "<|endoftext|>"),
        ("<s>", ["<|endoftext|>", "<s>"], (0,), "<s>"),
        ("<|im_start|>", ["<|im_end|>", "<|im_start|>"], (0,), "<|im_start|>"),
        (None, ["a", "</s>"], (1,), "</s>"),
        (None, ["a", "b"], (), "a"),
    ],
)
def test_documents_start_with_bos_unless_it_opens_a_turn(
    bos: str | None, tokens: list[str], end: tuple[int, ...], start: str
) -> None:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    text = json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": tokens[0]}})
    files = TokenizerFiles(text, None, end, None if bos is None else vocabulary[bos], {})
    assert document_start(files) == vocabulary[start]


def test_a_file_gives_consecutive_windows(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(97, 123)) * 20 + b"\r\n")
    tokenizer = source.checkpoint.tokenizer().tokenizer_json
    windows = file_windows(path, tokenizer, tokens=330, window=WINDOW)
    every = file_windows(path, tokenizer, tokens=10**9, window=1)
    assert [len(ids) for ids in windows] == [WINDOW] * 8
    assert list(chain(*windows)) == list(chain(*every))[:320]
    assert len(every) == 26 * 20 + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"abc\xff" * 1000, "not UTF-8 at byte 3"),
        (b"x" * 319, "319 tokens where calibration needs at least 320, 8 windows of 40"),
    ],
    ids=["missing", "undecodable", "short"],
)
def test_a_file_that_does_not_serve_is_refused_before_anything_is_written(
    tiny: Any, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, max_length=WINDOW, calibration=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokens", [-1, 319])
def test_too_few_calibration_tokens_are_refused(tiny: Any, tmp_path: Path, tokens: int) -> None:
    with pytest.raises(ExportError, match=f"calibration_tokens={tokens}: must be at least 320, 8 windows of 40"):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, max_length=WINDOW, calibration_tokens=tokens)
    with pytest.raises(ExportError, match="leave out one of them"):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, calibration="text.txt", calibration_tokens=0)
    assert not list(tmp_path.iterdir())


def test_export_writes_text_only_where_it_calibrates(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def count(*arguments: Any) -> NDArray[np.int32]:
        written.append(arguments)
        return write(*arguments)

    write = calibration._write_text
    monkeypatch.setattr(calibration, "_write_text", count)
    options: dict[str, Any] = {"max_length": WINDOW, "calibration_tokens": TOKENS, "cache": tmp_path / "cache"}
    for name, split, bits in (("first", 2, 8), ("second", 1, 8)):
        export_bundle(str(tiny.checkpoint()), tmp_path / name, split=split, front_kv_bits=bits, **options)
        assert len(written) == 1
    options["calibration_tokens"] = 0
    export_bundle(str(tiny.checkpoint()), tmp_path / "third", split=1, front_kv_bits=8, **options)
    assert len(written) == 1


def test_the_command_calibrates_on_a_file(tiny: Any, tmp_path: Path) -> None:
    def graph(name: str, *arguments: str) -> bytes:
        out = str(tmp_path / name)
        options = ["--split", "1", "--kv-bits", "8", "--max-length", str(WINDOW), "--calibration-tokens", "400"]
        assert main(["export", str(tiny.checkpoint()), "-o", out, *options, *arguments]) == 0
        return (tmp_path / name / "device" / "block-00-00.onnx").read_bytes()

    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_bytes(b"ab" * 300)
    texts[1].write_bytes(bytes(range(32, 122)) * 5)
    first, second = (graph(text.stem, "--calibration", str(text)) for text in texts)
    assert first != second
    assert graph("again", "--calibration", str(texts[0])) == first


def recipe_of(folder: Path) -> Recipe:
    manifest = open_bundle(folder, "device").manifest
    names = ("split", "front_bits", "back_bits", "embed_bits", "head_bits", "block_size")
    kv = {f"{side}_kv_bits": manifest.kv[half].bits for side, half in (("front", "device"), ("back", "server"))}
    return Recipe(manifest.architecture.layers, **{name: getattr(manifest, name) for name in names}, **kv)


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": 16}, {"bits": 8, "front_kv_bits": 8, "layers_per_block": 1}], ids=str
)
def test_hidden_states_are_those_that_the_device_sends(
    tiny: Any, source: Source, local_model: Models, options: dict[str, Any]
) -> None:
    folder = tiny.bundle(split=3, **options)
    windows = np.random.default_rng(5).integers(0, 256, (3, 30)).tolist()
    segments = open_bundle(folder, "device").manifest.segments
    states = hidden_states(folder, segments, source.checkpoint, source.arch, recipe_of(folder), windows)
    model = local_model(folder)
    for ids, actual in zip(windows, states, strict=True):
        expected = model.front.session(len(ids)).forward(model.embedding.rows(ids))
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize(("kind", "bits"), [("llama", 4), ("qwen2", 8), ("mistral", 32)])
def test_typical_states_are_the_means_of_a_token_after_short_texts(
    tiny: Any, kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.export.front_states.PROBES_CACHE_BYTES", 1 << 17)  # a few sequences at once
    folder = tiny.bundle(kind, bits=bits, split=2)
    model, recipe = Source(tiny.checkpoint(kind)), recipe_of(folder)
    texts = [[document_start(model.checkpoint.tokenizer()), 7, 30], [5, 200, 9]]
    states = typical_states(model.checkpoint, model.family, model.arch, recipe, texts)
    assert states.shape == (256, 64)
    segments = open_bundle(folder, "device").manifest.segments
    probes = [[*text, token] for text in texts for token in range(256)]
    probed = hidden_states(folder, segments, model.checkpoint, model.arch, recipe, probes)
    expected = np.mean(np.stack([text[-1] for text in probed]).reshape(2, 256, 64), axis=0)
    error = np.linalg.norm(states - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < (1e-5 if bits == 32 else 0.05)
    assert np.median(error) < 1e-5
