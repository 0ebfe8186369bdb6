"""All ways to run a model on a device, a link and a server, each with its memory, times, bytes and drop in accuracy.

Times come from device profiles (`isthmus.export.latency`), drops from measurements (`isthmus.export.accuracy`). A
hand-over sends what arXiv 2511.04002 does: the cache of the layers behind the split and one hidden state, or the hidden
states of all positions at the split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..devices.budget import INTERPRETER_MB, MemoryNeeds, estimate_memory
from ..devices.link import LinkProfile
from ..devices.profile import DeviceProfile
from ..errors import PlanError
from ..quant.ids import Ids, id_bytes
from ..runtime.bundle import Architecture
from .accuracy import AccuracyTable, drop_percent
from .footprint import Footprint, default_head_bits
from .latency import CHUNK, LAYERS_PER_BLOCK, MachineSpeed
from .plan import MODES, Candidate

FRONT_BITS = BACK_BITS = (2, 4, 8, 16, 32)
KV_BITS = (32, 8, 4)
SERVER_CHUNK = 512  # tokens of the largest frame that a server takes
HAND_OVERS = (0.25, 0.5, 0.75)  # of the new tokens

FRAMING_BYTES = 26  # of a step beside its payload
IDS_FRAMING_BYTES = 21  # where that is a few token ids; 19 before position 128
RESULT_BYTES = 34  # of its answer
PACKET_BYTES = 90  # of TLS, HTTP/2, TCP and IP around either
RPC_MS = 0.9  # gRPC and both loops, on one machine
CONNECT_ROUND_TRIPS = 3  # TCP, TLS, Hello and Open together
LINK_UNCERTAINTY = 0.1
TABLE_MATRICES = 3  # of d_model squared, which a calibrated codec keeps in memory
SAME_TIME = 0.02  # times closer than that count as equal, and the smaller drop wins


@dataclass(frozen=True)
class Limits:
    """What a plan must keep. None: no limit.

    Attributes:
        memory_mb: resident memory of the device's process.
        context: positions of a generation, prompt included.
        prompt_tokens: of them, in the prompt.
        deadline_ms: for each token but the first.
        first_token_ms: for the first.
        max_drop: expected increase in perplexity, in percent.
        server_memory_mb: resident memory of the server's process.
        sessions: generations that share the server, which computes their steps one after the other.

    Raises:
        PlanError: a limit that nothing can keep.
    """

    memory_mb: float | None = None
    context: int = 1024
    prompt_tokens: int = 128
    deadline_ms: float | None = None
    first_token_ms: float | None = None
    max_drop: float | None = 5.0
    server_memory_mb: float | None = None
    sessions: int = 1

    def __post_init__(self) -> None:
        if self.sessions < 1:
            raise PlanError(f"sessions={self.sessions}: must be at least 1")
        for name in ("memory_mb", "deadline_ms", "first_token_ms", "max_drop", "server_memory_mb"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise PlanError(f"{name}={value}: must be positive")
        if self.memory_mb is not None and self.memory_mb < INTERPRETER_MB:
            raise PlanError(
                f"memory {self.memory_mb:.0f} MB: the interpreter and its libraries alone take {INTERPRETER_MB:.0f} MB"
            )
        if not 1 <= self.prompt_tokens < self.context:
            raise PlanError(
                f"prompt of {self.prompt_tokens} tokens in a context of {self.context}: must be 1 to {self.context - 1}"
            )

    def bounds(self) -> dict[str, tuple[str, float]]:
        """Limits that are set: name -> the candidate's field that it bounds, and the bound."""
        fields = {
            "memory_mb": "memory_mb",
            "deadline_ms": "worst_ms",
            "first_token_ms": "ttft_ms",
            "max_drop": "drop",
            "server_memory_mb": "server_memory_mb",
        }
        return {name: (field, getattr(self, name)) for name, field in fields.items() if getattr(self, name) is not None}


@dataclass(frozen=True)
class Grid:
    """A model, a device, a link and perhaps a server, with what a generation must hold.

    Attributes:
        threads: of the device; None for all that its profile has figures for.
        modes: that are looked at, of `isthmus.export.plan.MODES`.
    """

    arch: Architecture
    accuracy: AccuracyTable
    device: DeviceProfile
    link: LinkProfile
    server: DeviceProfile | None
    limits: Limits
    threads: int | None = None
    modes: tuple[str, ...] = MODES

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
        device, bits = self._device_speed, candidate.front_bits
        if candidate.mode == "device-only":
            head = device.head(default_head_bits(bits))
            return {"device": layers * device.decode_layer(bits, length) + device.calls(layers), "head": head}
        server = self._server_speed
        behind = layers - candidate.split
        head = server.head(default_head_bits(candidate.back_bits))
        back = behind * server.decode_layer(candidate.back_bits, length) + server.calls(behind)
        up, down = (
            self._transfer(bytes_, up=up) for bytes_, up in ((candidate.bytes_per_token, True), (RESULT_BYTES, False))
        )
        parts = {"link up": up, "server": back, "head": head, "link down": down, "rpc": RPC_MS}
        if candidate.mode == "server-only":
            return parts
        front = candidate.split * device.decode_layer(bits, length) + device.calls(candidate.split)
        coding = {"encode": device.codec(encode=True), "decode": server.codec(encode=False)}
        return {"device": front} | ({} if candidate.codec.startswith("raw") else coding) | parts

    # One mode each.

    def _device_only(self) -> Iterator[Candidate]:
        layers, new = self.arch.layers, self.limits
        speed = self._device_speed
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
                    memory_mb=self._device_memory(((layers, bits),), kv_bits, head_bits),
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
        layers, new, speed = self.arch.layers, self.limits, self._server_speed
        chunks = -(-new.prompt_tokens // CHUNK)
        sent, prompt = (
            IDS_FRAMING_BYTES * steps + id_bytes(self.arch.vocab_size) * tokens
            for steps, tokens in ((1, 1), (chunks, new.prompt_tokens))
        )
        network = self._transfer(sent, up=True) + self._transfer(RESULT_BYTES, up=False) + RPC_MS
        first = self._transfer(prompt, up=True) + self._transfer(RESULT_BYTES, up=False) + RPC_MS
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
                memory_mb=self._device_memory((), 32, None),
                server_memory_mb=self._server_memory(layers, bits, head_bits),
                ttft_ms=CONNECT_ROUND_TRIPS * self.link.rtt_ms + first + prefill,
                ms_per_token=ms,
                worst_ms=ms,
                bytes_per_token=sent,
                drop=drop_percent(kl),
                time_uncertainty=self._uncertainty(0.0, network, compute),
                drop_se=100 * math.exp(kl) * error,
            )

    def _split(self) -> Iterator[Candidate]:
        for split in range(1, self.arch.layers):
            for front in FRONT_BITS:
                for back in (bits for bits in BACK_BITS if bits >= front):
                    yield from self._split_at(split, front, back)

    def _split_at(self, split: int, front_bits: int, back_bits: int) -> Iterator[Candidate]:
        """One cut at one pair of precisions, over cache bits and codec levels, and its hand-overs."""
        new, behind = self.limits, self.arch.layers - split
        front_ms = self._front[front_bits] * split + self._device_speed.calls(split)
        back_ms = self._back[back_bits] * behind + self._server_speed.calls(behind) + self._server_head[back_bits]
        down_ms = self._transfer(RESULT_BYTES, up=False)
        server_mb = self._server_memory(behind, back_bits, default_head_bits(back_bits))
        chunks = -(-new.prompt_tokens // CHUNK)
        front_chunk = split * self._front_prefill[front_bits] / chunks
        back_chunk = behind * self._back_prefill[back_bits] / chunks
        alone = None
        for codec, level, raw in self._levels:
            sent = self._sent[codec, level][split]
            up_ms, chunk_up_ms = self._up_ms[codec, level][split]
            coding = 0.0 if raw else self._coding_ms
            link_ms = up_ms + down_ms + RPC_MS
            ms = front_ms + coding + link_ms + back_ms
            # Chunks follow each other through device, link and server: the slowest of the three paces them.
            stages = front_chunk, chunk_up_ms - self.link.rtt_ms / 2, back_chunk
            prefill = sum(stages) + (chunks - 1) * max(stages) + self.link.rtt_ms / 2
            ttft = CONNECT_ROUND_TRIPS * self.link.rtt_ms + prefill + down_ms + RPC_MS + self._server_head[back_bits]
            uncertainty = self._uncertainty(front_ms + coding, link_ms, back_ms)
            for kv_bits in KV_BITS:
                kl, error = self._drop(split, front_bits, back_bits, kv_bits, codec, level)
                candidate = Candidate(
                    mode="split",
                    split=split,
                    front_bits=front_bits,
                    back_bits=back_bits,
                    kv_bits=kv_bits,
                    codec=codec,
                    level=-1 if level is None else level,
                    draft_length=0,
                    memory_mb=self._memory_at[split, front_bits, kv_bits],
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
                if kv_bits == 32:
                    alone = alone or self._alone_ms(split, front_bits, back_bits)
                    yield from self._hand_overs(candidate, alone)

    def _hand_overs(self, split: Candidate, alone_ms: tuple[float, float]) -> Iterator[Candidate]:
        """The same cut, begun on the device alone; ``alone_ms`` is its first token and each later one there."""
        new = self.limits
        first_ms, token_ms = alone_ms
        for share in HAND_OVERS:
            position = new.prompt_tokens + round(share * (new.context - new.prompt_tokens))
            alone_share = (position - new.prompt_tokens) / max(new.context - new.prompt_tokens, 1)
            behind = self.arch.layers - split.split
            moved_bits = self._prefill_bits[split.codec, _level(split)][split.split]
            hidden = position * self.arch.d_model * moved_bits / 8
            # The cache of the layers behind the split, and the hidden state of the token during which it goes.
            cache = self._footprint.kv_bytes(behind, 8 if moved_bits < 32 else 32, position) + self.arch.d_model * 4
            rebuilt = behind * self._rebuild_ms(split.back_bits, position)
            for send, bytes_, rebuild_ms in (("hidden", hidden, rebuilt), ("kv", cache, 0.0)):
                moving = CONNECT_ROUND_TRIPS * self.link.rtt_ms + self._transfer(bytes_, up=True)
                moving += rebuild_ms + split.ms_per_token
                steps = max(new.context - new.prompt_tokens, 1)
                yield replace(
                    split,
                    mode="hand-over",
                    memory_mb=self._whole_memory(split, position),
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
        speed, new, behind = self._device_speed, self.limits, self.arch.layers - split
        head = speed.head(default_head_bits(back_bits))
        first = split * self._front_prefill[front_bits] + behind * speed.prefill_layer(back_bits, new.prompt_tokens)
        later = split * self._front[front_bits] + behind * speed.decode_layer(back_bits, new.context)
        return first + head, later + speed.calls(split) + speed.calls(behind) + head

    # What the grid shares.

    @cached_property
    def _footprint(self) -> Footprint:
        return Footprint(self.arch)

    @cached_property
    def _device_speed(self) -> MachineSpeed:
        return MachineSpeed(self.device, self._footprint, self.threads)

    @cached_property
    def _server_speed(self) -> MachineSpeed:
        if self.server is None:
            raise PlanError("no server is given, and this candidate needs one")
        return MachineSpeed(self.server, self._footprint, sharing=self.limits.sessions)

    @cached_property
    def _front(self) -> dict[int, float]:
        return {bits: self._device_speed.decode_layer(bits, self.limits.context) for bits in FRONT_BITS}

    @cached_property
    def _back(self) -> dict[int, float]:
        return {bits: self._server_speed.decode_layer(bits, self.limits.context) for bits in BACK_BITS}

    @cached_property
    def _front_prefill(self) -> dict[int, float]:
        return {bits: self._device_speed.prefill_layer(bits, self.limits.prompt_tokens) for bits in FRONT_BITS}

    @cached_property
    def _back_prefill(self) -> dict[int, float]:
        return {bits: self._server_speed.prefill_layer(bits, self.limits.prompt_tokens) for bits in BACK_BITS}

    @cached_property
    def _server_head(self) -> dict[int, float]:
        return {bits: self._server_speed.head(default_head_bits(bits)) for bits in BACK_BITS}

    @cached_property
    def _coding_ms(self) -> float:
        return self._device_speed.codec(encode=True) + self._server_speed.codec(encode=False)

    @cached_property
    def _levels(self) -> list[tuple[str, int | None, bool]]:
        """Codec, level, and whether it is a plain copy."""
        return [(codec, level, codec.startswith("raw")) for codec, level in self.accuracy.codec_levels()]

    @cached_property
    def _sent(self) -> dict[tuple[str, int | None], dict[int, float]]:
        """Bytes of one decoded token's step by split."""
        return {
            (codec, level): {
                split: FRAMING_BYTES
                + self.arch.d_model * self.accuracy.codec_bits(split, codec, level, decode=True) / 8
                for split in range(1, self.arch.layers)
            }
            for codec, level, _ in self._levels
        }

    @cached_property
    def _prefill_bits(self) -> dict[tuple[str, int | None], dict[int, float]]:
        """Bits per element in frames of a prefill, by split."""
        return {
            (codec, level): {
                split: self.accuracy.codec_bits(split, codec, level, decode=False)
                for split in range(1, self.arch.layers)
            }
            for codec, level, _ in self._levels
        }

    @cached_property
    def _up_ms(self) -> dict[tuple[str, int | None], dict[int, tuple[float, float]]]:
        """Times up of one token's step and of one prefill chunk's, by split."""
        chunk = min(CHUNK, self.limits.prompt_tokens)

        def times(codec: str, level: int | None, split: int) -> tuple[float, float]:
            chunk_bytes = chunk * self.arch.d_model * self._prefill_bits[codec, level][split] / 8
            one = self._transfer(self._sent[codec, level][split], up=True)
            return one, self._transfer(FRAMING_BYTES + chunk_bytes, up=True)

        return {
            (codec, level): {split: times(codec, level, split) for split in range(1, self.arch.layers)}
            for codec, level, _ in self._levels
        }

    @cached_property
    def _memory_at(self) -> dict[tuple[int, int, int], float]:
        return {
            (split, bits, kv_bits): self._device_memory(((split, bits),), kv_bits, None)
            for split in range(1, self.arch.layers)
            for bits in FRONT_BITS
            for kv_bits in KV_BITS
        }

    @cached_property
    def _drops(self) -> dict[tuple[object, ...], tuple[float, float]]:
        return {}

    def _drop(
        self, split: int, front: int, back: int, kv_bits: int, codec: str, level: int | None
    ) -> tuple[float, float]:
        """KL and its error as sums over weights, cache and codec; the errors add up, for their common part."""
        drop = self.accuracy.drop

        def part(key: tuple[object, ...], measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
            if key not in self._drops:
                self._drops[key] = measure()
            return self._drops[key]

        def beyond_float(**options: Any) -> tuple[float, float]:
            base, _ = drop(split=split, front_bits=32, back_bits=32)
            kl, error = drop(split=split, front_bits=32, back_bits=32, **options)
            return kl - base, error

        parts = (
            part(("weights", split, front, back), lambda: drop(split=split, front_bits=front, back_bits=back)),
            part(("kv", split, kv_bits), lambda: beyond_float(front_kv_bits=kv_bits)),
            part(("codec", split, codec, level), lambda: beyond_float(codec=codec, level=level)),
        )
        return sum(kl for kl, _ in parts), sum(error for _, error in parts)

    def _device_memory(self, layers: tuple[tuple[int, int], ...], kv_bits: int, head_bits: int | None) -> float:
        """Peak of the device's process with runs of (layers, bits), and the head if it runs there."""
        count = sum(number for number, _ in layers)
        kv_bytes = self._footprint.kv_bytes(count, kv_bits, self.limits.context)
        return self._memory(layers, kv_bytes, head_bits, chunk=CHUNK, tokenizer=True)

    def _server_memory(self, layers: int, bits: int, head_bits: int) -> float:
        key = layers, bits, head_bits
        if key not in self._server_memories:
            kv_bytes = self.limits.sessions * self._footprint.kv_bytes(layers, 32, self.limits.context)
            self._server_memories[key] = self._memory(((layers, bits),), kv_bytes, head_bits, SERVER_CHUNK, False)
        return self._server_memories[key]

    @cached_property
    def _server_memories(self) -> dict[tuple[int, int, int], float]:
        return {}

    def _whole_memory(self, split: Candidate, position: int) -> float:
        """Peak of a device that holds all layers, those behind the split with a cache up to the hand-over."""
        key = split.split, split.front_bits, split.back_bits, position
        if key not in self._whole_memories:
            behind = self.arch.layers - split.split
            layers = (split.split, split.front_bits), (behind, split.back_bits)
            kv_bytes = self._footprint.kv_bytes(split.split, 32, self.limits.context)
            kv_bytes += self._footprint.kv_bytes(behind, 32, position)
            head_bits = default_head_bits(split.back_bits)
            self._whole_memories[key] = self._memory(layers, kv_bytes, head_bits, CHUNK, True)
        return self._whole_memories[key]

    def _rebuild_ms(self, bits: int, position: int) -> float:
        """One layer of the server over the hidden states of so many positions."""
        if (bits, position) not in self._rebuilds:
            self._rebuilds[bits, position] = self._server_speed.prefill_layer(bits, position)
        return self._rebuilds[bits, position]

    @cached_property
    def _rebuilds(self) -> dict[tuple[int, int], float]:
        return {}

    @cached_property
    def _whole_memories(self) -> dict[tuple[int, int, int, int], float]:
        return {}

    def _memory(
        self, layers: tuple[tuple[int, int], ...], kv_bytes: int, head_bits: int | None, chunk: int, tokenizer: bool
    ) -> float:
        arch, footprint = self.arch, self._footprint
        count = sum(number for number, _ in layers)
        graphs = [
            footprint.layer_weights[bits] * min(LAYERS_PER_BLOCK, number - first)
            for number, bits in layers
            for first in range(0, number, LAYERS_PER_BLOCK)
        ]
        if head_bits is not None:
            graphs.append(footprint.head_weights[head_bits])
        needs = MemoryNeeds(
            graphs=tuple(graphs),
            kv_bytes=kv_bytes,
            positions=self.limits.context,
            chunk=chunk,
            d_model=arch.d_model,
            d_ff=arch.d_ff,
            qkv_width=footprint.qkv_width,
            vocab_size=arch.vocab_size if head_bits is not None else 0,
            tokenizer_size=arch.vocab_size if tokenizer else 0,
            tables_bytes=TABLE_MATRICES * 4 * arch.d_model**2 if 0 < count < arch.layers else 0,
        )
        return estimate_memory(needs).total_mb

    def _transfer(self, bytes_: float, *, up: bool) -> float:
        return self.link.transfer_ms(bytes_ + PACKET_BYTES, up=up)

    def _uncertainty(self, device_ms: float, link_ms: float, server_ms: float) -> float:
        server = self.server.uncertainty if self.server is not None else 0.0
        errors = self.device.uncertainty * device_ms, LINK_UNCERTAINTY * link_ms, server * server_ms
        return math.hypot(*errors) / max(device_ms + link_ms + server_ms, 1e-9)


def _rank(candidate: Candidate) -> tuple[int, float, float]:
    return (round(math.log(candidate.ms_per_token) / SAME_TIME), candidate.drop, candidate.memory_mb)


def _level(candidate: Candidate) -> int | None:
    return None if candidate.level < 0 else candidate.level
