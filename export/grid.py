"""All ways to run a model on a device, a link and a server, each with its memory, times, bytes and drop in accuracy.

A hand-over sends what arXiv 2511.04002 does: the cache of the layers behind the split and one hidden state, or the
hidden states of all positions at the split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..devices.budget import STEP_BYTES
from ..devices.link import LinkProfile
from ..devices.profile import DeviceProfile
from ..errors import PlanError
from ..quant.ids import Ids, id_bytes
from ..runtime.bundle import Architecture
from .accuracy import AccuracyTable, drop_percent
from .costs import BACK_BITS, FRONT_BITS, KV_BITS, Costs
from .draft_costs import DRAFT_LENGTHS, LEAST_FRONT_BITS, DraftFigures, StepTimes
from .footprint import default_head_bits
from .latency import CHUNK
from .limits import Limits
from .plan import MODES, Candidate

HAND_OVERS = (0.25, 0.5, 0.75)  # of the new tokens

RESULT_BYTES = 34  # of its answer
RPC_MS = 0.9  # gRPC and both loops, on one machine
CONNECT_ROUND_TRIPS = 3  # TCP, TLS, Hello and Open together
SAME_TIME = 0.02  # times closer than that count as equal, and the smaller drop wins


@dataclass(frozen=True)
class Grid:
    """A model, a device, a link and perhaps a server, with what a generation must hold.

    Attributes:
        threads: of the device; None for all that its profile has figures for.
        modes: that are looked at, of `isthmus.export.plan.MODES`.
        drafts: trained for the model, by the split whose hidden states they read; elsewhere nothing is drafted.
    """

    arch: Architecture
    accuracy: AccuracyTable
    device: DeviceProfile
    link: LinkProfile
    server: DeviceProfile | None
    limits: Limits
    threads: int | None = None
    modes: tuple[str, ...] = MODES
    drafts: Mapping[int, DraftFigures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limits.context > self.arch.max_positions:
            raise PlanError(
                f"context={self.limits.context}: the model has {self.arch.max_positions} positions; ask for fewer"
            )
        if not self.modes or not set(self.modes) <= set(MODES):
            raise PlanError(f"modes {', '.join(self.modes)}: must be some of {', '.join(MODES)}")
        if self.server is None and self.modes != MODES and "device-only" not in self.modes:
            raise PlanError(f"modes {', '.join(self.modes)} need a server; give its profile")
        if self.accuracy.layers != self.arch.layers:
            raise PlanError(
                f"the accuracy table is of {self.accuracy.model} with {self.accuracy.layers} layers, the model has "
                f"{self.arch.layers}; measure it with `isthmus eval MODEL --for-plan`"
            )

    @cached_property
    def _costs(self) -> Costs:
        return Costs(
            self.arch, self.accuracy, self.device, self.link, self.server, self.limits, self.threads, self.drafts
        )

    def candidates(self) -> list[Candidate]:
        """The whole grid, the best first, whether it keeps the limits or not."""
        found = list(self._device_only())
        if self.server is not None:
            found += self._server_only()
            found += self._split()
        return sorted((candidate for candidate in found if candidate.mode in self.modes), key=_rank)

    def feasible(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps all limits."""
        return not any(getattr(candidate, field) > bound for field, bound in self.limits.bounds().values())

    def time_parts(self, candidate: Candidate) -> dict[str, float]:
        """Where the time of one token at full context goes, in ms, by part; of the later tokens for a hand-over."""
        length, layers = self.limits.context, self.arch.layers
        device, bits = self._costs.device_speed, candidate.front_bits
        if candidate.mode == "device-only":
            head = device.head(default_head_bits(bits))
            return {"device": layers * device.decode_layer(bits, length) + device.calls(layers), "head": head}
        server = self._costs.server_speed
        behind = layers - candidate.split
        head = server.head(default_head_bits(candidate.back_bits))
        back = behind * server.decode_layer(candidate.back_bits, length) + server.calls(behind)
        server_only = candidate.mode == "server-only"
        sent = candidate.bytes_per_token if server_only else self._frame_bytes(candidate)
        up, down = (self._costs.transfer(bytes_, up=up) for bytes_, up in ((sent, True), (RESULT_BYTES, False)))
        parts = {"link up": up, "server": back, "head": head, "link down": down, "rpc": RPC_MS}
        if server_only:
            return parts
        front = candidate.split * device.decode_layer(bits, length) + device.calls(candidate.split)
        coding = {"encode": device.codec(encode=True), "decode": server.codec(encode=False)}
        parts = {"device": front} | ({} if candidate.codec.startswith("raw") else coding) | parts
        if not candidate.draft_length:
            return parts
        times = self._step_times(candidate, sum(parts.values()))
        tokens = self.drafts[candidate.split].drafted(times, candidate.draft_length).tokens
        parts = {name: ms / tokens for name, ms in parts.items()}  # of the token that waits for a round trip
        return parts | {"drafts that were right": candidate.ms_per_token - sum(parts.values())}

    def _frame_bytes(self, candidate: Candidate) -> float:
        return self._costs.sent[candidate.codec, _level(candidate)][candidate.split]

    # One mode each.

    def _device_only(self) -> Iterator[Candidate]:
        layers, new = self.arch.layers, self.limits
        speed = self._costs.device_speed
        for bits in FRONT_BITS:
            head_bits = default_head_bits(bits)
            ttft = layers * speed.prefill_layer(bits, new.prompt_tokens) + speed.head(head_bits)
            ms = layers * speed.decode_layer(bits, new.context) + speed.calls(layers) + speed.head(head_bits)
            for kv_bits in KV_BITS:
                kl, error = self.accuracy.drop(
                    split=layers, front_bits=bits, back_bits=bits, front_kv_bits=kv_bits, back_kv_bits=kv_bits
                )
                yield Candidate(
                    mode="device-only",
                    split=layers,
                    front_bits=bits,
                    back_bits=bits,
                    kv_bits=kv_bits,
                    codec="none",
                    level=-1,
                    draft_length=0,
                    memory_mb=self._costs.device_memory(((layers, bits),), kv_bits, head_bits),
                    server_memory_mb=0.0,
                    ttft_ms=ttft,
                    ms_per_token=ms,
                    worst_ms=ms,
                    bytes_per_token=0.0,
                    drop=drop_percent(kl),
                    time_uncertainty=self.device.uncertainty,
                    drop_se=100 * math.exp(kl) * error,
                )

    def _server_only(self) -> Iterator[Candidate]:
        layers, new, speed = self.arch.layers, self.limits, self._costs.server_speed
        chunks = -(-new.prompt_tokens // CHUNK)
        one = id_bytes(self.arch.vocab_size)
        sent = self._costs.step_bytes(one)
        prompt = chunks * self._costs.step_bytes(one * new.prompt_tokens / chunks, tokens=min(CHUNK, new.prompt_tokens))
        network = self._costs.transfer(sent, up=True) + self._costs.transfer(RESULT_BYTES, up=False) + RPC_MS
        first = self._costs.transfer(prompt, up=True) + self._costs.transfer(RESULT_BYTES, up=False) + RPC_MS
        for bits in BACK_BITS:
            head_bits = default_head_bits(bits)
            compute = layers * speed.decode_layer(bits, new.context) + speed.calls(layers) + speed.head(head_bits)
            prefill = layers * speed.prefill_layer(bits, new.prompt_tokens) + speed.head(head_bits)
            kl, error = self.accuracy.drop(split=layers, front_bits=bits, back_bits=bits)
            ms = network + compute
            yield Candidate(
                mode="server-only",
                split=0,
                front_bits=bits,
                back_bits=bits,
                kv_bits=32,
                codec=Ids.name,
                level=-1,
                draft_length=0,
                memory_mb=self._costs.device_memory((), 32, None) + (sent + STEP_BYTES) * new.context / 1e6,
                server_memory_mb=self._costs.server_memory(layers, bits, head_bits),
                ttft_ms=CONNECT_ROUND_TRIPS * self.link.rtt_ms + first + prefill,
                ms_per_token=ms,
                worst_ms=ms,
                bytes_per_token=sent,
                drop=drop_percent(kl),
                time_uncertainty=self._costs.uncertainty(0.0, network, compute),
                drop_se=100 * math.exp(kl) * error,
            )

    def _split(self) -> Iterator[Candidate]:
        for split in range(1, self.arch.layers):
            for front in FRONT_BITS:
                for back in (bits for bits in BACK_BITS if bits >= front):
                    yield from self._split_at(split, front, back)

    def _split_at(self, split: int, front_bits: int, back_bits: int) -> Iterator[Candidate]:
        """One cut at one pair of precisions, over cache bits and codec levels, and its hand-overs."""
        new, behind, costs = self.limits, self.arch.layers - split, self._costs
        head_ms = costs.server_head[back_bits]
        front_ms = costs.front[front_bits] * split + costs.device_speed.calls(split)
        back_ms = costs.back[back_bits] * behind + costs.server_speed.calls(behind) + head_ms
        down_ms = self._costs.transfer(RESULT_BYTES, up=False)
        server_mb = self._costs.server_memory(behind, back_bits, default_head_bits(back_bits))
        chunks = -(-new.prompt_tokens // CHUNK)
        front_chunk = split * self._costs.front_prefill[front_bits] / chunks
        back_chunk = behind * self._costs.back_prefill[back_bits] / chunks
        alone = None
        for codec, level, raw in self._costs.levels:
            sent = self._costs.sent[codec, level][split]
            up_ms, chunk_up_ms = self._costs.up_ms[codec, level][split]
            coding = 0.0 if raw else self._costs.coding_ms
            link_ms = up_ms + down_ms + RPC_MS
            ms = front_ms + coding + link_ms + back_ms
            # Chunks follow each other through device, link and server: the slowest of the three paces them.
            stages = front_chunk, chunk_up_ms - self.link.rtt_ms / 2, back_chunk
            prefill = sum(stages) + (chunks - 1) * max(stages) + self.link.rtt_ms / 2
            ttft = CONNECT_ROUND_TRIPS * self.link.rtt_ms + prefill + down_ms + RPC_MS + head_ms
            uncertainty = self._costs.uncertainty(front_ms + coding, link_ms, back_ms)
            journal_mb = costs.journal_mb(codec, level, split)
            for kv_bits in KV_BITS:
                kl, error = self._costs.drop(split, front_bits, back_bits, kv_bits, codec, level)
                candidate = Candidate(
                    mode="split",
                    split=split,
                    front_bits=front_bits,
                    back_bits=back_bits,
                    kv_bits=kv_bits,
                    codec=codec,
                    level=-1 if level is None else level,
                    draft_length=0,
                    memory_mb=costs.memory_at[split, front_bits, kv_bits] + journal_mb,
                    server_memory_mb=server_mb,
                    ttft_ms=ttft,
                    ms_per_token=ms,
                    worst_ms=ms,
                    bytes_per_token=sent,
                    drop=drop_percent(kl),
                    time_uncertainty=uncertainty,
                    drop_se=100 * math.exp(kl) * error,
                )
                yield candidate
                yield from self._drafted(candidate)
                if kv_bits == 32:
                    alone = alone or self._alone_ms(split, front_bits, back_bits)
                    yield from self._hand_overs(candidate, alone)

    def _drafted(self, split: Candidate) -> Iterator[Candidate]:
        """The same cut with drafts, if there is a draft for its hidden states."""
        draft, costs = self.drafts.get(split.split), self._costs
        if draft is None or split.front_bits < LEAST_FRONT_BITS:
            return
        times = self._step_times(split, split.ms_per_token)
        for length in DRAFT_LENGTHS:
            drafted = draft.drafted(times, length)
            yield replace(
                split,
                draft_length=length,
                memory_mb=split.memory_mb + costs.draft_mb[split.split],
                ms_per_token=drafted.ms_per_token,
                worst_ms=split.worst_ms + times.draft_ms,  # one may be in the answer's way
                bytes_per_token=drafted.frames * split.bytes_per_token,
            )

    def _step_times(self, split: Candidate, token_ms: float) -> StepTimes:
        """What the parts of a cut's steps take, if one undrafted token takes ``token_ms``."""
        costs = self._costs
        coding = 0.0 if split.codec.startswith("raw") else costs.device_speed.codec(encode=True)
        front = costs.front[split.front_bits] * split.split + costs.device_speed.calls(split.split) + coding
        frame = costs.transfer(self._frame_bytes(split), up=True) - costs.transfer(0, up=True)
        return StepTimes(front, front + costs.guess_ms[split.split], token_ms - front, frame)

    def _hand_overs(self, split: Candidate, alone_ms: tuple[float, float]) -> Iterator[Candidate]:
        """The same cut, begun on the device alone; ``alone_ms`` is its first token and each later one there."""
        new = self.limits
        first_ms, token_ms = alone_ms
        for share in HAND_OVERS:
            position = new.prompt_tokens + round(share * (new.context - new.prompt_tokens))
            alone_share = (position - new.prompt_tokens) / max(new.context - new.prompt_tokens, 1)
            behind = self.arch.layers - split.split
            moved_bits = self._costs.prefill_bits[split.codec, _level(split)][split.split]
            hidden = position * self.arch.d_model * moved_bits / 8
            # The cache of the layers behind the split, and the hidden state of the token during which it goes.
            cache = (
                self._costs.footprint.kv_bytes(behind, 8 if moved_bits < 32 else 32, position) + self.arch.d_model * 4
            )
            rebuilt = behind * self._costs.rebuild_ms(split.back_bits, position)
            for send, bytes_, rebuild_ms in (("hidden", hidden, rebuilt), ("kv", cache, 0.0)):
                moving = CONNECT_ROUND_TRIPS * self.link.rtt_ms + self._costs.transfer(bytes_, up=True)
                moving += rebuild_ms + split.ms_per_token
                steps = max(new.context - new.prompt_tokens, 1)
                yield replace(
                    split,
                    mode="hand-over",
                    memory_mb=self._costs.whole_memory(split, position),
                    ttft_ms=first_ms,
                    ms_per_token=alone_share * token_ms + (1 - alone_share) * split.ms_per_token + moving / steps,
                    worst_ms=max(token_ms, moving),
                    bytes_per_token=(1 - alone_share) * split.bytes_per_token + bytes_ / steps,
                    time_uncertainty=max(self.device.uncertainty, split.time_uncertainty),
                    hand_over_at=position,
                    send=send,
                )

    def _alone_ms(self, split: int, front_bits: int, back_bits: int) -> tuple[float, float]:
        """First token and later ones at full context, with both precisions on the device."""
        speed, new, behind = self._costs.device_speed, self.limits, self.arch.layers - split
        head = speed.head(default_head_bits(back_bits))
        first = split * self._costs.front_prefill[front_bits] + behind * speed.prefill_layer(
            back_bits, new.prompt_tokens
        )
        later = split * self._costs.front[front_bits] + behind * speed.decode_layer(back_bits, new.context)
        return first + head, later + speed.calls(split) + speed.calls(behind) + head


def _rank(candidate: Candidate) -> tuple[int, float, float]:
    return (round(math.log(candidate.ms_per_token) / SAME_TIME), candidate.drop, candidate.memory_mb)


def _level(candidate: Candidate) -> int | None:
    return None if candidate.level < 0 else candidate.level
