"""The link is measured by the frames of a real session, which is gone afterwards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from isthmus.errors import LinkError, ProtocolError, RequestError
from isthmus.runtime.edge import link_probe
from isthmus.runtime.edge.link_probe import measure_link
from isthmus.runtime.wire.security import ChannelSecurity


@pytest.fixture
def bundle(engine):
    return SimpleNamespace(manifest=engine.manifest, manifest_sha256=engine.manifest_sha256, folder="device")


def test_round_trip_and_throughput_come_from_steps_of_one_session(server, bundle, engine, monkeypatch) -> None:
    frames = []
    on_the_way = link_probe._on_the_way
    monkeypatch.setattr(link_probe, "_on_the_way", lambda report: frames.append(report) or on_the_way(report))
    measured = measure_link(bundle, server.address, ChannelSecurity())
    assert measured.server == server.address
    assert 0 < measured.round_trip_ms < 1000
    assert measured.up_mbit_s > 0
    assert measured.frame_bytes == max(frame.bytes_up for frame in frames) > 16 * 4 * 100
    assert engine.sessions == []
    assert set(measured.to_dict()) == {"server", "round_trip_ms", "up_mbit_s", "frame_bytes"}


def test_frames_stop_growing_once_one_takes_long_enough(server, bundle, monkeypatch) -> None:
    monkeypatch.setattr(link_probe, "_on_the_way", lambda report: report.bytes_up / 1000)
    measured = measure_link(bundle, server.address, ChannelSecurity())
    assert measured.frame_bytes < 4 * 16 * 4 * 16
    assert measured.up_mbit_s == pytest.approx(8e-3, rel=1)  # 1000 bytes a second, less what a round trip takes


def test_a_bundle_without_a_server_has_no_link(bundle) -> None:
    bundle.manifest = replace(bundle.manifest, split=bundle.manifest.architecture.layers)
    with pytest.raises(RequestError, match="wholly on the device"):
        measure_link(bundle, "127.0.0.1:1", ChannelSecurity())


def test_a_server_that_is_not_there_and_one_of_another_bundle_are_refused(server, bundle) -> None:
    with pytest.raises(LinkError):
        measure_link(bundle, "127.0.0.1:1", ChannelSecurity(insecure=True))
    bundle.manifest_sha256 = "b" * 64
    with pytest.raises(ProtocolError, match="MANIFEST_MISMATCH"):
        measure_link(bundle, server.address, ChannelSecurity())
