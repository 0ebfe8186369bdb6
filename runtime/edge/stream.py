"""A running generation: its tokens, then its text, then what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Self

from ..sampling import Sampling
from ..skipping import SkipSchedule
from ..text import Detokenizer, StopStrings, Tokenizer
from .controller import Controller, LevelChange
from .drafting import DraftCounts
from .generate import Back, Move, Replay, Token


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        finish_reason: ``stop`` (an end token or a stop string), ``length`` (max_new_tokens or the context),
            or ``interrupted``.
        ttft_ms: from the call to the first token, prompt included.
        decode_tokens_per_s: of the tokens after the first.
        bytes_up: bytes sent, prompt included.
        codec: what the hidden states were sent in; ``none`` if the device runs the whole model.
        deadline_ms: for each token but the first, if there was one.
        level_changes: of the codec, to keep the deadline.
        least_drafts: to which it bounded the drafts at its tightest; None if it did not.
        moves: of a session that went from the device to the server, or back.
        drafts: what came of them, if there were any.
        prompt_ids: token ids of the prompt.
        sampling: how tokens were chosen.
        manifest_sha256: of the export; with the two before, another run of it repeats this one.
        replays: of a session that was lost with its server.
        skip_schedule: by which blocks of layers were left out, if they were.
        ffn_skip: by which feed-forward networks were left out, if they were.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    ttft_ms: float
    decode_tokens_per_s: float
    bytes_up: int
    bytes_down: int
    round_trips: int
    codec: str
    tokens: list[Token] = field(repr=False)
    deadline_ms: float | None = None
    level_changes: tuple[LevelChange, ...] = ()
    least_drafts: int | None = None
    moves: tuple[Move, ...] = ()
    drafts: DraftCounts = field(default_factory=DraftCounts)
    prompt_ids: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    manifest_sha256: str = ""
    replays: tuple[Replay, ...] = ()
    skip_schedule: SkipSchedule | None = None
    ffn_skip: float | None = None

    @property
    def tokens_per_round_trip(self) -> float | None:
        """Generated tokens by round trips, steps that were on their way together counted once; None without any."""
        return len(self.token_ids) / self.round_trips if self.round_trips else None

    @property
    def exited(self) -> int:
        """Tokens that the device took itself, because its draft was sure enough."""
        return sum(token.source == "exit" for token in self.tokens)

    @property
    def mean_layers(self) -> float | None:
        """Layers that a token's hidden state went through, on average; None without tokens."""
        return sum(token.layers for token in self.tokens) / len(self.tokens) if self.tokens else None

    @property
    def new_tokens(self) -> int:
        """Generated tokens, the end token included."""
        return len(self.token_ids)

    @property
    def prefill_bytes_up(self) -> int:
        """Bytes sent for the prompt, up to the first token."""
        return sum(token.bytes_up for token in self.tokens[:1])

    @property
    def decode_bytes_up(self) -> int:
        """Bytes sent for the generated tokens."""
        return sum(token.bytes_up for token in self.tokens[1:])

    @property
    def late_tokens(self) -> int | None:
        """Tokens that took longer than the deadline, if there was one."""
        if self.deadline_ms is None:
            return None
        return sum(1e3 * token.total_s > self.deadline_ms for token in self.tokens[1:])

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus generate --json`` prints."""
        result = asdict(self) | {"new_tokens": self.new_tokens}
        result |= {"prefill_bytes_up": self.prefill_bytes_up, "decode_bytes_up": self.decode_bytes_up}
        result["tokens"] = [
            {
                "id": t.id,
                "source": t.source,
                "layers": t.layers,
                "bytes_up": t.bytes_up,
                "level": t.level,
                "ms": 1e3 * t.total_s,
            }
            for t in self.tokens
        ]
        del result["drafts"]
        result |= {"drafted": self.drafts.drafted, "accepted": self.drafts.accepted}
        result |= {"exited": self.exited, "mean_layers": self.mean_layers}
        result["tokens_per_round_trip"] = self.tokens_per_round_trip
        result["skip_schedule"] = None if self.skip_schedule is None else str(self.skip_schedule)
        result["late_tokens"] = self.late_tokens
        result["level_changes"] = [change._asdict() for change in self.level_changes]
        result["replays"] = [replay._asdict() for replay in self.replays]
        result["moves"] = [move._asdict() for move in self.moves]
        return result


class TokenStream:
    """Tokens of a running generation, end token included. Close it, also if it was left early.

    Attributes:
        prompt_ids: token ids of the prompt.
        sampling: how tokens are chosen.
        manifest_sha256: of the export.
        codec: what hidden states are sent in; ``none`` if the device runs the whole model.
        started: `time.perf_counter` when the generation was asked for.
        drafts: what came of them so far.
        skip_schedule: by which blocks of layers are left out.
        ffn_skip: by which feed-forward networks are left out.
    """

    def __init__(
        self,
        tokens: Iterator[Token],
        back: Back,
        *,
        prompt_ids: list[int],
        sampling: Sampling,
        manifest_sha256: str,
        codec: str,
        started: float,
        controller: Controller | None = None,
        drafts: DraftCounts | None = None,
        skip_schedule: SkipSchedule | None = None,
        ffn_skip: float | None = None,
    ) -> None:
        self._tokens = tokens
        self.drafts = drafts if drafts is not None else DraftCounts()
        self._controller = controller
        self._back = back
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.manifest_sha256 = manifest_sha256
        self.codec = codec
        self.started = started
        self.skip_schedule = skip_schedule
        self.ffn_skip = ffn_skip

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    @property
    def round_trips(self) -> int:
        """Times that the device waited for the server."""
        return self._back.round_trips

    @property
    def deadline_ms(self) -> float | None:
        """For each token but the first, if there is one."""
        return None if self._controller is None else 1e3 * self._controller.deadline_s

    @property
    def level_changes(self) -> tuple[LevelChange, ...]:
        """Of the codec so far, to keep the deadline."""
        return () if self._controller is None else tuple(self._controller.changes)

    @property
    def least_drafts(self) -> int | None:
        """To which drafts were bounded at the tightest so far, to keep the deadline; None if they were not."""
        return None if self._controller is None else self._controller.least_drafts

    @property
    def moves(self) -> tuple[Move, ...]:
        """Where the session went, so far."""
        return tuple(self._back.moves)

    @property
    def replays(self) -> tuple[Replay, ...]:
        """How often the session was made again, so far."""
        return tuple(self._back.replays)

    def close(self, *, cancel: bool = False) -> None:
        """End the session, here and on the server; with ``cancel`` drop the steps on their way. Safe to call twice."""
        self._back.close(cancel=cancel)


class TextStream:
    """Text pieces of a running generation; ends it when closed. `result` tells what came of it.

    Use it as an iterator, and as a context manager if it may be left early.
    """

    def __init__(self, tokens: TokenStream, tokenizer: Tokenizer, stop: StopStrings) -> None:
        self._tokens = tokens
        self._end_tokens = tokenizer.end_tokens
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._arrivals: list[float] = []
        self._text: list[str] = []
        self._done: list[Token] = []
        self._finish_reason = "interrupted"

    def __iter__(self) -> Iterator[str]:
        """Yield text as it becomes certain; a character is never split."""
        try:
            for piece in self._pieces():
                if piece:
                    self._text.append(piece)
                    yield piece
        finally:
            self.close()

    def _pieces(self) -> Iterator[str]:
        for token in self._tokens:
            self._arrivals.append(perf_counter())
            self._done.append(token)
            if token.id in self._end_tokens:
                self._finish_reason = "stop"
                break
            piece, stopped = self._stop.push(self._detokenizer.push(token.id))
            yield piece
            if stopped:
                self._finish_reason = "stop"
                return
        else:
            self._finish_reason = "length"
        piece, stopped = self._stop.push(self._detokenizer.finish())
        yield piece
        if not stopped:
            yield self._stop.finish()

    def close(self) -> None:
        """End the session, here and on the server. Safe to call twice."""
        self._tokens.close(cancel=self._finish_reason == "interrupted")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def result(self) -> Generation:
        """What was generated so far."""
        started = self._tokens.started
        first, last = (self._arrivals[0], self._arrivals[-1]) if self._arrivals else (started, started)
        return Generation(
            text="".join(self._text),
            token_ids=[token.id for token in self._done],
            prompt_tokens=len(self._tokens.prompt_ids),
            finish_reason=self._finish_reason,
            ttft_ms=(first - started) * 1e3,
            decode_tokens_per_s=(len(self._done) - 1) / (last - first) if last > first else 0.0,
            bytes_up=sum(token.bytes_up for token in self._done),
            bytes_down=sum(token.bytes_down for token in self._done),
            round_trips=self._tokens.round_trips,
            codec=self._tokens.codec,
            tokens=self._done,
            deadline_ms=self._tokens.deadline_ms,
            level_changes=self._tokens.level_changes,
            least_drafts=self._tokens.least_drafts,
            moves=self._tokens.moves,
            replays=self._tokens.replays,
            drafts=self._tokens.drafts,
            prompt_ids=self._tokens.prompt_ids,
            sampling=self._tokens.sampling,
            manifest_sha256=self._tokens.manifest_sha256,
            skip_schedule=self._tokens.skip_schedule,
            ffn_skip=self._tokens.ffn_skip,
        )
