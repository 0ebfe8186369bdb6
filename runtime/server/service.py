"""The stream: what a client says, and what it is answered."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import grpc

from ...errors import CodecError
from ...quant.codec import CODECS, Codec
from ..wire import isthmus_pb2 as pb
from ..wire.framing import Refusal, Seals, check_hello, parse_client_message, seal, welcome_message
from ..wire.transport import PIPELINE_DEPTH, SERVICE, SESSION_METHOD
from .admission import ANYONE, NOT_ACCEPTED, Admission
from .audit import AuditLog, Visitor
from .compute import ComputeEngine
from .compute_thread import ComputeThread
from .frame_rate import FrameRate
from .limits import ServerLimits
from .sessions import Session, SessionTable

if TYPE_CHECKING:  # prometheus_client loads only where metrics are asked for
    from .metrics import Metrics

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]


class SessionService:
    """The gRPC service `isthmus.v1.Isthmus`, in raw bytes so that size comes before parsing."""

    def __init__(
        self,
        engine: ComputeEngine,
        table: SessionTable,
        compute: ComputeThread,
        limits: ServerLimits,
        admission: Admission,
        frames: FrameRate,
        metrics: Metrics | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self._metrics, self._audit = metrics, audit
        self._streams: dict[_Stream, Context] = {}
        self._engine = engine
        self._table = table
        self._compute = compute
        self._limits = limits
        self._admission = admission
        self._frames = frames

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """What `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        return grpc.method_handlers_generic_handler(SERVICE, {SESSION_METHOD: method})

    async def _serve(self, _requests: object, context: Context) -> None:
        owner = self._identity(context)
        if owner is None:
            if self._metrics is not None:
                self._metrics.refused()
            if self._audit is not None:
                self._audit.record("turned away", peer=context.peer(), reason="certificate or token")
            logger.warning("%s: refused, its certificate is revoked or its token nobody's", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, NOT_ACCEPTED)
        stream = _Stream(
            self._engine,
            self._table,
            self._compute,
            self._limits,
            context,
            owner or ANYONE,
            self._frames,
            self._metrics,
            self._audit,
        )
        self._streams[stream] = context
        try:
            await stream.serve()
        finally:
            del self._streams[stream]

    def note_failed(self, connections: int) -> None:
        """Tell of connections that never came to a call, see `isthmus.runtime.server.handshakes`."""
        if self._metrics is not None:
            self._metrics.connections_failed(connections)
        if self._audit is not None:
            self._audit.record("turned away", reason="TLS handshake, or no call after it", connections=connections)
        logger.warning("%d connections failed in their TLS handshake, or made no call", connections)

    def expel(self) -> None:
        """End the streams, and the sessions, of devices that would not be let in any more."""
        for stream, context in self._streams.items():
            if self._identity(context) is None:
                logger.warning("%s: its certificate was revoked, or its token taken back", context.peer())
                stream.expel()

    def _identity(self, context: Context) -> str | None:
        return self._admission.identity(context.auth_context(), context.invocation_metadata() or ())


class _Stream:
    """One stream. It carries one session at a time, and does one step of it at a time.

    So the compute thread's queue holds at most one step of each session, in the order of arrival: a long
    prefill does not keep the others from their turn.
    """

    def __init__(
        self,
        engine: ComputeEngine,
        table: SessionTable,
        compute: ComputeThread,
        limits: ServerLimits,
        context: Context,
        owner: str,
        frames: FrameRate,
        metrics: Metrics | None,
        audit: AuditLog | None,
    ) -> None:
        self._owner, self._frames, self._metrics = owner, frames, metrics
        self._visitor = Visitor(audit, context.peer(), owner)
        self._engine = engine
        self._table = table
        self._compute = compute
        self._limits = limits
        self._context = context
        self._session: Session | None = None
        self._opening: pb.Open | None = None  # that began it on this stream
        self._codec: Codec
        # Bounded: a client that sends faster than we compute is held back by HTTP/2's flow control.
        self._inbox: asyncio.Queue[pb.ClientMessage | Refusal | None] = asyncio.Queue(PIPELINE_DEPTH)
        self._seals = Seals()
        self._cancelled = False
        self._evicted = self._expelled = False
        self._conversation: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Hold the conversation until either side ends it; then the session's lease begins."""
        # A task of its own, so that a stream that takes the session over can end it without killing the RPC.
        self._conversation = asyncio.create_task(self._converse())
        self._note("connected")
        try:
            await self._conversation
        except Refusal as refusal:
            self._note("refused", reason=pb.Fault.Code.Name(refusal.fault.fault.code))
            await self._write(refusal.fault)
        except asyncio.CancelledError:
            if self._expelled:
                self._note("expelled")
                if self._session is not None:
                    await self._free(self._session)
                await self._context.abort(grpc.StatusCode.UNAUTHENTICATED, NOT_ACCEPTED)
            if not self._evicted:
                raise
            await self._write(Refusal("CANCELLED", "another stream attached to the session").fault)
        except grpc.aio.BaseError as error:
            logger.debug("a stream broke: %s", error)
        except Exception:
            # gRPC would send the error's text to the client; that stays here.
            logger.exception("a stream failed")
            await self._write(Refusal("INTERNAL", "the server failed; its log has the reason").fault)
        finally:
            if self._session is not None:
                self._table.detach(self._session.id, self._evict)
            self._note("disconnected")

    def expel(self) -> None:
        """End the conversation and its session: the device is not to be served any more."""
        self._expelled = True
        if self._conversation is not None:
            self._conversation.cancel()

    def _note(self, event: str, **fields: str | int) -> None:
        """Tell the audit log."""
        self._visitor.note(event, b"" if self._session is None else self._session.id, **fields)

    def _evict(self) -> None:
        self._evicted = True
        if self._conversation is not None:
            self._conversation.cancel()

    async def _converse(self) -> None:
        if not await self._greet():
            return
        reader = asyncio.create_task(self._read())
        try:
            while (message := await self._next()) is not None:
                await self._answer(message)
        finally:
            reader.cancel()

    async def _greet(self) -> bool:
        """Check the Hello before anything else is read; whether there was one."""
        try:
            data = await asyncio.wait_for(self._context.read(), self._limits.idle_s)
        except TimeoutError as error:
            raise Refusal("BAD_REQUEST", f"no Hello within {self._limits.idle_s:g} s") from error
        message = self._parse(data)
        if message is None:
            return False
        if isinstance(message, Refusal):
            raise message
        if not message.HasField("hello"):
            raise Refusal("BAD_REQUEST", f"{message.WhichOneof('body')} before Hello; a stream begins with Hello")
        manifest = self._engine.manifest
        check_hello(
            message.hello,
            manifest_sha256=self._engine.manifest_sha256,
            split=manifest.split,
            codecs=[name for name in manifest.codecs if name in CODECS],
        )
        try:
            self._codec = self._engine.codec(message.hello.codec)
        except CodecError as error:
            raise Refusal("UNSUPPORTED_CODEC", str(error)) from error
        await self._send(welcome_message(message.hello, self._limits.granted(manifest.max_length)))
        return True

    async def _read(self) -> None:
        """Read ahead, so that a Cancel overtakes the steps before it."""
        message: pb.ClientMessage | Refusal | None
        while True:
            message = self._parse(await self._context.read())
            if isinstance(message, pb.ClientMessage) and message.HasField("cancel"):
                self._cancelled = True
            if self._owner != ANYONE and (delay := self._frames.wait(self._owner)):
                await asyncio.sleep(delay)
            await self._inbox.put(message)
            if message is None or (isinstance(message, Refusal) and not message.passes):
                return

    def _parse(self, data: bytes | object) -> pb.ClientMessage | Refusal | None:
        """The message, why it is none, or `None` at the stream's end."""
        if not isinstance(data, bytes):
            return None
        if len(data) > self._limits.max_frame_bytes:
            return Refusal(
                "FRAME_TOO_LARGE",
                f"a message of {len(data)} bytes: at most {self._limits.max_frame_bytes}; send fewer tokens a frame",
            )
        opened = self._seals.open(data)
        if opened is None:
            return Refusal("BAD_CRC", f"a message of {len(data)} bytes was damaged on its way; send it again")
        try:
            return parse_client_message(opened)
        except Refusal as refusal:
            return refusal

    async def _next(self) -> pb.ClientMessage | None:
        while isinstance(message := await self._received(), Refusal):
            if self._session is None or not message.passes:
                raise message
            await self._ask_again(message, self._session)
        return message

    async def _ask_again(self, damaged: Refusal, session: Session) -> None:
        """Have the step that it was sent again, after those before it."""
        damaged.fault.fault.expected_step = await self._compute.run(lambda: session.last_step + 1, of=session)
        await self._write(damaged.fault)

    async def _received(self) -> pb.ClientMessage | Refusal | None:
        if self._session is not None:
            return await self._inbox.get()
        try:
            return await asyncio.wait_for(self._inbox.get(), self._limits.idle_s)
        except TimeoutError as error:
            raise Refusal("BAD_REQUEST", f"no session opened within {self._limits.idle_s:g} s") from error

    async def _answer(self, message: pb.ClientMessage) -> None:
        kind = message.WhichOneof("body")
        if self._cancelled or kind == "close":
            if self._session is not None:
                await self._free(self._session)
            self._cancelled &= kind != "cancel"  # the steps before it were dropped
            if kind in ("close", "cancel"):
                await self._write(pb.ServerMessage(closed=pb.Closed()))
        elif kind == "step":
            if self._table.moving and self._session is not None:
                await self._free(self._session)  # its device makes it again elsewhere
            self._table.check_draining(new=False)
            if self._metrics is not None:
                self._metrics.received(self._codec.name, message.step)
            await self._write(await self._step(message.step))
        elif self._session is not None:
            if kind == "open" and message.open == self._opening and not self._session.last_step:
                await self._write(pb.ServerMessage(opened=pb.Opened(session=self._session.id)))  # it came twice
                return
            raise Refusal("BAD_REQUEST", f"{kind} on a stream that carries a session; close that first")
        elif kind == "open":
            self._table.check_draining(new=True)
            # Shielded: a session that is being made when the stream breaks still gets its seat and its lease.
            self._session = await asyncio.shield(self._table.open(message.open, self._owner))
            self._opening = message.open
            self._table.attach(self._session.id, self._evict, self._owner)
            name = self._session.id.hex()[:8]
            logger.info("session %s: opened for %d tokens", name, message.open.max_tokens, extra={"session": name})
            self._note("opened", tokens=message.open.max_tokens)
            await self._write(pb.ServerMessage(opened=pb.Opened(session=self._session.id)))
        elif kind == "attach":
            self._table.check_draining(new=False)
            self._session = self._table.attach(message.attach.session, self._evict, self._owner)
            self._note("attached")
            acknowledged = message.attach.last_acknowledged_step
            # The compute thread answers in turn: a step that still runs for the old stream is counted.
            for answer in await self._compute.run(self._session.resume, acknowledged, of=self._session):
                await self._write(answer)
        else:
            raise Refusal("BAD_REQUEST", f"{kind} in the middle of a stream")

    async def _step(self, step: pb.Step) -> pb.ServerMessage:
        if self._session is None:
            return Refusal("BAD_REQUEST", f"step {step.step} without a session; open one first").fault
        try:
            return await self._compute.step(self._session, step, self._codec)
        except Refusal as refusal:
            return refusal.fault
        except Exception:
            # Whatever went wrong in the engine, it is this session's alone: the others must not notice.
            about = {"session": self._session.id.hex()[:8], "step": step.step}
            logger.exception("session %(session)s: step %(step)d failed", about, extra=about)
            await self._free(self._session)
            return Refusal("INTERNAL", "the step failed on the server and ended the session; see its log").fault

    async def _free(self, session: Session) -> None:
        self._note("closed")
        self._session = None
        logger.info("session %s: closed", session.id.hex()[:8], extra={"session": session.id.hex()[:8]})
        await asyncio.shield(self._table.free(session.id))

    async def _write(self, message: pb.ServerMessage) -> None:
        if self._metrics is not None:
            self._metrics.sent(message)
        await self._send(message.SerializeToString())

    async def _send(self, data: bytes) -> None:
        await self._context.write(seal(data) if self._seals.used else data)
