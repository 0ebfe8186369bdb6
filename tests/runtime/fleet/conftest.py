"""A fleet in this process: its front on a loop of its own, its workers ordinary servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.fleet import fleet as fleet_module
from isthmus.runtime.fleet.fleet import Fleet
from isthmus.runtime.fleet.front import Front
from isthmus.runtime.fleet.identity import FrontIdentity
from isthmus.runtime.fleet.worker import Report, Worker, WorkerOptions
from isthmus.runtime.server.audit import AuditLog
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity


class ThreadWorker:
    """A worker whose process is this one."""

    def __init__(self, folder: Path, options: WorkerOptions, identity: FrontIdentity) -> None:
        self.worker = Worker()
        self.folder = folder
        self.silent = False
        self._start = lambda: self.worker.start(folder, "127.0.0.1", options, identity.for_workers)

    @property
    def server(self) -> BackServer:
        return self.worker._server

    async def start(self) -> Report:
        return await asyncio.to_thread(self._start)

    async def report(self) -> Report:
        if self.silent:
            await asyncio.sleep(3600)
        return self.worker.report()

    async def stop(self) -> None:
        if hasattr(self.worker, "_server"):
            await asyncio.to_thread(self.worker.stop)

    def crash(self) -> None:
        self.server.stop(0)


class RunningFleet:
    """A front with its fleet; methods may be called from the test's thread."""

    def __init__(
        self,
        folder: Path,
        security: ServerSecurity,
        least: int,
        most: int,
        limits: ServerLimits,
        metrics: str | None,
        audit: AuditLog | None,
    ) -> None:
        options = WorkerOptions(threads=1, limits=limits)
        self.identity = FrontIdentity.create()
        self.workers: list[ThreadWorker] = []
        self.launching = threading.Event()
        self.launching.set()

        def launch(half: Path) -> ThreadWorker:
            self.workers.append(ThreadWorker(half, options, self.identity))
            return self.workers[-1]

        self.fleet = Fleet(folder, launch, self.identity.channel, options=options, least=least, most=most)
        self.front = Front(self.fleet, "127.0.0.1:0", security, metrics=metrics, audit=audit)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = self.run(self.front.start())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def call(self, function: Callable[[], Any]) -> Any:
        async def called() -> Any:
            return function()

        return self.run(called())

    def sessions(self) -> list[int]:
        """Of each worker that serves, in the order in which they were started."""
        return self.call(lambda: [len(backend.pins) for backend in self.fleet.backends])

    def busy(self) -> list[ThreadWorker]:
        """Workers with sessions."""
        return self.call(lambda: [backend.process for backend in self.fleet.backends if backend.pins])

    def close(self) -> None:
        self.run(self.front.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def folder(tiny: Any) -> Path:
    return Path(tiny.bundle(bits=8, split=2))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_LOOK_S", 0.05)
    monkeypatch.setattr(fleet_module, "_REPORT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(fleet_module, "_REPLAY_S", 5.0)
    monkeypatch.setitem(RemoteBack.__init__.__kwdefaults__, "step_timeout", 10.0)


@pytest.fixture
def make_fleet(folder: Path) -> Iterator[Callable[..., RunningFleet]]:
    """Start fleets; keyword arguments are limits of a worker."""
    fleets = []

    def start(
        least: int = 2,
        most: int | None = None,
        *,
        half: Path = folder / "server",
        security: ServerSecurity | None = None,
        metrics: str | None = None,
        audit: AuditLog | None = None,
        **limits: Any,
    ) -> RunningFleet:
        security = security or ServerSecurity(insecure=True)
        fleets.append(RunningFleet(half, security, least, most or least, ServerLimits(**limits), metrics, audit))
        return fleets[-1]

    yield start
    for fleet in fleets:
        fleet.close()


@pytest.fixture
def open_model(folder: Path) -> Callable[..., EdgeModel]:
    def make(*addresses: str, half: Path = folder / "device", **options: Any) -> EdgeModel:
        options = {"codec": "tabq", "threads": 1, "draft": "off", "security": ChannelSecurity(insecure=True)} | options
        return EdgeModel(half, server=",".join(addresses), **options)

    return make
