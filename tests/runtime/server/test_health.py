"""What orchestrators see of a server, in plaintext and behind TLS."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ServerSecurity
from isthmus.runtime.wire.transport import SERVICE

pytest.importorskip("grpc_health")
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def folder(tiny: Any) -> Path:
    return Path(tiny.bundle(bits=8, split=2)) / "server"


def test_a_server_serves_until_it_drains(folder):
    with BackServer.from_bundle(folder, threads=1, security=ServerSecurity(insecure=True)) as server:
        with grpc.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", SERVICE):
                assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert next(watch).status == SERVING
            drain = threading.Thread(target=server.drain, args=(0.5,))
            drain.start()
            assert next(watch).status == NOT_SERVING
            watch.cancel()
        drain.join()


def test_another_service_is_unknown(folder):
    with (
        BackServer.from_bundle(folder, threads=1, security=ServerSecurity(insecure=True)) as server,
        grpc.insecure_channel(server.address) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_tells_the_schema(folder):
    with (
        BackServer.from_bundle(folder, threads=1, security=ServerSecurity(insecure=True)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        services, schema = list(ask(iter(requests)))
    assert SERVICE in [service.name for service in services.list_services_response.service]
    (described,) = schema.file_descriptor_response.file_descriptor_proto
    assert b"KVChunk" in described


def test_a_server_without_the_packages_runs_without_them(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "grpc_health.v1", None)
    with BackServer.from_bundle(folder, threads=1, security=ServerSecurity(insecure=True)) as server:
        with (
            grpc.insecure_channel(server.address) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        server.drain(0.0)
