"""What orchestrators ask a server: whether it takes sessions (gRPC health), and what it speaks (gRPC reflection)."""

from __future__ import annotations

import logging
from typing import Any

import grpc

from ..wire.isthmus_pb2 import DESCRIPTOR  # noqa: F401  (reflection finds the schema in the pool that this fills)
from ..wire.transport import SERVICE

logger = logging.getLogger(__name__)


class Health:
    """The services `grpc.health.v1.Health` and `grpc.reflection.v1alpha.ServerReflection`, where they are installed.

    They stand behind the same TLS as sessions do. Without the packages (extra ``server``) the server runs without.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._servicer: Any = None
        try:
            from grpc_health.v1 import health, health_pb2, health_pb2_grpc
            from grpc_reflection.v1alpha import reflection
        except ImportError as error:
            logger.info("no gRPC health and reflection (%s); they come with isthmus[server]", error)
            return
        self._states = {True: health_pb2.HealthCheckResponse.SERVING, False: health_pb2.HealthCheckResponse.NOT_SERVING}
        self._servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    async def say(self, *, serving: bool) -> None:
        """Tell whoever asks, or watches, whether sessions may begin."""
        if self._servicer is not None:
            for service in ("", SERVICE):
                await self._servicer.set(service, self._states[serving])
