"""The server: an asyncio gRPC front on a thread of its own, and one thread that computes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import grpc

from ...devices.backend import default_threads
from ...devices.background import BackgroundService
from ..bundle import open_bundle
from ..memory import kv_budget, process_limit_mb
from ..wire.security import ServerSecurity
from ..wire.transport import SERVER_OPTIONS
from .admission import Admission
from .audit import AuditLog
from .batcher import Batcher
from .compute import ComputeEngine
from .compute_thread import ComputeThread
from .frame_rate import FrameRate
from .handshakes import Handshakes
from .health import Health
from .limits import ServerLimits
from .prefix_cache import PrefixCache
from .service import SessionService
from .sessions import SessionTable

logger = logging.getLogger(__name__)

_WATCH_S = 1.0  # between looks at who may still be served
_STREAMS_S = 0.05  # between looks at how many streams are left
_MOVE_S = 2.0  # that devices have, once told to move, to ask for their next token


class BackServer(BackgroundService):
    """Serves the back half of a bundle to many devices at once.

    ::

        with BackServer.from_bundle("out/server", "127.0.0.1:7070") as server:
            print(server.address)
            server.wait()

    Args:
        engine: the opened back half; its calls come from one thread.
        listen: ``HOST:PORT``; port 0 picks a free one.
        security: TLS with given files or the development certificate, or plaintext.
        limits: what clients are granted at most.
        metrics: ``HOST:PORT`` where Prometheus may ask for `isthmus.runtime.server.metrics`; nowhere by default.
        audit: file of `isthmus.runtime.server.audit`; none by default.
    """

    def __init__(
        self,
        engine: ComputeEngine,
        listen: str = "127.0.0.1:0",
        *,
        security: ServerSecurity | None = None,
        limits: ServerLimits | None = None,
        metrics: str | None = None,
        audit: str | Path | None = None,
    ) -> None:
        super().__init__("server")
        self._audit_path = audit
        self._service: SessionService | None = None
        self.metrics_address: str | None = None
        self._metrics_listen = metrics
        self.security = security if security is not None else ServerSecurity()
        self.limits = limits if limits is not None else ServerLimits()
        self.manifest = engine.manifest
        self._engine = engine
        self._listen = listen
        self._table: SessionTable | None = None
        self._health: Health | None = None
        self._grace = 0.0

    @classmethod
    def from_bundle(
        cls,
        folder: str | Path,
        listen: str = "127.0.0.1:0",
        *,
        threads: int | None = None,
        security: ServerSecurity | None = None,
        limits: ServerLimits | None = None,
        memory_limit_mb: float | None = None,
        metrics: str | None = None,
        audit: str | Path | None = None,
    ) -> BackServer:
        """Open ``OUT/server`` and make its server.

        Args:
            folder: the server half of a bundle.
            listen: see the class.
            threads: of onnxruntime; by default the processors at hand, at most four.
            security: see the class.
            limits: see the class; too little memory lowers those of keys and values.
            memory_limit_mb: resident memory at the peak, by default what the machine or the container has free; what
                the weights leave of it goes to KV caches and to those of shared prompts.
            metrics: see the class.
            audit: see the class.

        Raises:
            BundleError: the folder is no intact server half.
            MemoryLimitError: weights and one session of full length do not fit; nothing was loaded.
        """
        from ..back import BackEngine
        from ..ragged import advance_together

        bundle = open_bundle(folder, "server")
        limits = limits if limits is not None else ServerLimits()
        together = limits.max_batch > 1 and advance_together(bundle)
        if together:
            bundle = replace(bundle, installed=False)  # the packed weights are those of the other graphs
        budget = kv_budget(bundle, chunk=limits.max_frame_tokens, limit_mb=process_limit_mb(memory_limit_mb))
        longest = bundle.kv.cache_bytes(bundle.manifest.half_layers("server"), bundle.manifest.max_length)
        limits = limits.within(budget, longest)
        threads = default_threads() if threads is None else threads
        if together:
            capacity = min(limits.max_session_tokens, bundle.manifest.max_length)
            try:
                engine = BackEngine(bundle, threads, together=limits.max_sessions, capacity=capacity)
                return cls(engine, listen, security=security, limits=limits, metrics=metrics, audit=audit)
            except OSError as error:
                logger.warning(
                    "no address space for %d sessions of %d tokens side by side (%s): they take turns; allow fewer "
                    "sessions, or hold the memory by a control group",
                    limits.max_sessions,
                    capacity,
                    error,
                )
        engine, limits = BackEngine(bundle, threads), replace(limits, max_batch=1)
        return cls(engine, listen, security=security, limits=limits, metrics=metrics, audit=audit)

    @property
    def sessions(self) -> int:
        """Number of sessions, those on their lease included."""
        return len(self._table) if self._table is not None else 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that are reserved."""
        return self._table.kv_bytes if self._table is not None else 0

    @property
    def prefixes(self) -> PrefixCache | None:
        """Keys and values that are kept for later sessions; None before `start`."""
        return self._table.prefixes if self._table is not None else None

    def stop(self, grace: float = 1.0) -> None:
        """End the server: running streams have ``grace`` seconds, then all sessions are freed. Safe twice."""
        self._grace = grace
        super().stop()

    def drain(self, patience: float) -> None:
        """End the server without losing a generation.

        No session begins any more, running ones have ``patience`` seconds. Those that are left then are told to move,
        and their devices make them again on another server, see `isthmus.runtime.edge.remote_session`.
        """
        table = self._table
        if table is not None:
            table.draining = True
            self._say_not_serving()
            self._wait_for_streams(table, patience)
            table.moving = True
            self._wait_for_streams(table, _MOVE_S)
        self.stop()

    def _say_not_serving(self) -> None:
        if self._loop is not None and self._health is not None and not self._ended.is_set():
            told = asyncio.run_coroutine_threadsafe(self._health.say(serving=False), self._loop)
            with contextlib.suppress(TimeoutError):  # it ends by itself meanwhile
                told.result(_MOVE_S)

    def reload(self) -> None:
        """Look at certificates, revocation list and tokens now; without this they are seen within seconds."""
        if self._service is not None:
            logger.info("certificates, revocation list and tokens are looked at again")
            self._call(self._service.expel)

    @staticmethod
    async def _watch(admission: Admission, service: SessionService, handshakes: Handshakes) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            if admission.changed():
                service.expel()
            if failed := handshakes.failed():
                service.note_failed(failed)

    def _wait_for_streams(self, table: SessionTable, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while table.carried and time.monotonic() < deadline and not self.wait(_STREAMS_S):
            pass

    async def _serve(self, started: Future[str]) -> None:
        admission = Admission(self.security)
        batcher = Batcher(self._engine, self.limits.max_batch)
        with contextlib.ExitStack() as stack:
            compute = stack.enter_context(ComputeThread(batcher))
            table = SessionTable(self._engine, self.limits, compute)
            handshakes = Handshakes(self.limits.idle_s)
            server = grpc.aio.server(
                interceptors=[handshakes],
                options=SERVER_OPTIONS,
                maximum_concurrent_rpcs=self.limits.streams,
            )
            frames = FrameRate(self.limits.frames_per_s_per_device)
            metrics = None
            if self._metrics_listen is not None:
                from .metrics import Metrics

                metrics = Metrics(
                    {
                        "sessions": lambda: len(table),
                        "sessions_carried": lambda: table.carried,
                        "kv_bytes": lambda: table.kv_bytes,
                        "kv_budget_bytes": lambda: self.limits.kv_bytes,
                        "runs": lambda: batcher.runs,
                        "steps_run": lambda: batcher.steps_run,
                        "prefix_cache_bytes": lambda: table.prefixes.bytes,
                        "prefix_tokens_asked": lambda: table.prefixes.asked,
                        "prefix_tokens_reused": lambda: table.prefixes.reused,
                        "frames_held": lambda: frames.held,
                    }
                )
                self.metrics_address = stack.enter_context(metrics.serve(self._metrics_listen)).address
                logger.info("metrics on http://%s/metrics", self.metrics_address)
            audit = None if self._audit_path is None else stack.enter_context(AuditLog(self._audit_path))
            service = self._service = SessionService(
                self._engine, table, compute, self.limits, admission, frames, metrics, audit
            )
            server.add_generic_rpc_handlers((service.handler(),))
            self._health = Health(server)
            address = self.security.bind(server, self._listen, handshakes.begin)
            await server.start()
            await self._health.say(serving=True)
            self._table = table
            started.set_result(address)
            watch = asyncio.create_task(self._watch(admission, service, handshakes))
            await self._stopping.wait()
            watch.cancel()
            await server.stop(self._grace)
            await table.free_all()
