"""What is wrong with a bundle is said when it is opened, with the file's name and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import BundleError
from isthmus.runtime.back import BackEngine
from isthmus.runtime.bundle import MANIFEST_NAME, Manifest, open_bundle, parse_manifest
from isthmus.runtime.edge.model import EdgeModel


@pytest.fixture
def split_bundle(tiny: Any, tmp_path: Path) -> Path:
    """A split bundle of its own, to be damaged."""
    return shutil.copytree(tiny.bundle(split=2), tmp_path / "bundle")


def edit_manifest(half: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = half / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_both_halves_hold_the_same_manifest(split_bundle: Path) -> None:
    device, server = open_bundle(split_bundle, "device"), open_bundle(split_bundle, "server")
    assert device.manifest_sha256 == server.manifest_sha256
    assert device.manifest == server.manifest
    assert [s.name for s in device.segments()] == ["embed", "block-00-01"]
    assert [s.name for s in server.segments()] == ["block-02-03", "head"]


def test_a_manifest_survives_json(split_bundle: Path) -> None:
    manifest = open_bundle(split_bundle, "device").manifest
    assert parse_manifest(manifest.to_json().encode(), Path("manifest.json")) == manifest


def test_a_half_is_found_from_its_own_folder_and_from_the_bundle_s(split_bundle: Path) -> None:
    assert open_bundle(split_bundle / "server").half == "server"
    assert open_bundle(split_bundle / "device").half == "device"
    assert open_bundle(split_bundle, "server").folder == split_bundle / "server"


def test_halves_of_different_exports_have_different_hashes(tiny: Any) -> None:
    one, other = (open_bundle(tiny.bundle(split=2, bits=bits), "device") for bits in (4, 8))
    assert one.manifest_sha256 != other.manifest_sha256


@pytest.mark.parametrize("half", ["device", "server"])
def test_every_missing_file_is_named(split_bundle: Path, half: str) -> None:
    for entry in open_bundle(split_bundle, half).manifest.files[half]:
        path = split_bundle / half / entry.name
        path.rename(split_bundle / "away")
        with pytest.raises(BundleError, match=rf"{entry.name}: missing; .*copy or export it again"):
            open_bundle(split_bundle, half)
        (split_bundle / "away").rename(path)
    open_bundle(split_bundle, half)


@pytest.mark.parametrize("verify", [True, False])
def test_every_truncated_file_is_named(split_bundle: Path, verify: bool) -> None:
    for entry in open_bundle(split_bundle, "device").manifest.files["device"]:
        path = split_bundle / "device" / entry.name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(BundleError, match=rf"{entry.name}: {len(whole) - 1} bytes .* says {len(whole)}"):
            open_bundle(split_bundle, "device", verify=verify)
        path.write_bytes(whole)


def test_every_altered_file_is_named(split_bundle: Path) -> None:
    for entry in open_bundle(split_bundle, "server").manifest.files["server"]:
        path = split_bundle / "server" / entry.name
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(BundleError, match=rf"{entry.name}: its SHA-256 is not the manifest's"):
            open_bundle(split_bundle, "server")
        path.write_bytes(whole)


@pytest.mark.parametrize("open_half", [EdgeModel, BackEngine.open], ids=["device", "server"])
def test_both_runtimes_check_hashes(split_bundle: Path, open_half: Callable[[Path], Any]) -> None:
    half = split_bundle / ("device" if open_half is EdgeModel else "server")
    path = next(half.glob("*.onnx.data"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="SHA-256"):
        open_half(half)


def test_the_wrong_half_is_refused_either_way(split_bundle: Path) -> None:
    with pytest.raises(BundleError, match="is the device half; give the server half"):
        BackEngine.open(split_bundle / "device")
    with pytest.raises(BundleError, match="is the server half; give the device half"):
        EdgeModel(split_bundle / "server", server="127.0.0.1:1")


def test_a_bundle_that_lost_a_half_is_told_from_one_that_never_had_it(split_bundle: Path) -> None:
    shutil.rmtree(split_bundle / "server")
    with pytest.raises(BundleError, match="device is the device half; give the server half"):
        BackEngine.open(split_bundle)


@pytest.mark.parametrize("part", ["", "device"])
def test_a_device_only_bundle_has_no_server_half(tiny: Any, part: str) -> None:
    with pytest.raises(BundleError, match="keeps the whole model on the device, there is no server half"):
        BackEngine.open(tiny.bundle() / part)


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match=r"no manifest\.json there; give the folder that `isthmus export`"):
            open_bundle(folder, "device")


def test_a_manifest_without_segments_beside_it_is_refused(split_bundle: Path, tmp_path: Path) -> None:
    shutil.copy(split_bundle / "device" / MANIFEST_NAME, tmp_path)
    with pytest.raises(BundleError, match="no segment"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="missing"):
        open_bundle(tmp_path, "device")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[1, 2", b'{"schema": 1'])
def test_a_manifest_that_is_no_json_is_refused(split_bundle: Path, text: bytes) -> None:
    (split_bundle / "device" / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest\.json: not JSON"):
        open_bundle(split_bundle, "device")


@pytest.mark.parametrize("schema", [0, 2, 4, "3", None])
def test_another_schema_is_refused(split_bundle: Path, schema: Any) -> None:
    edit_manifest(split_bundle / "device", lambda data: data.update(schema=schema))
    with pytest.raises(BundleError, match=rf"schema {schema!r} where this version reads 3; export the bundle again"):
        open_bundle(split_bundle, "device")


@pytest.mark.parametrize("text", [b"[]", b"3", b"null", b"{}"])
def test_json_that_is_no_manifest_is_refused(split_bundle: Path, text: bytes) -> None:
    (split_bundle / "device" / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(BundleError, match="schema"):
        open_bundle(split_bundle, "device")


@pytest.mark.parametrize("key", ["architecture", "segments", "files", "kv", "source"])
@pytest.mark.parametrize("value", [None, 5, [3], "text"])
def test_fields_of_the_wrong_kind_are_refused(split_bundle: Path, key: str, value: Any) -> None:
    edit_manifest(split_bundle / "device", lambda data: data.update({key: value}))
    with pytest.raises(BundleError, match="not a manifest of schema 3"):
        open_bundle(split_bundle, "device")


@pytest.mark.parametrize("bits", [0, 16, -8, "8", None])
def test_a_kv_cache_of_other_bits_is_refused(split_bundle: Path, bits: Any) -> None:
    edit_manifest(split_bundle / "server", lambda data: data["kv"]["device"].update(bits=bits))
    with pytest.raises(
        BundleError, match=rf"KV cache of {bits} bits: must be one of 4, 8, 32; export the bundle again"
    ):
        open_bundle(split_bundle, "server")


def test_a_half_without_a_kv_cache_is_refused(split_bundle: Path) -> None:
    edit_manifest(split_bundle / "device", lambda data: data["kv"].pop("server"))
    with pytest.raises(BundleError, match="server"):
        open_bundle(split_bundle, "device")


@pytest.mark.parametrize("where", ["top", "architecture"])
def test_unknown_and_missing_fields_are_refused(split_bundle: Path, where: str) -> None:
    def add(data: dict[str, Any]) -> None:
        (data if where == "top" else data[where])["surprise"] = 1

    def remove(data: dict[str, Any]) -> None:
        del (data if where == "top" else data[where])["split" if where == "top" else "layers"]

    original = (split_bundle / "device" / MANIFEST_NAME).read_bytes()
    for change, name in ((add, "surprise"), (remove, "split" if where == "top" else "layers")):
        (split_bundle / "device" / MANIFEST_NAME).write_bytes(original)
        edit_manifest(split_bundle / "device", change)
        with pytest.raises(BundleError, match=name):
            open_bundle(split_bundle, "device")


def test_equal_manifests_have_equal_bytes(split_bundle: Path) -> None:
    manifest: Manifest = open_bundle(split_bundle, "device").manifest
    shuffled = replace(manifest, files=dict(reversed(manifest.files.items())))
    assert shuffled.to_json() == manifest.to_json()
    assert replace(manifest, max_length=manifest.max_length - 1).to_json() != manifest.to_json()
