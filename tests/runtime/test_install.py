import json
import logging
import shutil

import numpy as np
import pytest

from isthmus.cli.main import main
from isthmus.errors import BundleError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.install import install_bundle
from isthmus.runtime.segments import Embedding, LayerStack


@pytest.fixture
def half(tiny, tmp_path):
    """A copy of a device half that tests may alter."""
    folder = tmp_path / "device"
    shutil.copytree(tiny.bundle(split=2) / "device", folder)
    return folder


def hidden_states(folder):
    bundle = open_bundle(folder)
    session = LayerStack(bundle, 1).session(16)
    return session.forward(Embedding(bundle).rows([1, 2, 3, 4, 5])).copy()


def test_installed_weights_compute_the_same_bits(half):
    expected = hidden_states(half)
    assert not open_bundle(half).installed
    installation = install_bundle(half)
    assert open_bundle(half).installed
    assert installation.graphs == len([s for s in open_bundle(half).segments() if s.graph_file])
    np.testing.assert_array_equal(hidden_states(half), expected)


def test_graphs_are_opened_from_the_installation(half):
    install_bundle(half)
    bundle = open_bundle(half)
    assert all(bundle.graph_path(s).parent.name == "installed" for s in bundle.segments("block"))


def test_the_device_s_copy_of_the_back_is_installed_as_well(tiny, tmp_path):
    folder = tmp_path / "device"
    shutil.copytree(tiny.bundle(split=2, device_layers="all") / "device", folder)
    install_bundle(folder)
    back = open_bundle(folder, "device").own_back()
    assert all(back.graph_path(s).is_file() for s in back.segments() if s.graph_file)


def test_installing_again_replaces(half):
    install_bundle(half)
    (half / "installed" / "stale").write_text("")
    install_bundle(half)
    assert not (half / "installed" / "stale").exists()
    assert [p.name for p in half.iterdir() if "partial" in p.name] == []


def test_another_processor_s_installation_is_left_aside(half, caplog):
    install_bundle(half)
    record = json.loads((half / "installed" / "install.json").read_text())
    (half / "installed" / "install.json").write_text(json.dumps(record | {"processor": "another"}))
    with caplog.at_level(logging.WARNING):
        assert not open_bundle(half).installed
    assert "isthmus install" in caplog.text


@pytest.mark.parametrize("damage", ["altered", "missing", "record"])
def test_a_damaged_installation_is_refused(half, damage):
    install_bundle(half)
    data = next((half / "installed").glob("*.data"))
    match damage:
        case "altered":
            content = bytearray(data.read_bytes())
            content[len(content) // 2] ^= 1
            data.write_bytes(content)
        case "missing":
            data.unlink()
        case "record":
            (half / "installed" / "install.json").write_text("{}")
    with pytest.raises(BundleError, match="install"):
        open_bundle(half)


def test_a_full_disk_leaves_no_half_installation(half, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isthmus.runtime.install.FileEntry.of", full)
    with pytest.raises(BundleError, match="make room"):
        install_bundle(half)
    assert [p.name for p in half.iterdir() if "install" in p.name] == []


def test_the_command_says_what_it_wrote(half, capsys):
    assert main(["install", str(half)]) == 0
    assert "MB" in capsys.readouterr().out


def test_an_installed_bundle_generates_the_same_tokens(tiny, tmp_path):
    folder = tmp_path / "device"
    shutil.copytree(tiny.bundle() / "device", folder)
    expected = EdgeModel(folder, threads=1).generate([1, 2, 3], max_new_tokens=8).token_ids
    install_bundle(folder)
    assert EdgeModel(folder, threads=1).generate([1, 2, 3], max_new_tokens=8).token_ids == expected
