"""The workers of a fleet: started, watched, replaced, as many as the load wants, of one bundle and then of the next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ...errors import IsthmusError, LinkError
from ..bundle import Bundle, Manifest, open_bundle
from ..wire import isthmus_pb2 as pb
from .pins import Pin, PinTable
from .pipeline import cut
from .scaling import Scaler
from .worker import Report, WorkerOptions, WorkerProcess

logger = logging.getLogger(__name__)

_LOOK_S = 0.5  # between two looks at the workers, and two reports of each
_REPORT_TIMEOUT_S = 10.0  # a worker that computes answers in milliseconds; below a step's deadline on the device
_START_TIMEOUT_S = 300.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # after a worker that did not start; doubled each time
_REPLAY_S = 60.0  # that a device has to make a lost session again on a version that begins no other ones


@dataclass(eq=False)
class Backend:
    """A worker that serves.

    Attributes:
        report: what it has said of itself last.
        max_sessions: at once.
        pins: its sessions, those that are being opened included.
        retiring: it takes no further sessions and ends with its last one.
        lost: it is gone.
        doubted: set once a stream to it broke, until it reports.
    """

    number: int
    process: WorkerProcess
    channel: grpc.aio.Channel
    report: Report
    max_sessions: int
    pins: set[Pin] = field(default_factory=set)
    retiring: bool = False
    lost: bool = False
    doubted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def kv_budget(self) -> int:
        """Bytes of KV caches that it may hold."""
        return self.report.kv_budget

    @property
    def kv_bytes(self) -> int:
        """Bytes that its sessions have reserved."""
        return sum(pin.kv_bytes for pin in self.pins)

    @property
    def free(self) -> int:
        """Bytes that further sessions may have."""
        return self.kv_budget - self.kv_bytes

    @property
    def load(self) -> float:
        """Share of its room that is taken, of sessions or of KV cache, whichever is more."""
        return max(len(self.pins) / self.max_sessions, self.kv_bytes / self.kv_budget)


@dataclass(eq=False)
class Version:
    """A bundle and its workers.

    Attributes:
        folder: where workers open it: links are followed once, so that the path may come to mean the next version.
        retiring: another version has taken its place; it ends with its last session.
        reopen_until: a retiring one takes sessions until then: those that a worker took along are made again.
        starting: workers that do not serve yet.
        failures: workers in a row that did not start.
        not_before: when the next one may be started.
    """

    folder: Path
    bundle: Bundle
    backends: list[Backend] = field(default_factory=list)
    retiring: bool = False
    reopen_until: float = 0.0
    starting: int = 0
    failures: int = 0
    not_before: float = 0.0

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return self.bundle.manifest

    @property
    def taking(self) -> list[Backend]:
        """Workers that take sessions."""
        return [backend for backend in self.backends if not backend.retiring]

    @property
    def reopens(self) -> bool:
        """Whether devices may just now be making sessions again that were lost."""
        return time.monotonic() < self.reopen_until

    def sessions_lost(self) -> None:
        """A worker is gone, or a stream to it: devices come and make their sessions again."""
        self.reopen_until = time.monotonic() + _REPLAY_S

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of KV cache that a session comes to, about."""
        return self.bundle.kv.cache_bytes(self.manifest.half_layers("server"), tokens)


class Fleet:
    """Keeps workers running. Used on the event loop.

    Args:
        folder: ``OUT/server``, looked at again by `roll`.
        launch: makes a worker of a folder, not started yet.
        connect: makes a channel to a worker's address.
        options: that workers were given.
        least: workers.
        most: workers of the version that takes new sessions.
    """

    def __init__(
        self,
        folder: str | Path,
        launch: Callable[[Path], WorkerProcess],
        connect: Callable[[str], grpc.aio.Channel],
        *,
        options: WorkerOptions,
        least: int,
        most: int,
    ) -> None:
        self.pins = PinTable(options.limits)
        self.options = options
        self._folder = Path(folder)
        self._launch, self._connect = launch, connect
        self._scaler = Scaler(least, most)
        self._current = self._open_version()
        self._versions = {self._current.bundle.manifest_sha256: self._current}
        self._numbers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._rolling = asyncio.Lock()
        self.lost = 0  # workers, so far

    @property
    def most(self) -> int:
        """Most workers of one version."""
        return self._scaler.most

    @property
    def current(self) -> Version:
        """The version that takes new sessions."""
        return self._current

    @property
    def backends(self) -> list[Backend]:
        """All workers that serve."""
        return [backend for version in self._versions.values() for backend in version.backends]

    def version(self, manifest_sha256: str) -> Version:
        """The version of a device's manifest, or the current one, which says what does not fit."""
        return self._versions.get(manifest_sha256, self._current)

    async def start(self) -> None:
        """Start the first workers, and wait until all of them serve.

        Raises:
            IsthmusError: one of them cannot.
        """
        try:
            await self._start_all(self._current)
        except BaseException:
            await self.close()
            raise
        self._spawn(self._manage())

    async def close(self) -> None:
        """End all workers."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(backend) for backend in self.backends), return_exceptions=True)
        for version in self._versions.values():
            version.backends.clear()

    def candidates(self, version: Version, kv_bytes: int) -> list[Backend]:
        """Workers that may have room for a session, the one with the most free memory first."""
        ready = [backend for backend in version.taking if not backend.doubted.is_set()]
        # What no worker could ever hold is refused by a worker, in its words.
        fitting = [each for each in ready if kv_bytes <= each.free or kv_bytes > each.kv_budget]
        free_seats = [each for each in fitting if len(each.pins) < each.max_sessions]
        return sorted(free_seats, key=lambda each: (-each.free, len(each.pins)))

    def doubt(self, backend: Backend) -> None:
        """A stream to a worker broke: it gets no sessions until it has reported, and is asked to at once."""
        backend.doubted.set()

    def roll(self) -> None:
        """Look at the folder again; if there is another bundle, start workers of it, then have the others end.

        A bundle that cannot be opened or started is logged, and nothing changes.
        """
        self._spawn(self._roll())

    async def _roll(self) -> None:
        async with self._rolling:
            try:
                opened = self._open_version()
                version = self._versions.get(opened.bundle.manifest_sha256, opened)
                if version is self._current:
                    logger.warning("%s: its bundle is served already", self._folder)
                    return
                await self._start_all(version)
            except IsthmusError as error:
                logger.error("the fleet stays with %s: %s", self._current.folder, error)
                return
            before, self._current = self._current, version
            self._versions[version.bundle.manifest_sha256] = version
            before.retiring, version.retiring = True, False
            logger.warning("new sessions go to %s; %s ends with its last one", version.folder, before.folder)

    def _open_version(self) -> Version:
        folder = self._folder.resolve()
        # Each worker checks the files where it reads them.
        bundle = open_bundle(folder, "server", verify=False)
        if self.options.stages > 1:
            cut(bundle, self.options.stages)
        return Version(bundle.folder, bundle)

    async def _start_all(self, version: Version) -> None:
        """Start as many workers as there should be; if one fails, none of them stays."""
        starts = [self._start(version) for _ in range(self._scaler.wanted)]
        results = await asyncio.gather(*starts, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            for backend in [result for result in results if isinstance(result, Backend)]:
                version.backends.remove(backend)
                await self._end(backend)
            raise failures[0]

    async def _start(self, version: Version) -> Backend:
        """Start a worker of a version and watch it from then on."""
        version.starting += 1
        process = self._launch(version.folder)
        started = time.monotonic()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                report = await process.start()
        except BaseException as error:
            await process.stop()
            if isinstance(error, TimeoutError):
                raise LinkError(f"a worker did not start within {_START_TIMEOUT_S:g} s; look at its log") from error
            raise
        finally:
            version.starting -= 1
        self._numbers += 1
        backend = Backend(
            self._numbers,
            process,
            self._connect(report.address),
            report,
            self.options.limits.max_sessions,
        )
        version.backends.append(backend)
        seconds = time.monotonic() - started
        logger.info("worker %d (process %d) serves after %.1f s", backend.number, report.process, seconds)
        self._spawn(self._watch(version, backend))
        return backend

    async def _watch(self, version: Version, backend: Backend) -> None:
        """Have a worker report until it cannot, or has ended."""
        while not backend.lost:
            try:
                async with asyncio.timeout(_REPORT_TIMEOUT_S):
                    backend.report = await backend.process.report()
            except Exception as error:  # whatever it is, the worker is of no use
                if not backend.lost:
                    logger.warning("worker %d is lost: %s", backend.number, _first_line(error))
                    await self._lose(version, backend)
                return
            backend.doubted.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await backend.doubted.wait()

    async def _lose(self, version: Version, backend: Backend) -> None:
        """Forget a worker and its sessions; its streams end with the channel, and say so to their devices."""
        self.lost += 1
        version.backends.remove(backend)
        version.sessions_lost()
        for pin in list(backend.pins):
            self.pins.free(pin)
        self._look()
        await self._end(backend)

    async def _end(self, backend: Backend) -> None:
        backend.lost = True
        await backend.channel.close(None)
        await backend.process.stop()

    async def _manage(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(_LOOK_S)

    def _look(self) -> None:
        """Start what is missing, have end what is not needed."""
        if self._closing:
            return
        for digest, version in list(self._versions.items()):
            wanted = self._wanted(version)
            missing = wanted - len(version.taking) - version.starting
            if missing > 0 and time.monotonic() >= version.not_before:
                for _ in range(missing):
                    self._spawn(self._replace(version))
            for backend in sorted(version.taking, key=lambda each: len(each.pins))[: max(0, -missing)]:
                backend.retiring = True
            for backend in [each for each in version.backends if each.retiring and not each.pins]:
                version.backends.remove(backend)
                logger.info("worker %d ends, it has no sessions and is not needed", backend.number)
                self._spawn(self._end(backend))
            if version.retiring and not version.backends and not version.starting and not wanted:
                del self._versions[digest]
                logger.info("%s: its last session has ended", version.folder)

    def _wanted(self, version: Version) -> int:
        """How many workers of a version should take sessions."""
        if version is self._current:
            taking = version.taking
            load = sum(backend.load for backend in taking) / len(taking) if taking else 0.0
            return self._scaler.observe(load, len(taking), time.monotonic())
        in_use = sum(bool(backend.pins) for backend in version.taking)
        return max(in_use, 1 if version.reopens else 0)

    async def _replace(self, version: Version) -> None:
        try:
            await self._start(version)
            version.failures = 0
        except Exception as error:
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**version.failures)
            version.failures += 1
            version.not_before = time.monotonic() + pause
            logger.error("a worker did not start: %s; the next attempt in %g s", _first_line(error), pause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def granted(version: Version, options: WorkerOptions) -> pb.Limits:
    """What a device is told of a version's limits."""
    return options.limits.granted(version.manifest.max_length)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
