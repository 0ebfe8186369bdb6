"""Export as a whole: what it writes, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isthmus.errors import ExportError, ModelError
from isthmus.export import validate
from isthmus.export.export import export_bundle
from isthmus.export.validate import validation_text
from isthmus.quant.opsc import WEIGHT_BITS
from isthmus.runtime.bundle import Manifest, TensorRecord, open_bundle
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.text import Tokenizer

LAYERS = 4


def run_python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# What an export writes


def test_the_manifest_tells_the_recipe_and_the_source(tiny: Any) -> None:
    folder = tiny.bundle(split=1, front_bits=2, back_bits=4, embed_bits=16, head_bits=8)
    manifest = open_bundle(folder, "device").manifest
    assert (manifest.split, manifest.front_bits, manifest.back_bits) == (1, 2, 4)
    assert (manifest.embed_bits, manifest.head_bits, manifest.block_size) == (16, 8, 32)
    assert [(s.name, s.half, s.bits) for s in manifest.segments] == [
        ("embed", "device", 16),
        ("block-00-00", "device", 2),
        ("block-01-02", "server", 4),
        ("block-03-03", "server", 4),
        ("head", "server", 8),
    ]
    shapes = {"qkv": (128, 64), "attention_output": (64, 64), "gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    assert manifest.segments[1].tensors == {
        f"layers.0.{name}": TensorRecord(2, 32, "rtn", True, bytes=rows * columns * 2 // 8 + rows * columns // 32 * 4)
        for name, (rows, columns) in shapes.items()
    }
    assert manifest.segments[0].tensors == {"embedding": TensorRecord(16, 0, "float", True, bytes=256 * 64 * 2)}
    assert manifest.source.name == "checkpoint-llama"
    assert manifest.source.format == "safetensors"
    assert set(manifest.source.files) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert manifest.end_tokens == tuple(EdgeModel(tiny.bundle() / "device").tokenizer.encode("\0"))
    ragged = {"block-01-02.ragged.onnx", "block-03-03.ragged.onnx"}
    assert {entry.name for entry in manifest.files["server"]} == ragged | {
        f"{name}.onnx{suffix}" for name in ("block-01-02", "block-03-03", "head") for suffix in ("", ".data")
    }


def test_bits_of_embedding_and_head_follow_those_of_the_layers_but_never_below_8(tiny: Any, tmp_path: Path) -> None:
    expected = {(4, 8): (8, 8), (4, 16): (8, 16), (32, 2): (32, 8)}
    for (front, back), bits in expected.items():
        out = tmp_path / f"{front}-{back}"
        manifest = export_bundle(
            str(tiny.checkpoint()), out, split=2, calibration_tokens=0, front_bits=front, back_bits=back
        )
        assert (manifest.embed_bits, manifest.head_bits) == bits


@pytest.mark.parametrize("kind", ["llama", "llama-untied"])
def test_a_device_with_all_layers_has_the_server_s_files_beside_its_own(tiny: Any, kind: str) -> None:
    front = open_bundle(tiny.bundle(kind, split=1, front_bits=4, back_bits=8), "device").manifest
    whole = open_bundle(tiny.bundle(kind, split=1, front_bits=4, back_bits=8, device_layers="all"), "device").manifest
    assert whole.files["server"] == front.files["server"]
    assert set(whole.files["device"]) - set(front.files["device"]) == set(whole.files["server"])
    # A tied embedding is read out of the head, if that has as many bits.
    tied = {entry.name for entry in set(front.files["device"]) - set(whole.files["device"])}
    assert tied == ({"embed.data"} if kind == "llama" else set())
    assert [whole.whole_on_device, front.whole_on_device] == [True, False]
    assert whole.validation["kl"] == front.validation["kl"]


def test_a_bundle_without_a_server_half_is_whole_already(tiny: Any, tmp_path: Path) -> None:
    options = {"split": None, "calibration_tokens": 0}
    one = export_bundle(str(tiny.checkpoint()), tmp_path / "one", **options)
    other = export_bundle(str(tiny.checkpoint()), tmp_path / "other", device_layers="all", **options)
    assert one.to_json() == other.to_json()
    assert one.whole_on_device


def test_the_same_export_twice_has_the_same_manifest(tiny: Any, tmp_path: Path) -> None:
    for name in ("one", "other"):
        export_bundle(str(tiny.checkpoint()), tmp_path / name, split=2, calibration_tokens=0)
    one, other = (open_bundle(tmp_path / name, "server") for name in ("one", "other"))
    assert one.manifest_sha256 == other.manifest_sha256


def test_a_bundle_holds_its_own_files_and_nothing_else(tiny: Any) -> None:
    folder = tiny.bundle(split=2)
    manifest = open_bundle(folder, "device").manifest
    for half, entries in manifest.files.items():
        found = {path.name for path in (folder / half).iterdir()}
        assert found == {entry.name for entry in entries} | {"manifest.json"}
    assert {path.name for path in folder.iterdir()} == {"device", "server"}


def test_progress_counts_up_to_what_there_is(tiny: Any, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    export_bundle(
        str(tiny.checkpoint()),
        tmp_path / "out",
        split=2,
        calibration_tokens=0,
        progress=lambda *call: calls.append(call),
    )
    assert all(0 <= done <= total for _, done, total in calls)
    assert calls[-1][1] == calls[-1][2]
    assert {"layers 0–1", "layers 2–3", "head", "embedding"} <= {what for what, _, _ in calls}


@pytest.mark.parametrize(("kind", "embedding"), [("llama", "head.onnx.data"), ("llama-untied", "embed.data")])
def test_with_nothing_in_front_the_device_holds_no_weight(tiny: Any, kind: str, embedding: str) -> None:
    folder = tiny.bundle(kind, split=0)
    assert {path.name for path in (folder / "device").iterdir()} == {"manifest.json", "tokenizer.json"}
    bundle = open_bundle(folder / "server")
    assert [segment.kind for segment in bundle.segments()] == ["embed", "block", "block", "head"]
    assert bundle.segments("embed")[0].data_file == embedding
    assert not open_bundle(folder / "device").segments()
    assert set(bundle.manifest.validation["kv"]) == {"server"}


def test_bits_of_a_front_without_layers_do_not_matter(tiny: Any, tmp_path: Path) -> None:
    common: dict[str, Any] = {"split": 0, "back_bits": 8, "back_kv_bits": 8, "calibration_tokens": 0}
    one = export_bundle(str(tiny.checkpoint()), tmp_path / "one", front_bits=2, front_kv_bits=4, **common)
    other = export_bundle(str(tiny.checkpoint()), tmp_path / "other", front_bits=32, **common)
    assert one.to_json() == other.to_json()
    assert one.front_bits == one.back_bits == 8
    assert one.kv["device"].bits == one.kv["server"].bits == 8


def test_no_codec_is_calibrated_where_no_hidden_states_cross(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.export.export.windows_of", lambda *_, **__: pytest.fail("a calibration text"))
    assert export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=0).codecs == ("ids",)


# The validation report


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("split", [None, 0, 2])
def test_a_float_bundle_is_the_float_model(tiny: Any, split: int | None) -> None:
    report = open_bundle(tiny.bundle(bits=32, split=split), "device").manifest.validation
    assert report["logits_max_abs"] < 1e-4
    assert report["top1_agreement"] == 1.0
    assert report["kl"] < 1e-8
    assert all(difference["max_abs"] < 1e-4 for difference in report["segments"].values())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_report_of_a_quantized_bundle_is_finite_and_not_zero(tiny: Any, bits: int) -> None:
    manifest = open_bundle(tiny.bundle(bits=bits, split=2), "device").manifest
    report = manifest.validation
    assert set(report["segments"]) == {segment.name for segment in manifest.segments}
    for difference in report["segments"].values():
        assert 0 < difference["max_abs"] < 100
        assert 0 < difference["relative"] < 1
    assert report["tokens"] == manifest.max_length
    assert 0 < report["top1_agreement"] <= 1
    assert 0 < report["kl"] < 2
    assert 1 < report["perplexity"] < 2000
    assert 1 < report["reference_perplexity"] < 2000


@pytest.mark.parametrize("split", [None, 1])
def test_the_report_tells_what_the_whole_bundle_computes(
    tiny: Any, local_model: Callable[[Path], Any], split: int | None
) -> None:
    quantized = local_model(tiny.bundle(bits=4, split=split))
    report = quantized.manifest.validation
    tokenizer = Tokenizer.from_file(tiny.bundle() / "device" / "tokenizer.json")
    ids = tokenizer.encode(validation_text())[: report["tokens"]]
    _, actual = quantized.run(ids, [len(ids)])
    _, expected = local_model(tiny.bundle(bits=32)).run(ids, [len(ids)])
    assert report["logits_max_abs"] == pytest.approx(np.abs(actual - expected).max(), abs=1e-4)
    assert report["top1_agreement"] == pytest.approx(np.mean(actual.argmax(1) == expected.argmax(1)), abs=0.01)
    p, q = (softmax(logits) for logits in (expected, actual))
    assert report["kl"] == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-3)
    losses = -np.log([p[range(len(ids) - 1), ids[1:]], q[range(len(ids) - 1), ids[1:]]]).mean(axis=1)
    assert np.exp(losses) == pytest.approx([report["reference_perplexity"], report["perplexity"]], rel=1e-3)


def test_more_bits_come_closer_to_the_float_model(tiny: Any) -> None:
    reports = [open_bundle(tiny.bundle(bits=bits), "device").manifest.validation for bits in WEIGHT_BITS]
    for fewer, more in itertools.pairwise(reports):
        assert more["kl"] < fewer["kl"]
        assert more["top1_agreement"] >= fewer["top1_agreement"]
        assert more["segments"]["head"]["relative"] < fewer["segments"]["head"]["relative"]


@pytest.mark.parametrize("kind", ["llama", "llama3-rope", "llama-yarn-rope", "mistral", "qwen2", "qwen2-window"])
def test_the_report_compares_with_transformers_if_asked(tiny: Any, kind: str) -> None:
    pytest.importorskip("transformers")
    folder = tiny.bundle(kind, bits=32, compare_transformers=True)
    report = open_bundle(folder, "device").manifest.validation["transformers"]
    assert report["logits_max_abs"] < 1e-4
    assert report["top1_agreement"] == 1.0


@pytest.mark.parametrize("bits", [4, 32])
def test_a_damaged_weight_fails_the_validation(
    tmp_path: Path, altered_checkpoint: Callable[..., Path], bits: int
) -> None:
    checkpoint = altered_checkpoint("llama")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(ExportError, match="NaN or infinity; the checkpoint may be damaged"):
        export_bundle(str(checkpoint), tmp_path / "out", split=None, front_bits=bits)
    assert not list(tmp_path.glob("*out*"))


# What an export refuses


@pytest.mark.parametrize("split", [-1, LAYERS + 1])
def test_a_split_outside_the_model_is_refused(tiny: Any, tmp_path: Path, split: int) -> None:
    with pytest.raises(ExportError, match=f"split {split}: must lie between 0 and {LAYERS}"):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=split, calibration_tokens=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["front_bits", "back_bits", "embed_bits", "head_bits"])
@pytest.mark.parametrize("bits", [0, 1, 3, 64])
def test_bits_out_of_range_are_refused(tiny: Any, tmp_path: Path, name: str, bits: int) -> None:
    with pytest.raises(ExportError, match=f"{name}={bits}: must be one of 2, 4, 8, 16, 32"):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, calibration_tokens=0, **{name: bits})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block_size": 48}, "block_size=48: must be 16, 32, 64 or 128"),
        ({"block_size": 16, "front_bits": 2}, "block_size=16: with front_bits=2 must be one of 32, 64, 128"),
        ({"weights": "awq"}, "weights='awq': must be one of rtn, mse, hqq"),
        ({"device_layers": "some"}, "device_layers='some': must be one of front, all"),
        ({"layers_per_block": 0}, "layers_per_block=0: must be at least 1"),
        ({"max_length": 1}, "max_length=1: must lie between 2 and 512"),
        ({"max_length": 513}, "max_length=513: must lie between 2 and 512"),
    ],
)
def test_options_out_of_range_are_refused(tiny: Any, tmp_path: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=None, **option)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("max_length", [2, 512])
def test_the_bounds_of_max_length_are_allowed(tiny: Any, max_length: int) -> None:
    model = EdgeModel(tiny.bundle(max_length=max_length) / "device")
    assert model.manifest.max_length == max_length
    result = model.generate([1] * (max_length - 1), max_new_tokens=5)
    assert result.new_tokens == 1


def test_an_output_that_exists_is_never_touched(tiny: Any, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("mine")
    for out in (folder, file):
        with pytest.raises(ExportError, match=rf"{out} exists; export never overwrites: remove it or choose another"):
            export_bundle(str(tiny.checkpoint()), out, split=None)
    assert file.read_text() == "mine"
    assert not list(folder.iterdir())


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        export_bundle(str(tmp_path / "no-such-model"), tmp_path / "out", split=None)
    assert not list(tmp_path.iterdir())


# What it leaves behind when it cannot finish

DISK_FULL = """
import resource, sys
from isthmus.errors import ExportError
from isthmus.export.export import export_bundle
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    export_bundle(sys.argv[1], sys.argv[2], split=2, calibration_tokens=0)
except ExportError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit to set")
@pytest.mark.parametrize("limit", [0, 5_000, 60_000, 80_000])
def test_a_full_disk_leaves_nothing_behind(tiny: Any, tmp_path: Path, limit: int) -> None:
    checkpoint, out = tiny.checkpoint(), tmp_path / "out"
    done = run_python(DISK_FULL, checkpoint, out, str(limit))
    assert "out: File too large; nothing was kept, free space or choose another folder" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, where one may be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only, and not in every container")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_file_system_leaves_nothing_behind(tiny: Any, small_disk: Path) -> None:
    checkpoint = tiny.checkpoint()
    with pytest.raises(ExportError, match="No space left on device; nothing was kept"):
        export_bundle(str(checkpoint), small_disk / "out", split=None, front_bits=32)
    assert not list(small_disk.iterdir())


def test_an_output_below_a_file_is_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"out: .*choose another folder"):
        export_bundle(str(tiny.checkpoint()), tmp_path / "file" / "out", split=None)


def test_an_interrupted_export_leaves_nothing_behind(tiny: Any, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "head":
            raise KeyboardInterrupt

    checkpoint = tiny.checkpoint()
    with pytest.raises(KeyboardInterrupt):
        export_bundle(str(checkpoint), tmp_path / "out", split=None, progress=interrupt)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from isthmus.export.export import export_bundle

def die(what, done, total):
    if what == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

export_bundle(sys.argv[1], sys.argv[2], split=2, calibration_tokens=0, progress=die)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("moment", ["layers 2–3", "embedding", "validating layer 3", "validated"])
def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(tiny: Any, tmp_path: Path, moment: str) -> None:
    checkpoint, out = tiny.checkpoint(), tmp_path / "out"
    done = run_python(KILLED, checkpoint, out, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1, "the abandoned staging folder"
    export_bundle(str(checkpoint), out, split=2, calibration_tokens=0)
    assert list(tmp_path.iterdir()) == [out]
    open_bundle(out, "device")
    open_bundle(out, "server")


def test_an_export_keeps_the_staging_folder_of_one_that_still_runs(tiny: Any, tmp_path: Path) -> None:
    running = tmp_path / f".out.partial-{os.getppid()}"
    running.mkdir()
    export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, calibration_tokens=0)
    assert running.is_dir()


# Memory

MEASURE = """
import sys, threading
from isthmus.export.export import export_bundle

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

phase, peaks, done = "writing", {"writing": 0, "validating": 0}, threading.Event()
before = anonymous()

def watch():
    while not done.wait(0.002):
        peaks[phase] = max(peaks[phase], anonymous() - before)

def progress(what, done, total):
    global phase
    if what.startswith("validating"):
        phase = "validating"

watcher = threading.Thread(target=watch)
watcher.start()
export_bundle(sys.argv[1], sys.argv[2], split=None, layers_per_block=1, max_length=64, progress=progress)
done.set()
watcher.join()
print(peaks["writing"], peaks["validating"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    layers, d_model, d_ff = 12, 512, 1536
    checkpoint = write_checkpoint(
        tmp_path / "deep",
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    done = run_python(MEASURE, checkpoint, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    writing, validating = map(int, done.stdout.split())
    one_layer = 4 * (4 * d_model * d_model + 3 * d_model * d_ff)  # bytes in float32
    # Writing holds a stacked weight and its codes, about two layers here; validation adds onnxruntime's own copies
    # of one float and one packed layer.
    assert writing < 3 * one_layer
    assert validating < 6 * one_layer < layers * one_layer


def test_the_report_says_whether_chunks_of_other_lengths_give_the_same_bits(tiny):
    report = open_bundle(tiny.bundle(bits=4, split=2), "device").manifest.validation
    assert report["chunking_exact"] is True
    hidden = np.ones((8, 4), np.float32)
    assert validate._chunking_exact(lambda rows, chunks: rows * 2, hidden)
    assert not validate._chunking_exact(lambda rows, chunks: rows + chunks[0] % 2, hidden)


# Calibrated weights


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 6000).tolist()))
    return path


def test_a_calibrated_bundle_comes_closer_than_a_rounded_one(tiny: Any, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"split": 2, "front_bits": 4, "back_bits": 4}
    calibrated = export_bundle(
        str(tiny.checkpoint()), tmp_path / "calibrated", weights="gptq", calibration=text, **options
    )
    rounded = export_bundle(str(tiny.checkpoint()), tmp_path / "rounded", **options)
    assert calibrated.validation["kl"] < rounded.validation["kl"]
    assert calibrated.validation["chunking_exact"] is True
    assert calibrated.weights == "gptq"
    for segment, other in zip(calibrated.segments, rounded.segments, strict=True):
        expected = "gptq" if segment.kind == "block" else "rtn"
        assert {record.method for record in segment.tensors.values()} == {expected}
        assert [r.bytes for r in segment.tensors.values()] == [r.bytes for r in other.tensors.values()]


def test_without_a_file_the_model_writes_what_its_weights_are_calibrated_on(tiny: Any, tmp_path: Path) -> None:
    manifest = export_bundle(
        str(tiny.checkpoint()),
        tmp_path / "out",
        split=None,
        weights="gptq",
        calibration_tokens=4096,
        cache=tmp_path / "cache",
    )
    assert {record.method for record in manifest.segments[1].tensors.values()} == {"gptq"}
    assert list((tmp_path / "cache" / "calibration").iterdir())


@pytest.mark.parametrize("weights", ["gptq", "mixed", "auto"])
def test_weights_that_calibrate_need_a_text(tiny: Any, tmp_path: Path, weights: str) -> None:
    with pytest.raises(ExportError, match=rf"weights={weights} with calibration_tokens=0: needs a calibration text"):
        export_bundle(str(tiny.checkpoint()), tmp_path / "out", split=2, weights=weights, calibration_tokens=0)
    assert not (tmp_path / "out").exists()


def layer_bytes(manifest: Manifest, half: str) -> int:
    blocks = [segment for segment in manifest.segments if segment.kind == "block" and segment.half == half]
    return sum(record.bytes for segment in blocks for record in segment.tensors.values())


def test_auto_spends_each_half_s_bytes_where_they_matter(tiny: Any, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"split": 2, "front_bits": 4, "back_bits": 8, "calibration": text}
    plain = export_bundle(str(tiny.checkpoint()), tmp_path / "plain", weights="gptq", **options)
    auto = export_bundle(str(tiny.checkpoint()), tmp_path / "auto", weights="auto", **options)
    for half in ("device", "server"):
        assert 0.9 * layer_bytes(plain, half) < layer_bytes(auto, half) <= layer_bytes(plain, half)
    stored = {name: record for segment in auto.segments for name, record in segment.tensors.items()}
    assert len({(record.bits, record.block_size) for name, record in stored.items() if name.startswith("layers")}) > 2
    assert auto.validation["chunking_exact"] is True
    assert auto.validation["kl"] < plain.validation["kl"]


def test_mixed_gives_some_weights_twice_the_bits(tiny: Any, text: Path, tmp_path: Path) -> None:
    manifest = export_bundle(
        str(tiny.checkpoint()), tmp_path / "out", split=None, front_bits=4, weights="mixed", calibration=text
    )
    bits = {name: record.bits for segment in manifest.segments for name, record in segment.tensors.items()}
    assert {name for name, value in bits.items() if value == 8} == {
        "embedding", "head", "layers.2.qkv", "layers.2.down"
    }  # fmt: skip
    assert bits["layers.2.up"] == bits["layers.0.qkv"] == 4
