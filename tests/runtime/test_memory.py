import dataclasses
import subprocess
import sys

import pytest

from isthmus.cli.main import main
from isthmus.devices.memory import MachineMemory
from isthmus.errors import MemoryLimitError, RequestError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.generate import PREFILL_CHUNK
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.memory import half_memory, kv_budget
from isthmus.runtime.server.server import BackServer

TIGHT_MB = 20.0


@pytest.fixture
def device(tiny):
    return open_bundle(tiny.bundle() / "device")


def test_a_longer_context_and_an_installation_change_the_parts(device):
    short, full = (half_memory(device, positions, chunk=PREFILL_CHUNK) for positions in (64, 512))
    assert full.total_mb > short.total_mb
    installed = half_memory(dataclasses.replace(device, installed=True), 64, chunk=PREFILL_CHUNK)
    assert installed.evictable_mb > short.evictable_mb


def test_the_device_s_copy_of_the_back_counts(tiny):
    front, whole = (
        half_memory(open_bundle(tiny.bundle(split=2, **options) / "device"), 64, chunk=PREFILL_CHUNK)
        for options in ({}, {"device_layers": "all"})
    )
    assert whole.parts["graphs"] > front.parts["graphs"]
    assert whole.parts["weights, packed"] > front.parts["weights, packed"]


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(tiny, monkeypatch):
    opened = []
    monkeypatch.setattr("isthmus.devices.backend.ort.InferenceSession", lambda *_, **__: opened.append(1))
    with pytest.raises(MemoryLimitError, match="memory limit 20 MB: this needs"):
        EdgeModel(tiny.bundle() / "device", memory_limit_mb=TIGHT_MB)
    assert not opened


def test_the_refusal_names_the_context_that_fits(device):
    middle = half_memory(device, 200, chunk=PREFILL_CHUNK).total_mb
    with pytest.raises(MemoryLimitError, match=r"a context of \d+ positions would fit"):
        EdgeModel(device.folder, memory_limit_mb=middle)


def test_a_model_that_fits_generates_within_its_context(device):
    limit = half_memory(device, 512, chunk=PREFILL_CHUNK).total_mb + 50
    model = EdgeModel(device.folder, context=8, memory_limit_mb=limit, threads=1)
    assert model.generate([1, 2, 3], max_new_tokens=50).new_tokens <= 5
    with pytest.raises(RequestError, match="--context"):
        model.generate([1] * 8)


@pytest.mark.parametrize("context", [0, 1, 513])
def test_a_context_outside_the_bundle_s_is_refused(device, context):
    with pytest.raises(RequestError, match=f"context={context}: must lie between 2 and 512"):
        EdgeModel(device.folder, context=context)


def test_a_server_gives_its_caches_what_the_weights_leave(tiny):
    server = open_bundle(tiny.bundle(split=2) / "server")
    fixed = half_memory(server, server.manifest.max_length, chunk=512).total_mb
    more = kv_budget(server, chunk=512, limit_mb=fixed + 100) - kv_budget(server, chunk=512, limit_mb=fixed + 60)
    assert more == pytest.approx(40e6, rel=0.05)
    limited = BackServer.from_bundle(server.folder, memory_limit_mb=fixed + 100)
    assert limited.limits.kv_bytes < 200e6
    with pytest.raises(MemoryLimitError, match="weights, packed"):
        BackServer.from_bundle(server.folder, memory_limit_mb=TIGHT_MB)


def test_the_command_refuses_with_the_table_and_without_a_traceback(tiny):
    # A process of its own: it holds itself to the limit.
    command = [sys.executable, "-m", "isthmus.cli.main", "generate", str(tiny.bundle() / "device"), "-p", "x"]
    refused = subprocess.run([*command, "--memory-limit", "90MB"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "KV cache" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_limit_without_a_unit_is_refused(tiny, capsys):
    assert main(["generate", str(tiny.bundle() / "device"), "-p", "x", "--memory-limit", "20"]) == 1
    assert "must be a positive number with its unit" in capsys.readouterr().err


def test_what_a_container_allows_is_the_limit_where_none_is_given(device, monkeypatch):
    monkeypatch.setattr("isthmus.runtime.memory.machine_memory", lambda: MachineMemory(100.0, 1.0))
    with pytest.raises(MemoryLimitError, match="needs"):
        EdgeModel(device.folder)
