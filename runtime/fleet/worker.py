"""A worker of the fleet: a server in a process of its own, on any machine."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..server.limits import ServerLimits
from .identity import WorkerIdentity

if TYPE_CHECKING:
    from .pipeline import LaterStage


@dataclass(frozen=True)
class WorkerOptions:
    """How workers are started.

    Attributes:
        threads: of onnxruntime, in each process.
        limits: of each.
        memory_limit_mb: resident memory of each process at its peak; by default what its machine has free.
        stages: processes that share the layers of the back, see `isthmus.runtime.fleet.pipeline`.
    """

    threads: int = 1
    limits: ServerLimits = ServerLimits()  # noqa: RUF009  (frozen)
    memory_limit_mb: float | None = None
    stages: int = 1


@dataclass(frozen=True)
class Report:
    """What a worker says of itself.

    Attributes:
        sessions: those on their lease included.
        kv_bytes: reserved.
        kv_budget: that may be.
        prefixes: its cache of shared prompts: bytes, rows asked of it so far, and rows that it had.
    """

    address: str
    sessions: int
    kv_bytes: int
    kv_budget: int
    process: int
    prefixes: tuple[int, int, int] = (0, 0, 0)


class WorkerProcess(Protocol):
    """A worker, as the front knows it."""

    async def start(self) -> Report:
        """Wait until it serves."""
        ...

    async def report(self) -> Report:
        """Ask it; an error or no answer means that it is lost."""
        ...

    async def stop(self) -> None:
        """End it, with what it has; at once if it does not answer."""
        ...


class Worker:
    """The worker in its own process: an ordinary server, which none but the front may enter."""

    def start(
        self,
        folder: Path,
        host: str,
        options: WorkerOptions,
        identity: WorkerIdentity,
        later: Sequence[LaterStage] = (),
    ) -> Report:
        """Open the server half and listen on a free port.

        Args:
            folder: ``OUT/server``.
            host: of this machine, as the front reaches it.
            options: see the class.
            identity: what it shows, and whom it lets in.
            later: the further stages, if this process has the first blocks alone.

        Raises:
            BundleError: the folder is no intact server half on this machine.
            MemoryLimitError: it does not fit.
        """
        from ..server.server import BackServer

        # The front counts each device's sessions, in all workers, and its frames.
        limits = replace(
            options.limits, max_sessions_per_device=options.limits.max_sessions, frames_per_s_per_device=math.inf
        )
        self._files = tempfile.TemporaryDirectory(prefix="isthmus-worker-")  # readable by its owner alone
        security, memory = identity.write(Path(self._files.name)), options.memory_limit_mb
        if later:
            from .pipeline import open_pipeline

            engine, limits = open_pipeline(
                folder, later, threads=options.threads, limits=limits, memory_limit_mb=memory
            )
            self._server = BackServer(engine, f"{host}:0", security=security, limits=limits)
        else:
            self._server = BackServer.from_bundle(
                folder,
                f"{host}:0",
                threads=options.threads,
                security=security,
                limits=limits,
                memory_limit_mb=memory,
            )
        self._server.start()
        return self.report()

    def stop(self) -> None:
        """End the server; what its sessions have not got is lost."""
        self._server.stop(0)
        self._files.cleanup()

    def report(self) -> Report:
        """How it is."""
        server = self._server
        if server.wait(0):
            raise RuntimeError("the server has ended")
        kept = server.prefixes
        return Report(
            server.address,
            server.sessions,
            server.kv_bytes,
            server.limits.kv_bytes,
            os.getpid(),
            (kept.bytes, kept.asked, kept.reused) if kept is not None else (0, 0, 0),
        )
