"""Connections that never came to a call, which gRPC ends without a word to us."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

_PEERS_KEPT = 256  # more than call between two calls of one that stays, such as a health check


class Handshakes(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Counts connections that failed in their TLS handshake, or were begun and said nothing.

    gRPC tells nothing of them but that it asks for the certificate as each connection begins. Beginnings are matched
    with the first calls of peers, from the newest on; those without a call after ``patience`` seconds are the failed
    ones, however many. Whose they were is not known.

    Args:
        patience: seconds between a connection's beginning and its first call.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._begun: list[float] = []
        self._peers: dict[str, None] = {}  # that called last, in this order
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A connection begins; from any thread."""
        with self._lock:
            self._begun.append(time.monotonic())

    def failed(self) -> int:
        """How many have failed since this was last asked."""
        with self._lock:
            before = time.monotonic() - self._patience
            waiting = [began for began in self._begun if began > before]
            failed = len(self._begun) - len(waiting)
            self._begun = waiting
            return failed

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Have each call of any service tell of its peer."""
        handler: Any = await continuation(handler_call_details)
        if handler is not None:  # there is such a method
            kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
            kind = next(kind for kind in kinds if getattr(handler, kind))
            handler = handler._replace(**{kind: self._telling(getattr(handler, kind))})
        return handler

    def _telling(self, behavior: Callable[..., Any]) -> Callable[..., Any]:
        # gRPC looks at what kind of function it is given.
        if inspect.isasyncgenfunction(behavior):

            async def generator(requests: Any, context: Any) -> AsyncIterator[Any]:
                self._called(context.peer())
                async for answer in behavior(requests, context):
                    yield answer

            return generator

        async def coroutine(requests: Any, context: Any) -> Any:
            self._called(context.peer())
            return await behavior(requests, context)

        return coroutine

    def _called(self, peer: str) -> None:
        with self._lock:
            if peer not in self._peers and self._begun:
                self._begun.pop()
            self._peers.pop(peer, None)
            self._peers[peer] = None
            if len(self._peers) > _PEERS_KEPT:
                del self._peers[next(iter(self._peers))]
