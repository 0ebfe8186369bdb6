"""The token loop on the device: embedding, front, and whatever stands behind the split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import ProtocolError
from ..sampling import Sampler, Sampling
from ..segments import AbsentEmbedding, Embedding, Head, StackSession
from ..skipping import NO_BYPASS, Bypass
from .controller import Controller

PREFILL_CHUNK = 128  # tokens; the front computes a chunk while the server computes the one before


class StepReport(NamedTuple):
    """What one step behind the split cost. Times are in seconds, sizes in bytes on the stream.

    Attributes:
        token: the chosen token, if the step asked for one.
        encode_s: codec on the device.
        wait_s: from the frame's hand-over to the link until its result.
        server_decode_s: codec on the server.
        server_queue_s: waiting for the server's compute thread.
        server_compute_s: segments and sampling on the server.
        onnxruntime_s: of that, inside onnxruntime.
    """

    token: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    encode_s: float = 0.0
    wait_s: float = 0.0
    server_decode_s: float = 0.0
    server_queue_s: float = 0.0
    server_compute_s: float = 0.0
    onnxruntime_s: float = 0.0

    @property
    def server_s(self) -> float:
        """What the server took, waiting for its compute thread included."""
        return self.server_decode_s + self.server_queue_s + self.server_compute_s


def total(reports: Sequence[StepReport]) -> StepReport:
    """The token of the last report and the costs of all."""
    return StepReport(reports[-1].token, *(sum(costs) for costs in zip(*(each[1:] for each in reports), strict=True)))


class Replay(NamedTuple):
    """A session that was made again.

    Attributes:
        address: of the server that has it now.
        token: number of the token in the middle of which it was lost, counted from 1 over prompt and generated ones.
        steps: that were sent again.
        bytes_up: of these.
        seconds: from the loss until the session stood where it had been.
        reason: why the session was lost.
    """

    address: str
    token: int
    steps: int
    bytes_up: int
    seconds: float
    reason: str


class Move(NamedTuple):
    """A generation's change of place behind the split.

    Attributes:
        to: ``server`` or ``local``.
        token: number of the token in the middle of which it moved, counted from 1 over prompt and generated ones.
        send: what the server got, ``kv`` or ``hidden``; empty on the way back, which needs nothing.
        positions: sent on the way there; run again on the way back, because the device's layers had not seen them.
        bytes_up: of that, and of the hidden states with which this token's step went on.
        seconds: until what was behind the split stood where it had been.
    """

    to: str
    token: int
    send: str
    positions: int
    bytes_up: int
    seconds: float


class Back(Protocol):
    """What stands behind the split: the server, or the device itself."""

    @property
    def source(self) -> str:
        """Who decided the last token: ``server`` or ``local``."""
        ...

    @property
    def round_trips(self) -> int:
        """Times that the device waited for a token of the server."""
        ...

    @property
    def moves(self) -> Sequence[Move]:
        """Where the session went, so far."""
        ...

    @property
    def replays(self) -> Sequence[Replay]:
        """How often it was made again, so far."""
        ...

    def open(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int], bypass: Bypass = NO_BYPASS) -> None:
        """Begin a session of at most ``max_tokens`` positions, some of which leave blocks behind the split out."""
        ...

    def chunk_limit(self) -> int:
        """Most tokens in one step."""
        ...

    def step(
        self, hidden: NDArray[np.float32], position: int, token_ids: Sequence[int] = (), *, sample: bool
    ) -> StepReport:
        """Take hidden states ``[tokens, d_model]`` of consecutive positions and their tokens; give a token if asked."""
        ...

    def close(self, *, cancel: bool = False) -> None:
        """End the session; with ``cancel`` drop the steps on their way."""
        ...


class LocalBack:
    """No layers behind the split: the head runs on the device."""

    source = "local"
    round_trips = 0
    moves: Sequence[Move] = ()
    replays: Sequence[Replay] = ()

    def __init__(self, head: Head) -> None:
        self._head = head

    def open(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int], bypass: Bypass = NO_BYPASS) -> None:
        """Begin a session; the front's cache bounds its length."""
        self._sampler = Sampler(sampling, context_ids)

    def chunk_limit(self) -> int:
        """Most tokens in one step."""
        return PREFILL_CHUNK

    def step(
        self, hidden: NDArray[np.float32], position: int, token_ids: Sequence[int] = (), *, sample: bool
    ) -> StepReport:
        """Choose the token after the last hidden state, if asked for."""
        if not sample:
            return StepReport()
        started = perf_counter()
        logits = self._head.logits(hidden[-1])
        onnxruntime_s = perf_counter() - started
        token = self._sampler.sample(logits, position + len(hidden))
        self._sampler.accept(token)
        return StepReport(token=token, wait_s=perf_counter() - started, onnxruntime_s=onnxruntime_s)

    def close(self, *, cancel: bool = False) -> None:
        """Nothing to end."""


class Token(NamedTuple):
    """One generated token.

    Attributes:
        source: who had it first: ``server`` or ``local``, or a draft that the server confirmed: ``draft`` (the trained
            one) or ``ngram``; ``exit`` if the draft was sure enough for nobody to be asked, and ``local`` where it had
            to go on alone.
        layers: layers that its hidden state went through, the draft's included where it decided.
        bytes_up: bytes sent to get it; the first token's include the prompt's.
        front_s: seconds in the device's embedding and layers.
        front_onnxruntime_s: of that, inside onnxruntime.
        total_s: seconds from the step's begin to the token; tokens that came with another one took none.
        report: the sum of the costs of all its chunks.
        level: of the codec, where a controller chooses it.
    """

    id: int
    source: str
    layers: int
    bytes_up: int
    bytes_down: int
    front_s: float
    front_onnxruntime_s: float
    total_s: float
    report: StepReport
    level: int | None = None


def generate_tokens(
    embedding: Embedding | AbsentEmbedding,
    front: StackSession,
    back: Back,
    prompt_ids: Sequence[int],
    *,
    layers: int,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    controller: Controller | None = None,
) -> Iterator[Token]:
    """Prefill the prompt in chunks, then yield tokens until an end token (yielded too) or ``max_new_tokens``.

    The back's session is open; the caller closes it. A controller learns from each token; the back's codec asks it for
    the level.
    """
    pending = list(prompt_ids)
    for number in range(max_new_tokens):
        token = _step(embedding, front, back, pending, layers)
        if controller is not None and token.source != LocalBack.source:  # the link had a part in it
            token = token._replace(level=controller.level)
            server_s = token.report.server_s
            controller.observe(
                bytes_up=token.bytes_up,
                device_s=token.total_s - token.report.wait_s,
                server_s=server_s,
                link_s=token.report.wait_s - server_s,
                prompt=number == 0,
            )
        yield token
        if token.id in end_tokens:
            return
        pending = [token.id]


def _step(
    embedding: Embedding | AbsentEmbedding, front: StackSession, back: Back, ids: list[int], layers: int
) -> Token:
    """Run ids through front and back, in chunks, and take the token after the last."""
    started = perf_counter()
    chunk = min(back.chunk_limit(), PREFILL_CHUNK)
    reports: list[StepReport] = []
    front_s = onnxruntime_s = 0.0
    for first in range(0, len(ids), chunk):
        begun, busy = perf_counter(), front.onnxruntime_seconds
        position = front.cache.length
        chunk_ids = ids[first : first + chunk]
        hidden = front.forward(embedding.rows(chunk_ids))
        front_s += perf_counter() - begun
        onnxruntime_s += front.onnxruntime_seconds - busy
        reports.append(back.step(hidden, position, chunk_ids, sample=first + chunk >= len(ids)))
    token = reports[-1].token
    if token is None:
        raise ProtocolError("BAD_RESULT", "the step asked for a token and its result holds none")
    report = total(reports)
    return Token(
        id=token,
        source=back.source,
        layers=layers,
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
        front_s=front_s,
        front_onnxruntime_s=onnxruntime_s,
        total_s=perf_counter() - started,
        report=report,
    )
