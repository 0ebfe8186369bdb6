"""Load on a server: the frames of a few real generations, recorded once and replayed by many sessions at a time.

The front works while it is recorded, and not while the server is measured.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc
import numpy as np

from ...devices.backend import default_threads
from ...errors import LinkError, RequestError
from ..bundle import open_bundle
from ..codecs import default_codec, open_codec
from ..sampling import Sampling
from ..segments import AbsentEmbedding, Embedding, LayerStack
from ..wire import isthmus_pb2 as pb
from ..wire.framing import hello_message, open_message, parse_server_message
from ..wire.security import ChannelSecurity
from ..wire.transport import SESSION_PATH
from .generate import generate_tokens
from .link import RemoteBack

RECORDINGS = 4  # generations that are recorded, and shared out among the sessions

# Steps wait for each other on a full server: far above the longest turn, so that only a hang ends it.
_ANSWER_TIMEOUT_S = 120.0

Progress = Callable[[str, int, int], None]  # what, how many are done, how many in all


@dataclass(frozen=True)
class Recording:
    """One generation: for each token the messages that asked for it, and the token."""

    capacity: int
    exchanges: tuple[tuple[tuple[bytes, ...], int], ...]


@dataclass(frozen=True)
class Recordings:
    """Generations with the same number of new tokens, and the greeting that goes before them."""

    hello: bytes
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    generations: tuple[Recording, ...]


@dataclass
class Replay:
    """What one session saw.

    Attributes:
        tokens: received.
        first_s: from the first frame to the first token.
        token_s: of each further one.
        error: the code of what ended it too soon.
        identical: whether all tokens were the recorded ones.
    """

    tokens: int = 0
    first_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    error: str | None = None
    identical: bool = True


@dataclass(frozen=True)
class LoadReport:
    """What all sessions saw together.

    Attributes:
        seconds: from the first frame of any session to the last token of any.
    """

    sessions: int
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    seconds: float
    replays: tuple[Replay, ...]

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sessions over the time of all, prompts included."""
        return sum(replay.tokens for replay in self.replays) / self.seconds

    @property
    def identical(self) -> bool:
        """Whether every token that came was the recorded one, and every session that was not refused finished."""
        return all(replay.identical and replay.error in (None, "SERVER_FULL") for replay in self.replays)

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus bench --sessions --json`` prints."""
        first = [replay.first_s for replay in self.replays if replay.first_s is not None]
        return {
            "sessions": self.sessions,
            "finished": sum(replay.tokens == self.new_tokens for replay in self.replays),
            "prompt_tokens": list(self.prompt_tokens),
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "ms_per_token": _spread([seconds for replay in self.replays for seconds in replay.token_s]),
            "first_token_ms": _spread(first),
            "errors": dict(Counter(replay.error for replay in self.replays if replay.error)),
            "identical": self.identical,
        }


def load_test(
    folder: str | Path,
    server: str,
    *,
    sessions: int,
    new_tokens: int = 64,
    prompt_tokens: Sequence[int] = (16,),
    codec: str | None = None,
    security: ChannelSecurity | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> LoadReport:
    """Record generations and replay them on the same server, see `record` and `replay`."""
    if sessions < 1:
        raise RequestError(f"sessions {sessions}: must be at least 1")
    recordings = record(
        folder,
        server,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        codec=codec,
        security=security,
        threads=threads,
        progress=progress,
    )
    return replay(recordings, server, sessions=sessions, security=security, progress=progress)


def record(
    folder: str | Path,
    server: str,
    *,
    new_tokens: int = 64,
    prompt_tokens: Sequence[int] = (16,),
    codec: str | None = None,
    security: ChannelSecurity | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Recordings:
    """Record generations with a bundle's front, one after the other.

    Args:
        folder: ``OUT/device``.
        server: ``HOST:PORT`` of its server half.
        new_tokens: of each.
        prompt_tokens: lengths of the prompts, which are random ids; taken in turns.
        codec: what hidden states are sent in; see `isthmus.runtime.edge.model.EdgeModel`.
        security: how to reach the server.
        threads: of the front.
        progress: called as recordings are done.

    Raises:
        RequestError: a number is out of range.
        LinkError: the server cannot be reached, or refuses.
    """
    bundle = open_bundle(folder, "device")
    manifest = bundle.manifest
    if manifest.device_only:
        raise RequestError("sessions of a bundle that runs wholly on the device: there is no server to load")
    _check_lengths(prompt_tokens, new_tokens, manifest.max_length)
    codec = codec or default_codec(bundle)
    embedding = AbsentEmbedding(bundle) if manifest.server_only else Embedding(bundle)
    stack = LayerStack(bundle, default_threads() if threads is None else threads)
    count = max(RECORDINGS, len(prompt_tokens))
    generations = []
    for number in range(count):
        progress("recording", number, count)
        length = prompt_tokens[number % len(prompt_tokens)]
        ids = np.random.default_rng(number).integers(manifest.architecture.vocab_size, size=length).tolist()
        link = RemoteBack(
            server,
            manifest_sha256=bundle.manifest_sha256,
            split=manifest.split,
            d_model=manifest.architecture.d_model,
            codec=open_codec(bundle, codec),
            security=security if security is not None else ChannelSecurity(),
        )
        generations.append(_record_one(embedding, stack, link, ids, new_tokens))
    progress("recorded", count, count)
    hello = hello_message(bundle.manifest_sha256, manifest.split, codec)
    return Recordings(hello, tuple(prompt_tokens), new_tokens, tuple(generations))


def _check_lengths(prompt_tokens: Sequence[int], new_tokens: int, longest: int) -> None:
    for name, value in (("new tokens", new_tokens), *(("prompt", length) for length in prompt_tokens)):
        if value < 1:
            raise RequestError(f"{name} {value}: must be at least 1")
    if not prompt_tokens or max(prompt_tokens) + new_tokens > longest:
        raise RequestError(
            f"prompts of {', '.join(map(str, prompt_tokens)) or 'no'} tokens and {new_tokens} new ones: "
            f"at least one prompt, and together at most {longest}, this bundle's context"
        )


def _record_one(
    embedding: Embedding | AbsentEmbedding, stack: LayerStack, link: RemoteBack, ids: list[int], new_tokens: int
) -> Recording:
    capacity = len(ids) + new_tokens
    exchanges = []
    recorded = 0
    link.open(capacity, Sampling(), ids)
    with link:
        for token in generate_tokens(
            embedding,
            stack.session(capacity),
            link,
            ids,
            layers=stack.manifest.architecture.layers,
            max_new_tokens=new_tokens,
            end_tokens=(),
        ):
            steps = link.journal.messages
            exchanges.append((tuple(steps[recorded:]), token.id))
            recorded = len(steps)
    return Recording(capacity, tuple(exchanges))


def replay(
    recordings: Recordings,
    server: str,
    *,
    sessions: int,
    security: ChannelSecurity | None = None,
    progress: Progress = lambda what, done, total: None,
) -> LoadReport:
    """Replay recordings from many sessions at once.

    Args:
        recordings: taken in turns; of the server's export, be it another server.
        server: ``HOST:PORT``.
        sessions: at once.
        security: how to reach the server.
        progress: called as sessions end.
    """
    generations = recordings.generations
    chosen = [generations[number % len(generations)] for number in range(sessions)]
    security = security if security is not None else ChannelSecurity()
    seconds, replays = asyncio.run(_replay_all(chosen, server, recordings.hello, security, progress))
    return LoadReport(sessions, recordings.prompt_tokens, recordings.new_tokens, seconds, tuple(replays))


async def _replay_all(
    recordings: Sequence[Recording], server: str, hello: bytes, security: ChannelSecurity, progress: Progress
) -> tuple[float, list[Replay]]:
    """Open a session for each recording, begin all at once, and wait for all; seconds, and what each saw."""
    clients = [_Client(recording, server, hello, security) for recording in recordings]
    try:
        await asyncio.gather(*(client.open() for client in clients))
        started = perf_counter()
        for done, replaying in enumerate(asyncio.as_completed([client.replay() for client in clients]), 1):
            await replaying
            progress("sessions", done, len(clients))
        return perf_counter() - started, [client.seen for client in clients]
    finally:
        await asyncio.gather(*(client.close() for client in clients))


class _Client:
    """One session: nothing but what was recorded, sent as the answers come."""

    def __init__(self, recording: Recording, server: str, hello: bytes, security: ChannelSecurity) -> None:
        self.seen = Replay()
        self._recording = recording
        self._hello = hello
        self._channel = security.aio_channel(server)
        call = self._channel.stream_stream(SESSION_PATH, None, None)
        self._stream: Any = call(None, metadata=security.metadata)

    async def open(self) -> None:
        """Greet, and open the session."""
        await self._guarded(self._open)

    async def replay(self) -> None:
        """Send what was recorded, token by token."""
        if self.seen.error is None:
            await self._guarded(self._replay)

    async def close(self) -> None:
        """End session and connection."""
        if self.seen.error is None:
            await self._guarded(self._end)
        self._stream.cancel()
        await self._channel.close(None)

    async def _guarded(self, act: Callable[[], Any]) -> None:
        try:
            await act()
        except grpc.aio.AioRpcError as error:
            self.seen.error = error.code().name
        except TimeoutError:
            self.seen.error = "NO_ANSWER"
        except LinkError:
            self.seen.error = self.seen.error or "BROKEN"

    async def _open(self) -> None:
        await self._stream.write(self._hello)
        await self._stream.write(open_message(self._recording.capacity, Sampling(), ()))
        await self._answer()
        await self._answer()

    async def _replay(self) -> None:
        for messages, token in self._recording.exchanges:
            asked = perf_counter()
            for message in messages:
                await self._stream.write(message)
            answers = [await self._answer() for _ in messages]
            seconds = perf_counter() - asked
            if self.seen.first_s is None:
                self.seen.first_s = seconds
            else:
                self.seen.token_s.append(seconds)
            self.seen.tokens += 1
            self.seen.identical &= answers[-1].result.token == token

    async def _end(self) -> None:
        await self._stream.write(pb.ClientMessage(close=pb.Close()).SerializeToString())
        await self._answer()

    async def _answer(self) -> pb.ServerMessage:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            data = await self._stream.read()
        if not isinstance(data, bytes):
            raise LinkError("the server ended the stream")
        message = parse_server_message(data)
        if message.HasField("fault"):
            self.seen.error = pb.Fault.Code.Name(message.fault.code)
            raise LinkError(message.fault.message)
        return message


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median, 95th percentile and greatest, in ms."""
    if not seconds:
        return None
    p50, p95 = np.percentile(seconds, (50, 95))
    return {"p50": 1e3 * float(p50), "p95": 1e3 * float(p95), "max": 1e3 * max(seconds)}
