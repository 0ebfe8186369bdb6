"""Measuring an accuracy table, on a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import AccuracyError
from isthmus.export import accuracy_measurement
from isthmus.export.accuracy import AccuracyTable, accuracy_path, find_accuracy
from isthmus.export.accuracy_measurement import measure_accuracy
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.validate import float_logits, log_softmax

TOKENS = 512


@pytest.fixture(autouse=True, scope="module")
def less_calibration() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy_measurement, "CALIBRATION_TOKENS", 8 * 256)
        patch.setattr(accuracy_measurement, "WINDOW", 256)
        patch.setattr(accuracy_measurement, "KV_WINDOWS", 2)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join(b"line %d of a text\r\n" % at for at in range(60)))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def table(tiny: Any, text: Path, cache: Path) -> AccuracyTable:
    return measure_accuracy(str(tiny.checkpoint()), text=text, tokens=TOKENS, cache=cache)


def test_the_table_is_kept_and_found_by_the_checkpoint(table: AccuracyTable, tiny: Any, cache: Path) -> None:
    hashes = open_checkpoint(tiny.checkpoint()).file_hashes()
    assert (table.layers, table.tokens, table.text, table.hashes) == (4, TOKENS, "text.txt", hashes)
    assert find_accuracy(hashes, cache) == table
    assert [path.name for path in (cache / "accuracy").iterdir()] == [accuracy_path(hashes, cache).name]


def test_fewer_bits_cost_more(table: AccuracyTable) -> None:
    assert table.activations > 0
    for layer in range(table.layers):
        weights = [table.weights[bits][layer] for bits in (32, 8, 16, 4, 2)]
        assert weights == sorted(weights)
        assert weights[-1] > weights[-2] > 10 * weights[-3]
        assert 0 == table.kv[32][layer] < table.kv[8][layer] < table.kv[4][layer] / 10
    for figures in (table.embed, table.head):
        assert 0 == figures[32] < figures[16] < figures[8] < 0.01
    assert 0 < table.weights_se[2] < 0.3


def test_codecs_are_ordered_at_every_split(table: AccuracyTable) -> None:
    pytest.importorskip("isthmus.quant._native")
    assert {point.split for point in table.codecs} == {1, 3}
    for split in (1, 3):
        points = {(p.codec, p.level): p for p in table.codecs if p.split == split}
        assert points["raw32", None].bits == points["raw32", None].decode_bits == 32
        assert points["raw32", None].kl == 0 <= points["raw16", None].kl < 1e-5
        assert points["raw16", None].bits == points["raw16", None].decode_bits == 16
        for codec, levels in (("tabq", 5), ("tabq-rans", 5), ("klt", 7)):
            row = [points[codec, level] for level in range(levels)]
            assert [p.bits for p in row] == sorted((p.bits for p in row), reverse=True)
            assert [p.decode_bits for p in row] == sorted((p.decode_bits for p in row), reverse=True)
            assert [p.kl for p in row] == sorted(p.kl for p in row)
            assert all(0 < p.kl_se < p.kl for p in row)
        # They reconstruct the same.
        assert all(points["tabq", level].kl == points["tabq-rans", level].kl for level in range(5))


def test_int8_activations_cost_what_an_exported_bundle_loses(
    table: AccuracyTable, tiny: Any, text: Path, local_model: Callable[..., Any]
) -> None:
    from tokenizers import Tokenizer

    content = text.read_text()
    ids = Tokenizer.from_file(str(tiny.checkpoint() / "tokenizer.json")).encode(content).ids[:TOKENS]
    model = local_model(tiny.bundle(bits=8, embed_bits=32, head_bits=32))
    kl = []
    for window in (ids[:256], ids[256:]):
        expected, actual = (
            log_softmax(logits)
            for logits in (float_logits(tiny.checkpoint(), window), model.run(window, [len(window)])[1])
        )
        kl.append((np.exp(expected) * (expected - actual)).sum(axis=1).mean())
    assert table.activations == pytest.approx(float(np.mean(kl)), rel=1e-3)


def test_a_killed_measurement_goes_on(
    table: AccuracyTable, tiny: Any, text: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cache / "calibration", tmp_path / "calibration")
    arguments: dict[str, Any] = {"text": text, "tokens": TOKENS, "cache": tmp_path}
    measured: list[str] = []
    parts = accuracy_measurement._Measurement.parts

    def watched(self: Any) -> dict[str, Callable[[], Any]]:
        def one(name: str, part: Callable[[], Any]) -> Any:
            if name == "split 3" and "split 3" not in measured:
                measured.append(name)
                raise KeyboardInterrupt
            measured.append(name)
            return part()

        return {name: lambda name=name, part=part: one(name, part) for name, part in parts(self).items()}

    monkeypatch.setattr(accuracy_measurement._Measurement, "parts", watched)
    with pytest.raises(KeyboardInterrupt):
        measure_accuracy(str(tiny.checkpoint()), **arguments)
    assert measured == ["whole", "embed", "head", "group 0", "group 1", "group 2", "group 3", "split 1", "split 3"]
    kept = next((tmp_path / "accuracy").glob("*.parts.json"))
    assert measure_accuracy(str(tiny.checkpoint()), **arguments) == table
    assert measured[9:] == ["split 3"]
    assert not kept.exists()


def test_a_file_of_parts_that_is_damaged_or_of_other_windows_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    assert accuracy_measurement._Parts(path, [1]).of("a", lambda: {"x": {"kl": 1.0}}) == {"x": {"kl": 1.0}}
    fresh: dict[str, dict[str, Any]] = {"x": {"kl": 2.0}}
    assert accuracy_measurement._Parts(path, [1]).of("a", lambda: fresh) == {"x": {"kl": 1.0}}
    assert accuracy_measurement._Parts(path, [2]).of("a", lambda: fresh) == fresh
    for content in ("", "[]", '{"key": 1}'):
        path.write_text(content)
        assert accuracy_measurement._Parts(path, [1]).of("a", lambda: fresh) == fresh


def test_without_a_text_it_is_measured_on_what_does_not_calibrate(
    tiny: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeenError(Exception):
        pass

    def look(model: Any, windows: list[list[int]], written: list[list[int]], progress: Any) -> None:
        raise SeenError(windows, written)

    monkeypatch.setattr(accuracy_measurement, "_Measurement", look)
    with pytest.raises(SeenError) as seen:
        measure_accuracy(str(tiny.checkpoint()), tokens=400, cache=cache)
    windows, written = seen.value.args
    assert [len(window) for window in windows] == [256, 144]
    assert len(written) == 6
    assert all(window[:144] != other[:144] for window in windows for other in written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 255}, "tokens=255: must be at least 256"),
        ({"tokens": 4000}, "at most 1024 of what the model wrote itself"),
        ({"text": "missing.txt"}, "missing.txt: No such file"),
        ({"text": "binary"}, "not UTF-8 at byte 0"),
        ({"text": "text", "tokens": 5000}, "tokens, 5000 are needed; give a longer text or fewer --tokens"),
    ],
)
def test_bad_input(tiny: Any, text: Path, tmp_path: Path, cache: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    files = {"text": text, "binary": tmp_path / "binary"}
    if "text" in options:
        options = options | {"text": files.get(options["text"], options["text"])}
    with pytest.raises(AccuracyError, match=message):
        measure_accuracy(str(tiny.checkpoint()), cache=cache, **options)


def test_one_layer_cannot_be_split(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(AccuracyError, match="one layer cannot be split"):
        measure_accuracy(str(folder), cache=tmp_path)
