"""A back half that anyone can predict, a server around it, and a proxy that can be cut."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.quant.codec import Codec, Raw16, Raw32
from isthmus.runtime.bundle import Architecture, KVSpec, Manifest, Source
from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.skipping import NO_BYPASS, Bypass
from isthmus.runtime.wire import development
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

D_MODEL = 16
VOCABULARY = 256
SPLIT = 2


def fake_manifest() -> Manifest:
    return Manifest(
        schema=2,
        isthmus="0",
        source=Source("fake", "none", {}),
        architecture=Architecture(
            "llama", 5, D_MODEL, 2, 1, 8, 32, VOCABULARY, 1e-5, 10000.0, 4096, tied_embeddings=True
        ),
        split=SPLIT,
        front_bits=32,
        back_bits=32,
        embed_bits=32,
        head_bits=32,
        block_size=32,
        weights="rtn",
        symmetric=True,
        max_length=1024,
        segments=(),
        kv={"device": KVSpec(32, 1, 8), "server": KVSpec(32, 1, 8)},
        codecs=("raw32", "raw16"),
        end_tokens=(0,),
        bos_token=None,
        chat_template=None,
        special_tokens={},
        minimum_onnxruntime="1.0",
        files={"device": (), "server": ()},
        validation={},
    )


class FakeSession:
    """Its token depends on every hidden state so far, in order: a lost or repeated step changes it."""

    def __init__(self, engine: FakeEngine, seed: int) -> None:
        self._engine = engine
        self._seed = seed
        self._rows: list[bytes] = []

    @property
    def length(self) -> int:
        return len(self._rows)

    def advance(self, hidden: np.ndarray) -> None:
        self._rows += [row.tobytes() for row in hidden]
        self._engine.order.append(self)

    def rows(self, first: int, last: int) -> np.ndarray:
        joined = np.frombuffer(b"".join(self._rows[first:last]), np.uint8)
        return joined.reshape(1, 1, 1, last - first, -1).copy()

    def append_rows(self, rows: np.ndarray) -> None:
        self._rows += [np.ascontiguousarray(rows[:, :, :, at]).tobytes() for at in range(rows.shape[3])]
        self._engine.order.append(self)

    def truncate(self, length: int) -> None:
        del self._rows[length:]

    def sample(self) -> int:
        return self._choice(self.length)

    def verify(self, drafted: Sequence[int]) -> list[int]:
        first = self.length - len(drafted)
        tokens = [self._choice(first)]
        while len(tokens) <= len(drafted) and tokens[-1] == drafted[len(tokens) - 1]:
            tokens.append(self._choice(first + len(tokens)))
        self.truncate(first + len(tokens) - 1)
        return tokens

    def _choice(self, length: int) -> int:
        return (zlib.crc32(b"".join(self._rows[:length])) + self._seed) % VOCABULARY

    def close(self) -> None:
        self._engine.sessions.remove(self)


@dataclass
class FakeEngine:
    manifest: Manifest = field(default_factory=fake_manifest)
    manifest_sha256: str = "a" * 64
    onnxruntime_seconds: float = 0.0
    sessions: list[FakeSession] = field(default_factory=list)
    order: list[FakeSession] = field(default_factory=list)  # whose steps were computed
    fail_at: int = -1  # length of a session at which its next step fails
    bypassed: list[Bypass] = field(default_factory=list)  # of each session
    gate: threading.Event = field(default_factory=threading.Event)  # closed: steps wait in the engine

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def advanced(self) -> int:
        return len(self.order)

    def new_session(
        self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int] = (), bypass: Bypass = NO_BYPASS
    ) -> FakeSession:
        self.bypassed.append(bypass)
        session = FakeSession(self, sampling.seed)
        self.sessions.append(session)
        return session

    def advance(self, parts: Sequence[tuple[FakeSession, np.ndarray, int]]) -> None:
        self.gate.wait(20)
        if any(session.length == self.fail_at for session, _, _ in parts):
            raise RuntimeError("a fault in the engine, with details that stay on the server")
        for session, hidden, _ in parts:
            session.advance(hidden)

    def codec(self, name: str) -> Codec:
        return {"raw32": Raw32(), "raw16": Raw16()}[name]

    def kv_bytes(self, max_tokens: int) -> int:
        return 64 * max_tokens


def hidden_states(ids: Sequence[int], position: int) -> np.ndarray:
    """A front in one line: hidden states that depend on token and position."""
    rows = [np.random.default_rng([token, position + i]).normal(size=D_MODEL) for i, token in enumerate(ids)]
    return np.array(rows, np.float32)


def expected_tokens(prompt: Sequence[int], new_tokens: int, seed: int = 0) -> list[int]:
    """What a generation must give, computed without any link."""
    session = FakeSession(FakeEngine(), seed)
    pending, tokens = list(prompt), []
    for _ in range(new_tokens):
        session.advance(hidden_states(pending, session.length))
        pending = [session.sample()]
        tokens += pending
    return tokens


@dataclass
class Generation:
    """A generation over a link, a token at a time; the prompt goes up in frames of ``chunk``."""

    link: RemoteBack
    prompt: Sequence[int]
    chunk: int = 3
    tokens: list[int] = field(default_factory=list)
    position: int = 0

    def run(self, new_tokens: int) -> list[int]:
        for _ in range(new_tokens):
            pending = self.tokens[-1:] or list(self.prompt)
            for first in range(0, len(pending), self.chunk):
                ids = pending[first : first + self.chunk]
                last = first + self.chunk >= len(pending)
                report = self.link.step(hidden_states(ids, self.position), self.position, sample=last)
                self.position += len(ids)
            assert report.token is not None
            self.tokens.append(report.token)
        return self.tokens


@pytest.fixture
def user_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's configuration folder with nothing of the real user's in it; one for all tests."""
    folder = tmp_path_factory.getbasetemp() / "user-config"
    monkeypatch.setattr(development, "user_config_path", lambda name: folder / name)
    return folder


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_server(engine: FakeEngine, user_config: Path) -> Iterator[Callable[..., BackServer]]:
    """Start servers of `engine`; keyword arguments are limits."""
    servers = []

    def start(security: ServerSecurity | None = None, **limits: float) -> BackServer:
        server = BackServer(engine, security=security, limits=ServerLimits(**limits))
        server.start()
        servers.append(server)
        return server

    yield start
    engine.gate.set()
    for server in servers:
        server.stop(0.2)
    assert engine.sessions == [], "a session outlived its server"


@pytest.fixture
def serve(user_config: Path) -> Iterator[Callable[..., BackServer]]:
    """Start servers of bundles' server halves; keyword arguments are limits."""
    servers = []

    def start(folder: Path, security: ServerSecurity | None = None, **limits: Any) -> BackServer:
        server = BackServer.from_bundle(folder / "server", threads=1, security=security, limits=ServerLimits(**limits))
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop(0.2)


@pytest.fixture
def server(make_server: Callable[..., BackServer]) -> BackServer:
    """A TLS server with the development certificate."""
    return make_server()


@pytest.fixture
def make_link(engine: FakeEngine) -> Iterator[Callable[..., RemoteBack]]:
    """Links to an address; keyword arguments override what fits the server."""
    links = []

    def make(address: str, **changes: object) -> RemoteBack:
        options: dict[str, object] = {
            "manifest_sha256": engine.manifest_sha256,
            "split": SPLIT,
            "d_model": D_MODEL,
            "codec": Raw32(),
            "security": ChannelSecurity(),
            "connect_timeout": 5.0,
        }
        link = RemoteBack(address, **(options | changes))  # type: ignore[arg-type]
        links.append(link)
        return link

    yield make
    for link in links:
        link.close()


@pytest.fixture
def make_generation(make_link: Callable[..., RemoteBack]) -> Callable[..., Generation]:
    """An opened session, ready to generate."""

    def make(address: str, prompt: Sequence[int], *, seed: int = 0, **changes: object) -> Generation:
        link = make_link(address, **changes)
        link.open(512, Sampling(seed=seed))
        return Generation(link, prompt)

    return make


@pytest.fixture
def expected() -> Callable[..., list[int]]:
    return expected_tokens


@pytest.fixture
def hidden() -> Callable[..., np.ndarray]:
    return hidden_states


def _tokens_though_stopped(model: EdgeModel, prompt: Sequence[int], new_tokens: int, server: BackServer) -> list[int]:
    stream = model.tokens(prompt, max_new_tokens=new_tokens, end_tokens=())
    tokens = []
    for token in stream:
        tokens.append(token.id)
        if len(tokens) == new_tokens // 2:
            server.stop()
    stream.close()
    assert len(stream.replays) == 1
    return tokens


@pytest.fixture
def tokens_though_stopped() -> Callable[[EdgeModel, Sequence[int], int, BackServer], list[int]]:
    """Generate greedily, stop the session's server half-way, and tell the tokens; it must be made again once."""
    return _tokens_though_stopped


@pytest.fixture
def bystander(server: BackServer, make_generation: Callable[..., Generation]) -> Iterator[None]:
    """Another session on `server`, which generates while the test runs and must come out right."""
    generation = make_generation(server.address, [9, 8, 7, 6, 5], seed=3)
    generation.run(1)  # its prompt is computed: an engine told to fail at length 0 fails another session
    done = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not done.wait(0.005):
                generation.run(1)
            generation.run(2)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    done.set()
    thread.join(30)
    assert not failures
    assert generation.tokens == expected_tokens(generation.prompt, len(generation.tokens), seed=3)
    assert len(generation.tokens) >= 2
