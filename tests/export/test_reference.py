"""The float reference: its logits, what is kept of them on disk, and where the checkpoint is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import ModelError, RequestError
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.reference import FloatReference, find_source
from isthmus.export.validate import FloatModel, float_logits
from isthmus.runtime.bundle import Source

WINDOWS = [list(range(1, 41)), list(range(60, 130)), [5, 6]]


@pytest.fixture
def open_reference(tiny: Any, tmp_path: Path) -> Any:
    def open_(windows: list[list[int]] = WINDOWS, **options: Any) -> FloatReference:
        options = {"vocab_size": 256, "threads": 1} | options
        return FloatReference(tiny.checkpoint("llama"), windows, tmp_path / "cache", **options)

    return open_


def all_logits(reference: FloatReference) -> list[Any]:
    with reference:
        return [reference.logits(at, slice(0, len(ids))) for at, ids in enumerate(WINDOWS)]


def no_layers(*arguments: Any) -> Any:
    raise AssertionError("computed again")


def test_its_logits_are_the_float_models(open_reference: Any, tiny: Any) -> None:
    for ids, logits in zip(WINDOWS, all_logits(open_reference()), strict=True):
        np.testing.assert_allclose(logits, float_logits(tiny.checkpoint("llama"), ids), atol=1e-4)


def test_what_is_kept_gives_the_same_bits_without_the_layers(
    open_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = all_logits(open_reference())
    monkeypatch.setattr(FloatModel, "layer_of_texts", no_layers)
    for before, after in zip(first, all_logits(open_reference()), strict=True):
        assert np.array_equal(before, after)


def test_one_file_is_kept(open_reference: Any, tmp_path: Path) -> None:
    all_logits(open_reference())
    assert [path.name for path in tmp_path.rglob("cache/*/*")] == ["after-layer-4.npy"]
    np_hidden = np.load(next(tmp_path.rglob("*.npy")))
    assert (np_hidden.shape, np_hidden.dtype) == ((112, 64), np.float32)


def test_a_killed_computation_goes_on_at_its_layer(open_reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FloatModel.layer_of_texts
    expected = all_logits(open_reference(WINDOWS))
    layers: list[int] = []

    def counting(model: FloatModel, index: int, texts: Any) -> Any:
        layers.append(index)
        if layers == [0, 1, 2]:
            raise KeyboardInterrupt
        return whole(model, index, texts)

    monkeypatch.setattr(FloatModel, "layer_of_texts", counting)
    other = [[*WINDOWS[0], 1], *WINDOWS[1:]]  # not the windows that are kept already
    with pytest.raises(KeyboardInterrupt), open_reference(other) as reference:
        reference.logits(0, slice(0, 40))
    with open_reference(other) as reference:
        assert np.array_equal(reference.logits(0, slice(0, 40)), expected[0])
    assert layers == [0, 1, 2, 2, 3]


def test_a_damaged_file_is_computed_again(open_reference: Any, tmp_path: Path) -> None:
    first = all_logits(open_reference())
    path = next(tmp_path.rglob("*.npy"))
    path.write_bytes(path.read_bytes()[:-100])
    assert np.array_equal(all_logits(open_reference())[1], first[1])


def test_nothing_is_computed_before_it_is_asked_for(open_reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FloatModel, "layer_of_texts", no_layers)
    with open_reference() as reference:
        assert reference.key


def test_the_key_tells_windows_and_weights_apart(tiny: Any, write_checkpoint: Any, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    keys = {
        FloatReference(path, windows, tmp_path, vocab_size=256).key
        for path in (tiny.checkpoint("llama"), other)
        for windows in (WINDOWS, WINDOWS[:2], [[token for ids in WINDOWS for token in ids]])
    }
    assert len(keys) == 6


def test_another_vocabulary_is_refused(open_reference: Any) -> None:
    with pytest.raises(ModelError, match="256 tokens, the bundle's 49152"):
        open_reference(vocab_size=49152)


def test_a_folder_that_cannot_be_written_is_an_error(open_reference: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with open_reference() as reference, pytest.raises(RequestError, match="make room"):
        reference.logits(0, slice(0, 2))


def test_a_source_that_is_nowhere_says_what_to_give() -> None:
    with pytest.raises(ModelError, match="--reference"):
        find_source(Source("mine", "gguf", {"mine.gguf": "0" * 64}))


def test_a_source_is_found_by_its_hash_not_by_its_name(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny.checkpoint("llama")
    monkeypatch.chdir(folder.parent)
    hashes = open_checkpoint(folder).file_hashes()
    assert find_source(Source(folder.name, "safetensors", hashes)) == Path(folder.name)
    with pytest.raises(ModelError, match="not found"):
        find_source(Source(folder.name, "safetensors", dict.fromkeys(hashes, "0" * 64)))
