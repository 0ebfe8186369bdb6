"""The fleet's one address."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from ...devices.backend import default_threads
from ...devices.memory import machine_memory
from ...errors import RequestError
from ..server.admission import Admission
from ..server.audit import AuditLog
from ..server.health import Health
from ..server.limits import ServerLimits
from ..wire.security import ServerSecurity
from ..wire.transport import SERVER_OPTIONS
from .fleet import Fleet
from .identity import FrontIdentity
from .relay import FrontService
from .worker import WorkerOptions

logger = logging.getLogger(__name__)

DEFAULT_WORKERS = 2
_MOVE_S = 2.0  # that devices have, once told to move, to take note of it
_LOOK_S = 0.05
_WATCH_S = 1.0  # between looks at who may still be served


class Front:
    """Listens for devices and hands their sessions to a fleet's workers. Used on the event loop.

    ::

        front = Front(fleet, "127.0.0.1:7070", security)
        await front.start()
        …
        await front.drain(10.0)

    Args:
        fleet: started by `start`, ended by `drain` and `stop`.
        listen: ``HOST:PORT``; port 0 picks a free one.
        security: as a server's.
        metrics: ``HOST:PORT`` where Prometheus and `isthmus top` may ask; nowhere by default.
        audit: which devices come, open, return and leave; none by default. The caller closes it.
    """

    def __init__(
        self,
        fleet: Fleet,
        listen: str,
        security: ServerSecurity,
        *,
        metrics: str | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self.fleet = fleet
        self.security = security
        self.address = ""
        self.metrics_address: str | None = None
        self._listen = listen
        self._metrics_listen = metrics
        self._admission = Admission(security)
        self._service = FrontService(fleet, self._admission, audit)
        self._watching: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._health: Health | None = None
        self._close_metrics: Callable[[], None] = lambda: None

    async def start(self) -> str:
        """Start the workers, then listen; returns the address.

        Raises:
            IsthmusError: a worker cannot start.
            LinkError: the address cannot be bound.
            SecurityError: certificate or key cannot be used.
        """
        streams = self.fleet.most * self.fleet.options.limits.streams
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=streams)
        server.add_generic_rpc_handlers((self._service.handler(),))
        self._health = Health(server)
        address = self.security.bind(server, self._listen)
        self._serve_metrics()
        try:
            await self.fleet.start()
            await server.start()
            await self._health.say(serving=True)
        except BaseException:
            await self.stop()
            raise
        self._server = server
        self._watching = asyncio.create_task(self._watch())
        self.address = address
        return self.address

    async def drain(self, patience: float) -> None:
        """End the fleet without losing a generation, as a server does, see `BackServer.drain`."""
        self._service.draining = True
        if self._health is not None:
            await self._health.say(serving=False)
        await self._wait_for_streams(patience)
        self._service.move_all()
        await self._wait_for_streams(_MOVE_S)
        await self.stop()

    async def stop(self, grace: float = 1.0) -> None:
        """End the front, then the workers: streams have ``grace`` seconds."""
        if self._watching is not None:
            self._watching.cancel()
        if self._server is not None:
            await self._server.stop(grace)
        self._close_metrics()
        await self.fleet.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            if self._admission.changed():
                self._service.expel()

    async def _wait_for_streams(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self.fleet.pins.carried and loop.time() < deadline:
            await asyncio.sleep(_LOOK_S)

    def _serve_metrics(self) -> None:
        if self._metrics_listen is None:
            return
        from ..server.metrics import Metrics

        fleet = self.fleet
        metrics = Metrics(
            {
                "workers": lambda: len(fleet.backends),
                "workers_lost": lambda: fleet.lost,
                "sessions": lambda: len(fleet.pins),
                "sessions_carried": lambda: fleet.pins.carried,
                "kv_bytes": lambda: sum(backend.kv_bytes for backend in fleet.backends),
                # What the workers say themselves: sessions on their lease and those that were left behind, too.
                "workers_sessions": lambda: sum(backend.report.sessions for backend in fleet.backends),
                "workers_kv_bytes": lambda: sum(backend.report.kv_bytes for backend in fleet.backends),
                "prefix_cache_bytes": lambda: sum(backend.report.prefixes[0] for backend in fleet.backends),
                "prefix_tokens_asked": lambda: sum(backend.report.prefixes[1] for backend in fleet.backends),
                "prefix_tokens_reused": lambda: sum(backend.report.prefixes[2] for backend in fleet.backends),
                "frames_held": lambda: self._service.frames.held,
                "kv_budget_bytes": lambda: sum(backend.kv_budget for backend in fleet.backends),
            }
        ).serve(self._metrics_listen)
        self.metrics_address, self._close_metrics = metrics.address, metrics.close


@dataclass(frozen=True)
class FleetPlan:
    """What a fleet consists of.

    Attributes:
        least: workers.
        most: workers.
        options: of each.
        ray_address: of the cluster they run on; None for this machine.
    """

    least: int
    most: int
    options: WorkerOptions
    ray_address: str | None = None

    @classmethod
    def of(
        cls,
        *,
        workers: int | None = None,
        least: int | None = None,
        most: int | None = None,
        stages: int = 1,
        threads: int | None = None,
        memory_limit_mb: float | None = None,
        limits: ServerLimits | None = None,
        ray_address: str | None = None,
    ) -> FleetPlan:
        """A plan of what is given; the rest is shared out among as many workers as there may be.

        Raises:
            RequestError: the numbers do not fit together.
        """
        if workers is not None and (least is not None or most is not None):
            raise RequestError("a number of workers, and a least or a most number: give one or the other")
        if workers is not None:
            least = most = workers
        least = least if least is not None else min(DEFAULT_WORKERS, most or DEFAULT_WORKERS)
        most = most if most is not None else max(DEFAULT_WORKERS, least)
        if not 1 <= least <= most:
            raise RequestError(f"{least} to {most} workers: must be at least 1, and the least no more than the most")
        if stages < 1:
            raise RequestError(f"a pipeline of {stages} processes: must be at least 1")
        if threads is None:
            threads = max(1, default_threads() // (most * stages))
        free = machine_memory()
        if memory_limit_mb is None and ray_address is None and free is not None:
            memory_limit_mb = free.free_mb / (most * stages)
        options = WorkerOptions(threads, limits or ServerLimits(), memory_limit_mb, stages)
        return cls(least, most, options, ray_address)


async def serve(
    folder: str | Path,
    listen: str,
    plan: FleetPlan,
    *,
    security: ServerSecurity,
    metrics: str | None = None,
    audit: str | Path | None = None,
    drain_timeout: float = 10.0,
    serving: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until a signal comes: SIGINT ends the fleet, SIGTERM drains it, SIGHUP has it look at the folder again.

    Args:
        folder: ``OUT/server``, on every machine that has a worker.
        listen: see `Front`.
        plan: the workers.
        security: see `Front`.
        metrics: see `Front`.
        audit: file of the log, see `isthmus.runtime.server.audit`; none by default.
        drain_timeout: seconds that running sessions have after SIGTERM, before their devices are told to move.
        serving: called with the address once devices may come.

    Raises:
        IsthmusError: the fleet cannot start.
    """
    from .cluster import RayCluster

    loop = asyncio.get_running_loop()
    identity = FrontIdentity.create()
    with contextlib.ExitStack() as stack:
        log = None if audit is None else stack.enter_context(AuditLog(audit))
        cluster = stack.enter_context(RayCluster(plan.ray_address))
        fleet = Fleet(
            folder,
            lambda half: cluster.launch(half, plan.options, identity.for_workers),
            identity.channel,
            options=plan.options,
            least=plan.least,
            most=plan.most,
        )
        front = Front(fleet, listen, security, metrics=metrics, audit=log)
        ended: asyncio.Future[bool] = loop.create_future()

        def end(*, drain: bool) -> None:
            if not ended.done():
                ended.set_result(drain)

        # Ray has put its own in place of these.
        loop.add_signal_handler(signal.SIGINT, lambda: end(drain=False))
        loop.add_signal_handler(signal.SIGTERM, lambda: end(drain=True))
        loop.add_signal_handler(signal.SIGHUP, fleet.roll)
        serving(await front.start())
        if await ended:
            draining = loop.create_task(front.drain(drain_timeout))
            for again in (signal.SIGINT, signal.SIGTERM):  # a second one ends it at once
                loop.add_signal_handler(again, draining.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await draining
        await front.stop(0)
