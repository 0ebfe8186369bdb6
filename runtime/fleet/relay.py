"""The front's streams: greeted here, given to a worker, and from then on bytes in and bytes out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc

from ...quant.codec import CODECS
from ..server.admission import ANYONE, NOT_ACCEPTED, Admission
from ..server.audit import AuditLog, Visitor
from ..server.frame_rate import FrameRate
from ..wire import isthmus_pb2 as pb
from ..wire.framing import (
    Refusal,
    Seals,
    check_hello,
    message_field,
    parse_client_message,
    parse_server_message,
    seal,
    welcome_message,
)
from ..wire.security import DEVICE_HEADER
from ..wire.transport import SERVICE, SESSION_METHOD, SESSION_PATH
from .fleet import Backend, Fleet, Version, granted
from .pins import Pin

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]
Call = Any  # grpc.aio.StreamStreamCall, whose stubs do not know `read` and `write`

_CLIENT = {name: field.number for name, field in pb.ClientMessage.DESCRIPTOR.fields_by_name.items()}
_SERVER = {name: field.number for name, field in pb.ServerMessage.DESCRIPTOR.fields_by_name.items()}

_BROKEN = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)  # a call that has ended, as gRPC tells it


class FrontService:
    """The gRPC service `isthmus.v1.Isthmus` in front of a fleet.

    Attributes:
        draining: no session begins any more.
        frames: that the devices send.
    """

    def __init__(self, fleet: Fleet, admission: Admission, audit: AuditLog | None = None) -> None:
        self.draining = False
        self._audit = audit
        self._fleet = fleet
        self._admission = admission
        self.frames = FrameRate(fleet.options.limits.frames_per_s_per_device)
        self._streams: dict[_Stream, Context] = {}

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """What `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        return grpc.method_handlers_generic_handler(SERVICE, {SESSION_METHOD: method})

    def check_draining(self) -> None:
        """Raise `Refusal` if no session begins here any more."""
        if self.draining:
            raise self._draining()

    def move_all(self) -> None:
        """Tell every device to make its session again on another server."""
        for stream in list(self._streams):
            stream.end(self._draining())

    def expel(self) -> None:
        """End the streams of devices that would not be let in any more; their sessions end with their leases."""
        for stream, context in list(self._streams.items()):
            if self._identity(context) is None:
                logger.warning("%s: its certificate was revoked, or its token taken back", context.peer())
                stream.expel()

    def _identity(self, context: Context) -> str | None:
        return self._admission.identity(context.auth_context(), context.invocation_metadata() or ())

    def _draining(self) -> Refusal:
        pause = round(1000 * self._fleet.options.limits.retry_after_s)
        return Refusal("DRAINING", "this server is about to end; go to another one", retry_after_ms=pause)

    async def _serve(self, _requests: object, context: Context) -> None:
        owner = self._identity(context)
        if owner is None:
            if self._audit is not None:
                self._audit.record("turned away", peer=context.peer(), reason="certificate or token")
            logger.warning("%s: refused, its certificate is revoked or its token nobody's", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, NOT_ACCEPTED)
        stream = _Stream(self, self._fleet, context, owner or ANYONE, self._audit)
        self._streams[stream] = context
        try:
            await stream.serve()
        finally:
            del self._streams[stream]


class _Stream:
    """One stream of a device, and the stream to a worker that answers it. It carries one session at a time.

    A reader passes steps on as they come, so that the flow control of either side holds the other one back. What may
    begin a session waits in ``_inbox`` until the one before it has ended, and with it whatever comes behind.
    """

    def __init__(
        self, service: FrontService, fleet: Fleet, context: Context, owner: str, audit: AuditLog | None
    ) -> None:
        self._visitor = Visitor(audit, context.peer(), owner)
        self._service = service
        self._fleet = fleet
        self._pins = fleet.pins
        self._limits = fleet.options.limits
        self._context = context
        self._owner = owner
        self._seals = Seals()
        self._hello = b""  # as it came, like all that is passed on
        self._version = fleet.current
        self._call: Call | None = None  # to the worker that has the session
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._ready = asyncio.Event()  # whether the next message may be looked at
        self._ready.set()
        self._ending: Refusal | None = None
        self._expelled = False
        self._conversation: asyncio.Task[None] | None = None

    def end(self, refusal: Refusal) -> None:
        """End the stream with a fault."""
        self._ending = refusal
        if self._conversation is not None:
            self._conversation.cancel()

    def expel(self) -> None:
        """End the stream: the device is not to be served any more."""
        self._expelled = True
        if self._conversation is not None:
            self._conversation.cancel()

    async def serve(self) -> None:
        """Hold the conversation until any side ends it."""
        self._conversation = asyncio.create_task(self._converse())
        self._visitor.note("connected")
        try:
            await self._conversation
        except Refusal as refusal:
            self._visitor.note("refused", reason=pb.Fault.Code.Name(refusal.fault.fault.code))
            await self._write(refusal.fault)
        except asyncio.CancelledError:
            if self._expelled:
                self._visitor.note("expelled")
                await self._context.abort(grpc.StatusCode.UNAUTHENTICATED, NOT_ACCEPTED)
            if self._ending is None:
                raise
            await self._write(self._ending.fault)
        except grpc.aio.BaseError as error:
            logger.debug("a stream broke: %s", error)
        except Exception:
            # gRPC would send the error's text to the client; that stays here.
            logger.exception("a stream failed")
            await self._write(Refusal("INTERNAL", "the server failed; its log has the reason").fault)
        finally:
            self._visitor.note("disconnected")

    async def _converse(self) -> None:
        if not await self._greet():
            return
        reader = asyncio.create_task(self._read())
        try:
            while (data := await self._next()) is not None and await self._begin(data):
                self._ready.set()
        finally:
            reader.cancel()

    async def _greet(self) -> bool:
        """Check the Hello before anything else is read; whether there was one."""
        try:
            async with asyncio.timeout(self._limits.idle_s):
                data = await self._context.read()
        except TimeoutError as error:
            raise Refusal("BAD_REQUEST", f"no Hello within {self._limits.idle_s:g} s") from error
        if not isinstance(data, bytes):
            return False
        message = parse_client_message(self._opened(data))
        if not message.HasField("hello"):
            raise Refusal("BAD_REQUEST", f"{message.WhichOneof('body')} before Hello; a stream begins with Hello")
        version = self._fleet.version(message.hello.manifest_sha256)
        check_hello(
            message.hello,
            manifest_sha256=version.bundle.manifest_sha256,
            split=version.manifest.split,
            codecs=[name for name in version.manifest.codecs if name in CODECS],
        )
        self._hello, self._version = data, version
        await self._send(welcome_message(message.hello, granted(version, self._fleet.options)))
        return True

    async def _read(self) -> None:
        """Pass on what belongs to the session, and hand over what may begin one."""
        while isinstance(data := await self._context.read(), bytes):
            if self._owner != ANYONE and (delay := self._service.frames.wait(self._owner)):
                await asyncio.sleep(delay)
            await self._ready.wait()
            opened, call = self._seals.open(data), self._call
            if opened is None and call is not None:  # the worker sees that, too, and knows what to ask for again
                with contextlib.suppress(*_BROKEN):
                    await call.write(data)
                continue
            field = message_field(opened or b"")
            if call is None:
                self._ready.clear()
                self._inbox.put_nowait(data)
                continue
            if field not in (_CLIENT["step"], _CLIENT["close"], _CLIENT["cancel"]):
                self.end(Refusal("BAD_REQUEST", "neither a step nor an end on a stream that carries a session"))
                return
            if field != _CLIENT["step"]:
                self._ready.clear()
            with contextlib.suppress(*_BROKEN):  # the answers' end tells why
                await call.write(data)
        if self._call is not None:
            with contextlib.suppress(*_BROKEN):
                await self._call.done_writing()
        self._inbox.put_nowait(None)

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._limits.idle_s):
                return await self._inbox.get()
        except TimeoutError as error:
            raise Refusal("BAD_REQUEST", f"no session opened within {self._limits.idle_s:g} s") from error

    async def _begin(self, data: bytes) -> bool:
        """Answer a message on a stream without a session; whether the stream goes on."""
        opened = self._opened(data)
        if not message_field(opened):
            raise Refusal("BAD_REQUEST", f"{len(data)} bytes that are no isthmus.v1 message alone")
        message = parse_client_message(opened)
        match message.WhichOneof("body"):
            case "open":
                return await self._open(data, message.open)
            case "attach":
                return await self._attach(data, message.attach)
            case "close" | "cancel":
                await self._write(pb.ServerMessage(closed=pb.Closed()))
                return True
            case "step":
                refusal = Refusal("BAD_REQUEST", f"step {message.step.step} without a session; open one first")
                await self._write(refusal.fault)
                return True
            case kind:
                raise Refusal("BAD_REQUEST", f"{kind} in the middle of a stream")

    async def _open(self, data: bytes, request: pb.Open) -> bool:
        """Find the session a worker, and carry it there."""
        self._service.check_draining()
        version = self._version
        _check_version(version, self._fleet.current)
        kv_bytes = version.kv_bytes(min(request.max_tokens, version.manifest.max_length))
        for backend in self._fleet.candidates(version, kv_bytes):
            if backend.lost or backend.retiring:  # since the list was made
                continue
            pin = self._pins.reserve(backend, self._owner, kv_bytes)
            call = self._stream_to(backend)
            try:
                answer = await self._first_answer(call, data, backend)
                if answer is None:
                    continue
                message = parse_server_message(_unsealed(answer))
                if message.HasField("fault"):
                    if message.fault.code in (pb.Fault.SERVER_FULL, pb.Fault.DRAINING):
                        continue
                    await self._context.write(answer)
                    return False
                self._pins.opened(pin, message.opened.session)
                session = message.opened.session
                logger.info("session %s: on worker %d", session.hex()[:8], backend.number)
                self._visitor.note("opened", session, tokens=request.max_tokens, worker=backend.number)
                await self._context.write(answer)
                return await self._carry(call, pin)
            finally:
                call.cancel()
                self._pins.detach(pin)
        raise Refusal(
            "SERVER_FULL",
            "no worker of the fleet has room for the session; wait for one to end",
            retry_after_ms=round(1000 * self._limits.retry_after_s),
        )

    async def _attach(self, data: bytes, request: pb.Attach) -> bool:
        """Carry a session where it is."""
        pin = self._pins.attach(request.session, self._owner)
        if pin is None:
            raise Refusal(
                "SESSION_UNKNOWN",
                f"no such session: it was closed, its lease of {self._limits.lease_s:g} s has ended, or its worker is "
                "gone; start the generation again",
            )
        call = self._stream_to(pin.backend)
        try:
            answer = await self._first_answer(call, data, pin.backend)
            if answer is None:
                raise self._gone()
            await self._context.write(answer)
            if message_field(_unsealed(answer)) == _SERVER["attached"]:
                self._visitor.note("attached", request.session, worker=pin.backend.number)
            else:
                if parse_server_message(_unsealed(answer)).fault.code == pb.Fault.SESSION_UNKNOWN:
                    self._pins.free(pin)
                return False
            return await self._carry(call, pin)
        finally:
            call.cancel()
            self._pins.detach(pin)

    def _stream_to(self, backend: Backend) -> Call:
        metadata = ((DEVICE_HEADER, self._owner.encode()),)
        return backend.channel.stream_stream(SESSION_PATH, None, None)(None, metadata=metadata)

    async def _first_answer(self, call: Call, data: bytes, backend: Backend) -> bytes | None:
        """Greet a worker as the device did, and ask; the answer, or None if there is none to be had."""
        try:
            await call.write(self._hello)
            await call.write(data)
        except _BROKEN:
            self._fleet.doubt(backend)
            return None
        answer = await self._answer(call, backend)
        if answer is not None and message_field(_unsealed(answer)) == _SERVER["welcome"]:
            answer = await self._answer(call, backend)
        return answer

    async def _answer(self, call: Call, backend: Backend) -> bytes | None:
        """What a worker says next; None at the end of the stream, and if it broke: then the worker is in doubt."""
        try:
            data = await call.read()
        except _BROKEN:
            self._fleet.doubt(backend)
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if backend.lost and not (task and task.cancelling()):  # it was its channel that was closed
                return None
            raise
        return data if isinstance(data, bytes) else None

    async def _carry(self, call: Call, pin: Pin) -> bool:
        """Pass the worker's answers on until the session has ended; whether the stream goes on."""
        self._call = call
        self._ready.set()
        try:
            while (data := await self._answer(call, pin.backend)) is not None:
                answer = _unsealed(data)
                field = message_field(answer)
                over = field == _SERVER["closed"] or (field == _SERVER["fault"] and _ends_session(answer))
                if over:
                    if field == _SERVER["fault"]:
                        self._fleet.doubt(pin.backend)
                    self._visitor.note("closed", pin.id)
                    self._pins.free(pin)  # first: with the answer, the device may be gone
                await self._context.write(data)
                if over:
                    return True
            if pin.backend.lost or pin.backend.doubted.is_set():
                # The device makes the session again: that is sure, and as soon as it can be.
                raise self._gone()
            return False
        finally:
            self._call = None

    def _gone(self) -> Refusal:
        self._version.sessions_lost()
        return Refusal("SESSION_UNKNOWN", "the worker that had the session is gone; open the session again")

    def _opened(self, data: bytes) -> bytes:
        """What a device's message says without its seal."""
        opened = self._seals.open(data)
        if opened is None:
            raise Refusal("BAD_CRC", f"a message of {len(data)} bytes was damaged on its way; send it again")
        return opened

    async def _write(self, message: pb.ServerMessage) -> None:
        await self._send(message.SerializeToString())

    async def _send(self, data: bytes) -> None:
        await self._context.write(seal(data) if self._seals.used else data)


def _unsealed(answer: bytes) -> bytes:
    """What a worker's message says; a damaged one as it is, which is passed on for the device to see."""
    return Seals().open(answer) or answer


def _check_version(version: Version, current: Version) -> None:
    """Refuse a new session of a version that is on its way out, unless it may be one that a worker took along."""
    if version.retiring and not version.reopens:
        raise Refusal(
            "MANIFEST_MISMATCH",
            f"new sessions are of manifest {current.bundle.manifest_sha256}, this device's is "
            f"{version.bundle.manifest_sha256}: copy the device half of the new export",
        )


def _ends_session(fault: bytes) -> bool:
    return parse_server_message(fault).fault.code == pb.Fault.INTERNAL
