"""The accuracy table: sums of parts, interpolation, and files that are none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import AccuracyError
from isthmus.export.accuracy import (
    ADDITIVITY,
    AccuracyTable,
    CodecPoint,
    accuracy_path,
    drop_percent,
    find_accuracy,
    load_accuracy,
)
from isthmus.export.catalog import CATALOG

LAYERS = 8


def make_table(**changes: Any) -> AccuracyTable:
    """A table of eight layers whose parts are all different."""
    points = tuple(
        CodecPoint(split, codec, level, bits + split, bits + split + 1, kl * split, kl / 10)
        for split in (2, 6)
        for codec, level, bits, kl in (("raw32", None, 32, 0.0), ("klt", 0, 3, 0.01), ("klt", 1, 2, 0.02))
    )
    table = AccuracyTable(
        model="tiny",
        hashes={"model.safetensors": "aa", "config.json": "bb"},
        layers=LAYERS,
        tokens=2048,
        text="a text",
        activations=0.008,
        weights={
            2: tuple(0.1 + layer for layer in range(LAYERS)),
            4: tuple(0.001 * layer for layer in range(LAYERS)),
            8: (0.0,) * LAYERS,
            16: (1e-6,) * LAYERS,
            32: (0.0,) * LAYERS,
        },
        weights_se={2: 0.1, 4: 0.5, 8: 0.0, 16: 0.0, 32: 0.0},
        embed={8: 0.0001, 16: 0.00001, 32: 0.0},
        head={8: 0.0002, 16: 0.00002, 32: 0.0},
        kv={4: (0.004,) * LAYERS, 8: (0.0004,) * LAYERS, 32: (0.0,) * LAYERS},
        codecs=points,
    )
    return replace(table, **changes)


def test_a_configuration_is_the_sum_of_its_parts() -> None:
    table = make_table()
    kl, error = table.drop(split=2, front_bits=4, back_bits=8, front_kv_bits=4, back_kv_bits=8, codec="klt", level=1)
    weights, codec = 0.001, 0.04
    assert kl == pytest.approx(0.008 + weights + 2 * 0.004 + 6 * 0.0004 + 0.0001 + 0.0002 + codec)
    assert error == pytest.approx(math.sqrt((0.5 * weights) ** 2 + 0.002**2 + (ADDITIVITY * kl) ** 2))


def test_float_sides_have_no_int8_activations_and_float_tables() -> None:
    table = make_table()
    assert table.drop(split=8, front_bits=32, back_bits=32) == (0.0, 0.0)
    half = table.drop(split=2, front_bits=8, back_bits=32)[0]
    assert half == pytest.approx(0.008 / 4 + 0.0001)
    # With all layers on one side the other side's bits do not count; the head goes with the last layer.
    for bits in (2, 8, 32):
        assert table.drop(split=8, front_bits=16, back_bits=bits)[0] == pytest.approx(8e-6 + 0.00001 + 0.00002)
        assert table.drop(split=0, front_bits=bits, back_bits=16)[0] == pytest.approx(8e-6 + 0.00001 + 0.00002)


def test_percent_is_that_of_the_perplexity() -> None:
    assert drop_percent(0.0) == 0.0
    assert drop_percent(math.log(1.05)) == pytest.approx(5)


def test_bits_lie_on_a_line_between_splits_and_stay_beyond_them() -> None:
    table = make_table()
    bits = [table.codec_bits(split, "klt", 0, decode=False) for split in range(1, 8)]
    assert bits == [5, 5, 6, 7, 8, 9, 9]
    assert table.codec_bits(4, "klt", 0, decode=True) == 8
    at = {split: table.drop(split=split, front_bits=32, back_bits=32, codec="klt", level=0)[0] for split in (1, 3, 7)}
    assert at == pytest.approx({1: 0.02, 3: 0.03, 7: 0.06})
    assert table.codec_levels() == [("raw32", None), ("klt", 0), ("klt", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": 9}, "split 9: must lie between 0 and 8"),
        ({"split": -1}, "split -1"),
        ({"front_bits": 3}, "weight bits 3: must be one of 2, 4, 8, 16, 32"),
        ({"back_kv_bits": 16}, "KV bits 16: must be one of 4, 8, 32"),
        ({"codec": "zip"}, "codec zip, level None: not in the accuracy table, which has raw32, klt 0, klt 1"),
        ({"codec": "klt"}, "codec klt, level None"),
        ({"codec": "klt", "level": 7}, "codec klt, level 7"),
        ({"split": 8, "codec": "raw32"}, "nothing crosses"),
    ],
)
def test_what_the_table_does_not_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AccuracyError, match=message):
        make_table().drop(**({"split": 4, "front_bits": 4, "back_bits": 8} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "0 layers"),
        ({"tokens": 0}, "0 tokens"),
        ({"hashes": {}}, "0 files"),
        ({"layers": 7}, "must have 7 layers"),
        ({"kv": {32: (0.0,) * LAYERS}}, "kv for .32. bits"),
        ({"weights_se": {4: 0.1}}, "weights_se"),
        ({"activations": math.nan}, "nan"),
        ({"activations": -0.1}, "-0.1"),
        ({"embed": {8: math.inf, 16: 0.0, 32: 0.0}}, "inf"),
        ({"codecs": (CodecPoint(8, "raw32", None, 32, 32, 0, 0),)}, "between 1 and 7"),
        ({"codecs": (*make_table().codecs, CodecPoint(4, "klt", 0, 3, 3, 0, 0))}, "split 4 lacks codecs"),
    ],
)
def test_impossible_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AccuracyError, match=message):
        make_table(**changes)


def test_a_file_holds_the_table(tmp_path: Path) -> None:
    table = make_table()
    table.save(tmp_path / "new" / "table.json")
    assert load_accuracy(tmp_path / "new" / "table.json") == table
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]


def broken(**changes: Any) -> str:
    fields = json.loads(make_table().to_json()) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"isthmus accuracy": 1', "not JSON"),
        ("[]", "not an accuracy table"),
        ("{}", "not an accuracy table"),
        (broken(**{"isthmus accuracy": 99}), "schema 99, this version reads 1"),
        ('{"isthmus accuracy": 1}', "missing"),
        (broken(weights=None), "missing or of the wrong kind .*weights"),
        (broken(model=None), "missing or of the wrong kind"),
        (broken(extra=1), "extra"),
        (broken(model=5), "5 is no text"),
        (broken(hashes={"a": 1}), "1 is no text"),
        (broken(weights=[1]), "wrong kind"),
        (broken(kv={"four": []}), "wrong kind"),
        (broken(layers="many"), "wrong kind"),
        (broken(codecs=[{"split": 2}]), "missing or of the wrong kind"),
        (broken(activations=-1), "-1"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(AccuracyError, match=rf"bad\.json.*{message}"):
        load_accuracy(path)


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="cannot be read"):
        load_accuracy(tmp_path / "missing.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(AccuracyError, match="cannot be read"):
        load_accuracy(tmp_path / "bytes.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(AccuracyError, match="cannot be written"):
        make_table().save(tmp_path / "file" / "table.json")


def test_a_table_is_found_by_the_digests_of_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = make_table()
    assert find_accuracy(table.hashes, tmp_path) is None
    path = accuracy_path(table.hashes, tmp_path)
    table.save(path)
    renamed = {"weights.safetensors": "aa", "settings.json": "bb"}
    assert find_accuracy(renamed, tmp_path) == table
    assert find_accuracy(renamed | {"config.json": "cc"}, tmp_path) is None
    make_table(hashes={"other": "cc"}).save(path)
    assert find_accuracy(table.hashes, tmp_path) is None
    path.write_text("{")
    assert find_accuracy(table.hashes, tmp_path) is None
    assert "not JSON" in caplog.text


def test_the_default_models_table_comes_with_the_package(tmp_path: Path) -> None:
    entry = CATALOG["smollm2-135m-instruct"]
    table = find_accuracy({"any name.gguf": entry.member_sha256}, tmp_path)
    assert table is not None
    assert table.layers == 30
    # Its file holds 4-bit blocks, which are copied; two bits must be rounded to.
    kl, error = table.drop(split=10, front_bits=4, back_bits=8, codec="klt", level=2)
    assert 0 < error < kl < 0.05
    assert table.drop(split=10, front_bits=2, back_bits=8)[0] > 1
