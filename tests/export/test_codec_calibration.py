from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import BundleError, CodecError
from isthmus.export.codec_calibration import short_texts
from isthmus.export.export import export_bundle
from isthmus.export.klt_fit import GRADIENT_SHARE, CalibrationStates, fit_klt
from isthmus.quant import trellis
from isthmus.quant.klt import KLT
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.chain import Chain
from isthmus.runtime.codecs import open_codec


@pytest.fixture(scope="module")
def calibrated(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    options = {"max_length": 64, "calibration_tokens": 4096, "cache": out.parent / "cache"}
    export_bundle(str(tiny.checkpoint()), out, split=2, front_bits=8, back_bits=8, **options)
    return out


def test_a_device_with_all_layers_has_the_tables_once(tiny: Any, calibrated: Path, tmp_path: Path) -> None:
    options = {"max_length": 64, "calibration_tokens": 4096, "cache": calibrated.parent / "cache"}
    bits = {"front_bits": 8, "back_bits": 8, "device_layers": "all"}
    manifest = export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, **bits, **options)
    assert "klt" in manifest.codecs
    assert manifest.whole_on_device


def test_both_halves_hold_the_tables_and_the_manifest_names_the_codec(calibrated: Path) -> None:
    device, server = open_bundle(calibrated / "device"), open_bundle(calibrated / "server")
    assert "klt" in device.manifest.codecs
    files = [{file.name for file in bundle.manifest.files[bundle.half]} for bundle in (device, server)]
    assert all({"klt-tables.npz", "klt-predicted.npy"} <= names for names in files)


def test_tables_of_another_split_are_refused(calibrated: Path, tiny: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    options = {"max_length": 64, "calibration_tokens": 4096, "cache": calibrated.parent / "cache"}
    export_bundle(str(tiny.checkpoint()), other, split=1, front_bits=8, back_bits=8, **options)
    for name in ("klt-tables.npz", "klt-predicted.npy", "tabq-rans.npz"):
        shutil.copyfile(calibrated / "server" / name, other / "server" / name)
        with pytest.raises(BundleError, match=rf"{name}: .* manifest"):
            open_bundle(other / "server")
        shutil.copyfile(other / "device" / name, other / "server" / name)
    open_bundle(other / "server")


def test_levels_go_from_fine_to_coarse_and_halves_understand_each_other(calibrated: Path) -> None:
    device, server = open_bundle(calibrated / "device"), open_bundle(calibrated / "server")
    ids = np.random.default_rng(3).integers(0, 256, 48).tolist()
    hidden = Chain.open(calibrated / "device", calibrated / "server").front(ids)
    decoder = open_codec(server, "klt")
    sizes, errors = [], []
    for level in range(7):
        payload = open_codec(device, "klt", level).encode(hidden, ids)
        sizes.append(len(payload))
        errors.append(float(np.linalg.norm(decoder.decode(payload, *hidden.shape)[1:] - hidden[1:])))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 0.2 * np.linalg.norm(hidden[1:])
    with pytest.raises(CodecError, match=r"levels 0 \(finest\) to 6"):
        open_codec(device, "klt", 7)


@pytest.mark.parametrize(("windows", "length", "expected"), [(9, 100, 16), (2, 5, 5), (1, 40, 16)])
def test_short_texts_are_windows_first_tokens_and_their_ends(windows: int, length: int, expected: int) -> None:
    texts = short_texts([[*range(1000 * number, 1000 * number + length)] for number in range(windows)])
    assert len(texts) == 4
    for text in texts:
        first, *end = text
        assert first % 1000 == 0
        assert end == [*range(first + length - expected + 1, first + length)]
    assert {text[0] // 1000 for text in texts} >= {0, windows - 1}


def test_what_a_token_tells_is_not_sent() -> None:
    """Hidden states that are a linear map of the embedding and a little noise take few bytes."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((300, 16)).astype(np.float32)
    texts = [rng.integers(0, 300, 64).tolist() for _ in range(40)]
    mixing = rng.standard_normal((16, 16)).astype(np.float32)
    gradients = [rng.standard_normal((64, 16)).astype(np.float32) for _ in texts[::GRADIENT_SHARE]]

    def states(ids: list[int]) -> np.ndarray:
        return (embedding[ids] @ mixing + 0.3 * rng.standard_normal((len(ids), 16))).astype(np.float32)

    hidden = [states(ids) for ids in texts]
    tables = fit_klt(CalibrationStates(texts, hidden, gradients, embedding, embedding), lambda *call: None)
    ids = rng.integers(0, 300, 200).tolist()
    rest = states(ids) @ tables.forward - tables.predicted[ids] * tables.predicted_scale
    told, hidden_norm = float(np.square(rest).mean()), float(np.square(states(ids) @ tables.forward).mean())
    assert told < 0.2 * hidden_norm
    assert len(KLT(tables, 0).encode(states(ids), ids)) <= 200 * 16 * 4.2 / 8


def test_without_the_compiled_coder_export_leaves_the_codec_out(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise CodecError("no compiled coder")

    monkeypatch.setattr("isthmus.export.codec_calibration.native", missing)
    options = {"max_length": 64, "calibration_tokens": 4096, "cache": tmp_path / "cache"}
    manifest = export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, **options)
    assert "klt" not in manifest.codecs
    assert "no compiled coder" in caplog.text
    with pytest.raises(CodecError, match=r"codec 'klt' needs calibration, .* choose one of raw32, raw16, tabq"):
        open_codec(open_bundle(tmp_path / "out", "device"), "klt")
    assert trellis.native is not missing
