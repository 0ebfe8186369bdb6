"""Exports with a quantized KV cache: their scales, what lies in the cache, what the report and the command say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from isthmus.cli.main import main
from isthmus.errors import BundleError, ExportError
from isthmus.export.export import export_bundle
from isthmus.export.kv_scales import spread_keys
from isthmus.quant.kv import quantize
from isthmus.runtime.bundle import open_bundle

Models = Callable[[Path], Any]

IDS = np.random.default_rng(1).integers(0, 256, 40).tolist()
FLOAT = dict.fromkeys(("front_bits", "back_bits", "embed_bits", "head_bits"), 32)


def scales_in(folder: Path) -> dict[str, np.ndarray]:
    """Every scale of a half's graphs, ``key_scale.i`` and ``value_scale.i``."""
    found = {}
    for path in folder.glob("block-*.onnx"):
        for tensor in onnx.load(path).graph.initializer:
            if tensor.name.endswith("_scale"):
                _, layer, side = tensor.name.split(".")
                found[f"{side}.{layer}"] = numpy_helper.to_array(tensor, str(folder))
    return found


def cache_of(model: Any, ids: list[int]) -> dict[tuple[str, int], np.ndarray]:
    """What a device-only model's cache holds after a text, ``[kv_heads, tokens, ...]``."""
    session = model.front.session(len(ids))
    session.forward(model.embedding.rows(ids))
    return {key: value.numpy()[0, :, : len(ids)].copy() for key, value in session.cache.values.items()}


def codes_in(stored: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return stored
    pairs = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8) - 8
    return pairs.reshape(*stored.shape[:-1], -1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama-yarn-rope"])
def test_the_first_layer_s_cache_holds_the_float_cache_s_codes(
    tiny: Any, local_model: Models, kind: str, bits: int
) -> None:
    folder = tiny.bundle(kind, bits=32, front_kv_bits=bits)
    exact, stored = cache_of(local_model(tiny.bundle(kind, bits=32)), IDS), cache_of(local_model(folder), IDS)
    scales = scales_in(folder / "device")
    for side in ("key", "value"):
        assert stored[side, 0].dtype == {8: np.int8, 4: np.uint8}[bits]
        expected = quantize(exact[side, 0], scales[f"{side}_scale.0"][0], bits)
        assert np.array_equal(codes_in(stored[side, 0], bits), expected)
        assert np.unique(expected).size > 12


def test_each_half_has_its_own_bits(tiny: Any) -> None:
    folder = tiny.bundle(split=1, front_kv_bits=4, back_kv_bits=32)
    manifest = open_bundle(folder, "server").manifest
    assert {half: (spec.bits, spec.dtype) for half, spec in manifest.kv.items()} == {
        "device": (4, "uint8"),
        "server": (32, "float32"),
    }
    assert set(scales_in(folder / "device")) == {"key_scale.0", "value_scale.0"}
    assert not scales_in(folder / "server")
    assert manifest.validation["kv"] == {
        "device": {"bits": 4, "bytes_per_token": 2 * 2 * 8},
        "server": {"bits": 32, "bytes_per_token": 3 * 2 * 2 * 16 * 4},
    }


def test_a_layer_has_the_same_scales_wherever_the_model_is_cut(tiny: Any) -> None:
    whole = scales_in(tiny.bundle(front_kv_bits=8) / "device")
    folder = tiny.bundle(split=3, front_kv_bits=8, back_kv_bits=8)
    halves = scales_in(folder / "device") | scales_in(folder / "server")
    assert whole.keys() == halves.keys()
    assert all(np.array_equal(whole[name], halves[name]) for name in whole)


def test_a_graph_whose_scales_were_altered_is_refused(tiny: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.bundle(front_kv_bits=8), tmp_path / "bundle") / "device"
    path = folder / "block-00-01.onnx"
    graph = onnx.load(path, load_external_data=False)
    scale = next(tensor for tensor in graph.graph.initializer if tensor.name == "layers.1.key_scale")
    scale.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(scale), scale.name))
    onnx.save(graph, path)
    with pytest.raises(BundleError, match=r"block-00-01\.onnx: its SHA-256 is not the manifest's"):
        open_bundle(folder)


def test_fewer_bits_in_the_cache_are_farther_from_the_float_model(tiny: Any) -> None:
    reports = [
        open_bundle(tiny.bundle(bits=32, front_kv_bits=bits), "device").manifest.validation for bits in (32, 8, 4)
    ]
    assert all(report["chunking_exact"] for report in reports)
    assert reports[0]["kl"] < reports[1]["kl"] < reports[2]["kl"] < 0.5
    assert reports[1]["top1_agreement"] > 0.9


def test_scales_are_those_of_the_windows_that_are_given(tiny: Any, tmp_path: Path, local_model: Models) -> None:
    def export(name: str, windows: list[list[int]]) -> dict[str, np.ndarray]:
        export_bundle(
            str(tiny.checkpoint()),
            tmp_path / name,
            split=None,
            **FLOAT,
            front_kv_bits=8,
            calibration_windows=windows,
        )
        return scales_in(tmp_path / name / "device")

    one, both = export("one", [IDS[:20]]), export("both", [IDS[:20], IDS[20:]])
    exact = cache_of(local_model(tiny.bundle(bits=32)), IDS[:20])["value", 0]
    assert one["value_scale.0"][0, :, 0] == pytest.approx(np.abs(exact).max(axis=1) / 127.5, rel=1e-4)
    assert (both["value_scale.0"] >= one["value_scale.0"]).all()
    assert (both["value_scale.0"] > one["value_scale.0"]).any()


def test_keys_are_spread_over_the_context_but_position_0_is_not() -> None:
    keys = np.random.default_rng(0).standard_normal((30, 2, 4)).astype(np.float32)
    angles = np.outer(np.arange(5000), [1.0, 1e-3])
    for factor in (1.0, 1.3):
        cos, sin = (np.float32(factor) * table(angles).astype(np.float32) for table in (np.cos, np.sin))
        spread = spread_keys([keys, keys], cos, sin)
        assert spread.shape == (60, 2, 4)
        assert np.allclose(spread[[0, 30]], keys[0], atol=1e-5)
        pairs = [np.hypot(x[..., :2], x[..., 2:]) for x in (spread, np.concatenate([keys, keys]))]
        assert np.allclose(*pairs, rtol=1e-4)
        # The slow frequency, too, turns far: within 30 positions it would by less than two degrees.
        turn = np.angle((spread[..., 1] + 1j * spread[..., 3]) * (pairs[1][..., 1] - 0j))
        start = np.angle(np.concatenate([keys, keys])[..., 1] + 1j * np.concatenate([keys, keys])[..., 3])
        assert np.abs(np.exp(1j * turn) - np.exp(1j * start)).max() > 1


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "no calibration window"),
        ([[]], "calibration window of 0 tokens: must have between 1 and 512"),
        ([[1] * 513], "calibration window of 513 tokens: must have between 1 and 512"),
        ([[1, -1]], "token ids -1 to 1: must lie between 0 and 255"),
        ([[1], [256, 3]], "token ids 3 to 256: must lie between 0 and 255"),
    ],
    ids=["none", "empty", "too long", "negative", "beyond the vocabulary"],
)
def test_windows_that_cannot_be_run_are_refused_and_nothing_is_kept(
    tiny: Any, tmp_path: Path, windows: list[list[int]], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, back_kv_bits=8, calibration_windows=windows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["front_kv_bits", "back_kv_bits"])
def test_kv_bits_out_of_range_are_refused_before_anything_is_written(tiny: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match=rf"{name}=16: must be one of 4, 8, 32"):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, **{name: 16})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ([], (32, 32)),
        (["--kv-bits", "8"], (8, 8)),
        (["--kv-bits", "8", "--front-kv-bits", "4"], (4, 8)),
        (["--back-kv-bits", "4"], (32, 4)),
    ],
    ids=str,
)
def test_the_command_sets_both_sides_and_either(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], bits: tuple[int, int]
) -> None:
    out = tmp_path / "out"
    options = [*options, "--calibration-tokens", "0"]
    assert main(["export", str(tiny.checkpoint()), "-o", str(out), "--split", "2", *options]) == 0
    shown = capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out == shown
    sizes = [2 * 2 * 2 * 16 * n // 8 for n in bits]
    line = f"KV cache for each token of context: device {sizes[0]} bytes ({bits[0]} bit), server {sizes[1]} bytes"
    assert line in shown
    kv = json.loads((out / "server" / "manifest.json").read_text())["kv"]
    assert (kv["device"]["bits"], kv["server"]["bits"]) == bits


def test_the_command_refuses_other_kv_bits(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(tiny.checkpoint()), "-o", str(tmp_path / "out"), "--split", "2", "--kv-bits", "16"])
    assert "--kv-bits" in capsys.readouterr().err
