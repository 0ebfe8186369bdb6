"""Workers as Ray actors, on this machine or on those of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...errors import IsthmusError, LinkError
from ..skipping import Bypass
from .identity import WorkerIdentity
from .pipeline import Part, Stage
from .worker import Report, Worker, WorkerOptions

_STOP_TIMEOUT_S = 3.0
_STORE_BYTES = 80 << 20  # of Ray's object store, which nothing here needs: its least


class RayCluster:
    """Ray on this machine, ended with this object, or a cluster that is there already.

    Args:
        address: of the cluster, as `ray.init` takes it; None starts Ray on this machine: without a dashboard, without
            usage statistics, its files in a temporary folder.

    Raises:
        LinkError: Ray cannot be started or reached.
    """

    def __init__(self, address: str | None = None) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_worker_niceness", "0")  # a worker is no batch job
        self.local = address is None
        if self.local:
            # Ray listens on every interface: whoever does not have this, which is in no file, is turned away.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        import ray  # reads these when it is imported

        self._folder: str | None = None
        options: dict[str, Any] = {"address": address}
        if self.local:
            self._folder = tempfile.mkdtemp(prefix="isthmus-")  # short: Unix sockets lie in it
            os.environ["TMPDIR"] = self._folder  # of the workers, too, so that a killed one leaves nothing
            options = {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_temp_dir": f"{self._folder}/ray",  # which Ray opens to everyone, its parent is not
                "_node_ip_address": "127.0.0.1",
            }
        try:
            ray.init(**options, configure_logging=False, log_to_driver=True)
        except Exception as error:  # Ray raises what it meets
            self._remove_folder()
            where = "on this machine" if self.local else f"at {address}"
            raise LinkError(f"no Ray {where}: {error}") from error
        self._ray: Any = ray

    def launch(self, folder: Path, options: WorkerOptions, identity: WorkerIdentity) -> RayWorker:
        """A process for a worker, on the machine that has the fewest."""
        return RayWorker(self._ray, folder, options, identity)

    def close(self) -> None:
        """Leave the cluster, with all workers; end it if it was started here."""
        self._ray.shutdown()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _ActorWorker(Worker):
    """The worker, which learns its machine's address from Ray."""

    def start_on_node(
        self, folder: Path, options: WorkerOptions, identity: WorkerIdentity, later: Sequence[Any]
    ) -> Report:
        from ray.util import get_node_ip_address

        return self.start(folder, get_node_ip_address(), options, identity, [_RemoteStage(actor) for actor in later])


class _RemoteStage:
    """A later stage in an actor, see `isthmus.runtime.fleet.pipeline.LaterStage`."""

    def __init__(self, actor: Any) -> None:
        import ray

        self._actor, self._get = actor, ray.get

    def take(self, session: int, capacity: int, bypass: Bypass) -> None:
        self._get(self._actor.take.remote(session, capacity, bypass))

    def forward(self, parts: Sequence[Part], hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self._get(self._actor.forward.remote(parts, hidden))
        return rows

    def append(self, session: int, position: int, rows: NDArray[Any]) -> None:
        self._get(self._actor.append.remote(session, position, rows))

    def give_back(self, session: int) -> None:
        self._get(self._actor.give_back.remote(session))

    def room(self) -> int:
        room: int = self._get(self._actor.room.remote())
        return room


class RayWorker:
    """A worker in an actor, see `isthmus.runtime.fleet.worker.WorkerProcess`."""

    def __init__(self, ray: Any, folder: Path, options: WorkerOptions, identity: WorkerIdentity) -> None:
        self._ray = ray

        def actor(kind: type, *arguments: object) -> Any:
            # Ray must not start it again: its sessions would be gone, and nobody would know.
            return ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy="SPREAD")(kind).remote(*arguments)

        stage = options.stages, options.threads, options.limits, options.memory_limit_mb
        self._actor = actor(_ActorWorker)
        self._later = [actor(Stage, folder, number, *stage) for number in range(1, options.stages)]
        self._arguments = folder, options, identity, self._later

    async def start(self) -> Report:
        """Wait until it serves."""
        for stage in self._later:
            await self._result(stage.room.remote)
        return await self._result(lambda: self._actor.start_on_node.remote(*self._arguments))

    async def report(self) -> Report:
        """Ask it; raises once its process is gone, or that of a later stage."""
        for stage in self._later:
            await self._result(stage.room.remote)
        return await self._result(self._actor.report.remote)

    async def stop(self) -> None:
        """Let it put its things away, and end its process."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._result(self._actor.stop.remote)
        for actor in (self._actor, *self._later):
            self._ray.kill(actor)

    async def _result(self, call: Callable[[], Any]) -> Any:
        pending: Awaitable[Any] = asyncio.wrap_future(call().future())
        try:
            return await pending
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, IsthmusError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayActorError as error:
            text = str(error).strip()
            _, ours, raised = text.rpartition("\nisthmus.errors.")
            if error.actor_init_failed and ours:  # Ray gives the traceback, at whose end is what was raised
                text = raised.partition(": ")[2]
            raise LinkError(text) from error
