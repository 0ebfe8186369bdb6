"""Single messages that are lost, doubled, swapped, cut, damaged, late, or the last ones of their stream."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import pytest

from isthmus.runtime.edge.draft_pace import DraftPace
from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity
from isthmus.runtime.wire.transport import SERVICE, SESSION_METHOD, SESSION_PATH

PROMPT = [1, 2, 3, 4] * 40
NEW_TOKENS = 24
SAMPLINGS = {"off": Sampling(temperature=0.7, top_k=20, repetition_penalty=1.1, seed=5), "ngram": Sampling()}
LEASE_S = 2.0

ACTIONS = {
    "dropped": ("drop", 0.0),
    "doubled": ("duplicate", 0.0),
    "swapped with the next": ("swap", 0.0),
    "cut to a third": ("truncate", 0.3),
    "cut by its end": ("truncate", 0.99),
    "damaged in its first bit": ("flip", 0.0),
    "damaged in the middle": ("flip", 0.5),
    "damaged in its last bit": ("flip", 0.9999),
    "late": ("delay", 0.0),
    "the last of a broken stream": ("break", 0.0),
    "followed by silence": ("silence", 0.0),
}
PHASES = {  # which message: of a step in the prompt, in the text, or with drafts
    "in the prompt": ("off", {"up": ("step", 1), "down": ("result", 1)}),
    "in the text": ("off", {"up": ("step", 8), "down": ("result", 8)}),
    "with drafts": ("ngram", {"up": ("drafts", 1), "down": ("drafts", 1)}),
}


MESSAGES = {"up": pb.ClientMessage, "down": pb.ServerMessage}
DELAY_S = 0.3


@dataclass
class Fault:
    """What happens to one message.

    Attributes:
        action: ``drop``, ``duplicate``, ``swap`` (with the next one), ``truncate``, ``flip`` (a bit at ``place``),
            ``delay``, ``break`` (the stream), ``silence`` (nothing comes in this direction any more).
        direction: ``up``, to the server, or ``down``.
        kind: of the message: a field of `ClientMessage` or `ServerMessage`, or ``drafts`` for steps and results that
            have some.
        number: which one of these, over all streams, from 0.
        place: of the bit, as a share of the message.
        done: whether it has happened.
    """

    action: str
    direction: str
    kind: str
    number: int = 0
    place: float = 0.5
    done: bool = False
    _seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def meets(self, direction: str, data: bytes) -> bool:
        """Whether this is the message."""
        if direction != self.direction or self.done:
            return False
        message: Any = MESSAGES[direction].FromString(data)
        kind = message.WhichOneof("body")
        if self.kind == "drafts":
            drafted = message.step.frame.drafted if direction == "up" else message.result.tokens
            matches = len(drafted) > 0
        else:
            matches = kind == self.kind
        with self._lock:
            if not matches:
                return False
            self._seen += 1
            self.done = self._seen > self.number
            return self.done

    def apply(self, data: bytes) -> bytes:
        """The message, damaged."""
        if self.action == "truncate":
            return data[: int(len(data) * self.place)]
        damaged = bytearray(data)
        bit = int(8 * len(data) * self.place)
        damaged[bit // 8] ^= 1 << bit % 8
        return bytes(damaged)


class Relay:
    """Passes the streams of devices on to a server, with one fault.

    Args:
        target: the server's address.
        fault: what happens.

    Attributes:
        address: of the relay.
    """

    def __init__(self, target: str, fault: Fault) -> None:
        self._target, self._fault = target, fault
        self._server = grpc.server(ThreadPoolExecutor(16))
        handler = grpc.stream_stream_rpc_method_handler(self._relay)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {SESSION_METHOD: handler}),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait(5)

    def _relay(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        with grpc.insecure_channel(self._target) as channel:
            call = channel.stream_stream(SESSION_PATH)(self._up(requests, context))
            context.add_callback(call.cancel)
            try:
                yield from self._pass("down", call, context)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            finally:
                call.cancel()

    def _up(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        with suppress(grpc.RpcError):  # the device's end of the stream is gone
            yield from self._pass("up", requests, context)

    def _pass(self, direction: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        held: bytes | None = None
        silent = False
        for data in messages:
            if silent:
                continue
            if not self._fault.meets(direction, data):
                yield data
                if held is not None:
                    yield held
                    held = None
                continue
            match self._fault.action:
                case "drop":
                    pass
                case "duplicate":
                    yield data
                    yield data
                case "swap":
                    held = data
                case "delay":
                    time.sleep(DELAY_S)
                    yield data
                case "break":
                    context.cancel()
                    return
                case "silence":
                    silent = True
                case _:
                    yield self._fault.apply(data)


@pytest.fixture(scope="module")
def folder(tiny: Any) -> Path:
    return Path(tiny.bundle(bits=8, split=2))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[BackServer]:
    limits = ServerLimits(lease_s=LEASE_S, max_frame_tokens=48)
    with BackServer.from_bundle(
        folder / "server", threads=1, security=ServerSecurity(insecure=True), limits=limits
    ) as server:
        yield server


@pytest.fixture(scope="module")
def expected(folder: Path, server: BackServer) -> dict[str, list[int]]:
    """The undisturbed runs, by the way of drafting that has their sampling."""
    return {draft: generate(folder, server.address, draft) for draft in SAMPLINGS}


def generate(folder: Path, address: str, draft: Any = "off") -> list[int]:
    security = ChannelSecurity(insecure=True)
    model = EdgeModel(folder / "device", server=address, codec="tabq", threads=1, security=security, draft=draft)
    return model.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=SAMPLINGS[draft]).token_ids


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RemoteBack.__init__.__kwdefaults__, "step_timeout", 0.7)
    monkeypatch.setitem(RemoteBack.__init__.__kwdefaults__, "connect_timeout", 5.0)
    made = DraftPace.__init__

    def always_drafting(self: DraftPace) -> None:
        made(self)
        self.drafting = True

    monkeypatch.setattr(DraftPace, "__init__", always_drafting)
    monkeypatch.setattr(DraftPace, "pays", lambda self, guess, before, *, waited_s: True)
    monkeypatch.setattr(DraftPace, "emitted", lambda self, seconds, tokens: None)


@pytest.fixture(autouse=True)
def nothing_is_left(server: BackServer, expected: dict[str, list[int]]) -> Iterator[None]:
    threads = {thread.name for thread in threading.enumerate()}
    yield
    deadline = time.monotonic() + LEASE_S + 5
    while server.sessions and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.sessions == 0, "a session that nobody has outlived its lease"
    assert len(server._engine._stack.pool) == 0, "its KV cache is still taken"  # type: ignore[attr-defined]
    left = [thread.name for thread in threading.enumerate() if thread.name == "isthmus-link"]
    assert not left, f"threads of links that were closed: {left}; before: {threads}"


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_the_tokens_are_those_of_the_undisturbed_run(folder, server, expected, action, phase, direction):
    draft, messages = phase
    kind, number = messages[direction]
    fault = Fault(action[0], direction, kind, number, action[1])
    with Relay(server.address, fault) as relay:
        tokens = generate(folder, relay.address, draft)
    assert fault.done, "the message never came"
    assert tokens == expected[draft]


@pytest.mark.parametrize("message", [("up", "open"), ("down", "opened"), ("up", "close"), ("down", "closed")])
@pytest.mark.parametrize("action", ["truncate", "flip", "duplicate", "delay"])
def test_the_ends_of_a_session_may_be_damaged_too(folder, server, expected, message, action):
    fault = Fault(action, *message)
    with Relay(server.address, fault) as relay:
        tokens = generate(folder, relay.address)
    assert fault.done
    assert tokens == expected["off"]


@pytest.mark.parametrize("message", [("up", "attach"), ("down", "attached")])
@pytest.mark.parametrize("action", ["drop", "truncate", "flip", "break"])
def test_a_return_to_the_session_may_be_damaged_too(folder, server, expected, message, action):
    first, second = Fault("break", "up", "step", 8), Fault(action, *message)
    with Relay(server.address, second) as inner, Relay(inner.address, first) as relay:
        tokens = generate(folder, relay.address)
    assert first.done
    assert second.done
    assert tokens == expected["off"]


def test_broken_streams_leave_no_descriptors(folder, server, expected):
    counts = []
    for _ in range(6):
        for number in (3, 6):
            with Relay(server.address, Fault("break", "up", "step", number)) as relay:
                assert generate(folder, relay.address) == expected["off"]
        gc.collect()  # gRPC's channels are in cycles
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counts[-1] <= counts[1] + 4, counts


def test_wall_clocks_may_jump_by_days(folder, server, expected, monkeypatch):
    """Of the device and of the server, while a broken stream is taken up again."""
    jumps, now = itertools.cycle((0, 86_400, -86_400)), time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    fault = Fault("break", "up", "step", 8)
    with Relay(server.address, fault) as relay:
        assert generate(folder, relay.address) == expected["off"]
    assert fault.done
