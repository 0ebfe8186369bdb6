"""The one thread from which an engine and its sessions are called."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from ...quant.codec import Codec
from ..wire import isthmus_pb2 as pb
from .batcher import Batcher
from .sessions import Session, Work

T = TypeVar("T")


class _Job(NamedTuple):
    answer: asyncio.Future[Any]
    session: Session | None  # whose steps it must not overtake
    function: Callable[..., object]
    arguments: tuple[object, ...]


class ComputeThread:
    """Runs steps for an event loop, as its batcher groups them, and between them functions.

    What concerns one session is done in the order in which it was handed over.
    """

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting: deque[_Job] = deque()  # of sessions whose step is in hand
        self._answers: dict[Session, asyncio.Future[Any]] = {}  # to the steps in hand, at most one of each session
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="isthmus-compute", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(None)
        self._thread.join()

    def run(self, function: Callable[..., T], *arguments: object, of: Session | None = None) -> asyncio.Future[T]:
        """Hand a function over, and await its result. If that is cancelled before its turn, it is not called.

        Args:
            function: to be called on the thread.
            arguments: of it.
            of: the session that it concerns; steps of it that were handed over before are done first.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(answer, of, function, arguments))
        return answer

    def step(self, session: Session, step: pb.Step, codec: Codec) -> asyncio.Future[pb.ServerMessage]:
        """Hand a session's step over, and await the answer; a `Refusal` is raised."""
        answer: asyncio.Future[pb.ServerMessage] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(answer, session, session.prepare, (step, codec, perf_counter())))
        return answer

    def _work(self) -> None:
        while not self._stopping or self._batcher or self._waiting:
            self._take_jobs()
            self._run_batch()

    def _run_batch(self) -> None:
        settled: list[_Settled] = []
        for work, outcome in self._batcher.run():
            answer = self._answers.pop(work.session)
            if isinstance(outcome, Exception):
                settled.append((answer, None, outcome))
            else:
                settled.append((answer, outcome, None))
        if settled:
            _tell(settled)

    def _take_jobs(self) -> None:
        """Do what has arrived, and take steps in hand; waits for a job if there is nothing to do."""
        waiting, self._waiting = self._waiting, deque()
        while waiting:
            self._take(waiting.popleft())
        while not self._stopping:
            try:
                job = self._jobs.get(block=not self._batcher)
            except queue.Empty:
                return
            if job is None:
                self._stopping = True
            else:
                self._take(job)
            del job

    def _take(self, job: _Job) -> None:
        session = job.session
        if session is not None and (
            session in self._answers or any(earlier.session is session for earlier in self._waiting)
        ):
            self._waiting.append(job)
            return
        if job.answer.cancelled():
            return
        result, failure = None, None
        try:
            result = job.function(*job.arguments)
        except BaseException as error:  # whatever it is, it belongs to the caller
            failure = error
        if isinstance(result, Work):
            self._answers[result.session] = job.answer
            self._batcher.add(result)
        else:
            _tell([(job.answer, result, failure)])


_Settled = tuple[asyncio.Future[Any], object, BaseException | None]


def _tell(settled: list[_Settled]) -> None:
    """Wake the event loop once for all of them."""
    settled[0][0].get_loop().call_soon_threadsafe(_settle, settled)


def _settle(settled: list[_Settled]) -> None:
    for answer, result, failure in settled:
        if answer.cancelled():
            continue
        if failure is None:
            answer.set_result(result)
        else:
            answer.set_exception(failure)
