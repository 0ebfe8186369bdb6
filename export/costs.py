"""What the candidates of a plan are added up from: times, bytes, memory and drops of single parts, each computed once.

Times come from device profiles (`isthmus.export.latency`), drops from measurements (`isthmus.export.accuracy`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..devices.budget import GRAPH_MB, JOURNAL_BYTES, STEP_BYTES, MemoryNeeds, estimate_memory
from ..devices.link import LinkProfile
from ..devices.profile import DeviceProfile
from ..errors import PlanError
from ..runtime.bundle import Architecture
from .accuracy import AccuracyTable
from .draft_costs import DraftFigures
from .footprint import Footprint, default_head_bits
from .latency import CHUNK, LAYERS_PER_BLOCK, MachineSpeed
from .limits import Limits
from .plan import Candidate

FRONT_BITS = BACK_BITS = (2, 4, 8, 16, 32)
KV_BITS = (32, 8, 4)
SERVER_CHUNK = 512  # tokens of the largest frame that a server takes
CRC_FIELD, SAMPLE_FIELD = 5, 2  # bytes
PACKET_BYTES = 90  # of TLS, HTTP/2, TCP and IP around a step or its answer
LINK_UNCERTAINTY = 0.1
TABLE_MATRICES = 3  # of d_model squared, which a calibrated codec keeps in memory


@dataclass(frozen=True)
class Costs:
    """Parts of all candidates for one model, device, link and server.

    Attributes:
        drafts: trained for the model, by the split whose hidden states they read.
        threads: of the device; None for all that its profile has figures for.
    """

    arch: Architecture
    accuracy: AccuracyTable
    device: DeviceProfile
    link: LinkProfile
    server: DeviceProfile | None
    limits: Limits
    threads: int | None = None
    drafts: Mapping[int, DraftFigures] = field(default_factory=dict)

    @cached_property
    def footprint(self) -> Footprint:
        """Sizes of the model's parts."""
        return Footprint(self.arch)

    @cached_property
    def device_speed(self) -> MachineSpeed:
        """Times on the device."""
        return MachineSpeed(self.device, self.footprint, self.threads)

    @cached_property
    def server_speed(self) -> MachineSpeed:
        """Times on the server; raises `PlanError` without one."""
        if self.server is None:
            raise PlanError("no server is given, and this candidate needs one")
        return MachineSpeed(self.server, self.footprint, sharing=self.limits.sessions)

    @cached_property
    def front(self) -> dict[int, float]:
        """Ms of one token at full context through one layer on the device, by its bits."""
        return {bits: self.device_speed.decode_layer(bits, self.limits.context) for bits in FRONT_BITS}

    @cached_property
    def back(self) -> dict[int, float]:
        """Ms of one token at full context through one layer on the server, by its bits."""
        return {bits: self.server_speed.decode_layer(bits, self.limits.context) for bits in BACK_BITS}

    @cached_property
    def front_prefill(self) -> dict[int, float]:
        """Ms of the prompt through one layer on the device, by its bits."""
        return {bits: self.device_speed.prefill_layer(bits, self.limits.prompt_tokens) for bits in FRONT_BITS}

    @cached_property
    def back_prefill(self) -> dict[int, float]:
        """Ms of the prompt through one layer on the server, by its bits."""
        return {bits: self.server_speed.prefill_layer(bits, self.limits.prompt_tokens) for bits in BACK_BITS}

    @cached_property
    def server_head(self) -> dict[int, float]:
        """Ms of the head on the server, by the bits of the layers before it."""
        return {bits: self.server_speed.head(default_head_bits(bits)) for bits in BACK_BITS}

    @cached_property
    def coding_ms(self) -> float:
        """Ms of encoding and decoding one token."""
        return self.device_speed.codec(encode=True) + self.server_speed.codec(encode=False)

    @cached_property
    def levels(self) -> list[tuple[str, int | None, bool]]:
        """Codec, level, and whether it is a plain copy."""
        return [(codec, level, codec.startswith("raw")) for codec, level in self.accuracy.codec_levels()]

    @cached_property
    def sent(self) -> dict[tuple[str, int | None], dict[int, float]]:
        """Bytes of one decoded token's step by split."""
        return {
            (codec, level): {
                split: self.step_bytes(
                    self.arch.d_model * self.accuracy.codec_bits(split, codec, level, decode=True) / 8
                )
                for split in range(1, self.arch.layers)
            }
            for codec, level, _ in self.levels
        }

    @cached_property
    def prefill_bits(self) -> dict[tuple[str, int | None], dict[int, float]]:
        """Bits per element in frames of a prefill, by split."""
        return {
            (codec, level): {
                split: self.accuracy.codec_bits(split, codec, level, decode=False)
                for split in range(1, self.arch.layers)
            }
            for codec, level, _ in self.levels
        }

    @cached_property
    def up_ms(self) -> dict[tuple[str, int | None], dict[int, tuple[float, float]]]:
        """Times up of one token's step and of one prefill chunk's, by split."""
        chunk = min(CHUNK, self.limits.prompt_tokens)

        def times(codec: str, level: int | None, split: int) -> tuple[float, float]:
            chunk_bytes = chunk * self.arch.d_model * self.prefill_bits[codec, level][split] / 8
            one = self.transfer(self.sent[codec, level][split], up=True)
            return one, self.transfer(self.step_bytes(chunk_bytes, tokens=chunk), up=True)

        return {
            (codec, level): {split: times(codec, level, split) for split in range(1, self.arch.layers)}
            for codec, level, _ in self.levels
        }

    @cached_property
    def memory_at(self) -> dict[tuple[int, int, int], float]:
        """Peak MB of a device with a front, by (split, bits, KV bits)."""
        return {
            (split, bits, kv_bits): self.device_memory(((split, bits),), kv_bits, None)
            for split in range(1, self.arch.layers)
            for bits in FRONT_BITS
            for kv_bits in KV_BITS
        }

    @cached_property
    def draft_mb(self) -> dict[int, float]:
        """What a draft takes of the device's memory: weights, cache, and the hidden states that it has not seen."""
        running = self.footprint.kv_bytes(1, 32, self.limits.context) + 4 * self.arch.d_model * self.limits.context

        def taken(draft: DraftFigures) -> float:
            weights = [weight for graph in draft.weights(self.footprint) for weight in graph]
            return 2 * GRAPH_MB + (sum(weight.prepacked_bytes for weight in weights) + running) / 1e6

        return {split: taken(draft) for split, draft in self.drafts.items()}

    @cached_property
    def guess_ms(self) -> dict[int, float]:
        """Ms of a draft's guess at full context."""
        return {split: self.device_speed.guess(draft, self.limits.context) for split, draft in self.drafts.items()}

    @cached_property
    def _drops(self) -> dict[tuple[object, ...], tuple[float, float]]:
        return {}

    def journal_mb(self, codec: str, level: int | None, split: int) -> float:
        """What the device keeps of sent steps, to make a lost session again."""
        prompt, context = self.limits.prompt_tokens, self.limits.context
        prompt_bytes = prompt * self.arch.d_model * self.prefill_bits[codec, level][split] / 8
        new_bytes = (context - prompt) * (self.sent[codec, level][split] + STEP_BYTES)
        return min(JOURNAL_BYTES, prompt_bytes + new_bytes) / 1e6

    def drop(
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

    def device_memory(self, layers: tuple[tuple[int, int], ...], kv_bits: int, head_bits: int | None) -> float:
        """Peak of the device's process with runs of (layers, bits), and the head if it runs there."""
        count = sum(number for number, _ in layers)
        kv_bytes = self.footprint.kv_bytes(count, kv_bits, self.limits.context)
        return self._memory(layers, kv_bytes, head_bits, chunk=CHUNK, tokenizer=True)

    def server_memory(self, layers: int, bits: int, head_bits: int) -> float:
        """Peak MB of a server with so many layers, the head and the sessions' caches."""
        key = layers, bits, head_bits
        if key not in self._server_memories:
            kv_bytes = self.limits.sessions * self.footprint.kv_bytes(layers, 32, self.limits.context)
            self._server_memories[key] = self._memory(((layers, bits),), kv_bytes, head_bits, SERVER_CHUNK, False)
        return self._server_memories[key]

    @cached_property
    def _server_memories(self) -> dict[tuple[int, int, int], float]:
        return {}

    def whole_memory(self, split: Candidate, position: int) -> float:
        """Peak of a device that holds all layers, those behind the split with a cache up to the hand-over."""
        key = split.split, split.front_bits, split.back_bits, position
        if key not in self._whole_memories:
            behind = self.arch.layers - split.split
            layers = (split.split, split.front_bits), (behind, split.back_bits)
            kv_bytes = self.footprint.kv_bytes(split.split, 32, self.limits.context)
            kv_bytes += self.footprint.kv_bytes(behind, 32, position)
            head_bits = default_head_bits(split.back_bits)
            self._whole_memories[key] = self._memory(layers, kv_bytes, head_bits, CHUNK, True)
        return self._whole_memories[key]

    def rebuild_ms(self, bits: int, position: int) -> float:
        """One layer of the server over the hidden states of so many positions."""
        if (bits, position) not in self._rebuilds:
            self._rebuilds[bits, position] = self.server_speed.prefill_layer(bits, position)
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
        arch, footprint = self.arch, self.footprint
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

    def step_bytes(self, payload: float, *, tokens: int = 1) -> float:
        """Of a step's message at the end of the context, with a payload of so many bytes."""
        steps = self.limits.context - self.limits.prompt_tokens
        frame = _field(tokens) + _field(payload) + payload + CRC_FIELD
        step = _field(steps) + _field(self.limits.context) + SAMPLE_FIELD + _field(frame) + frame
        return _field(step) + step

    def transfer(self, bytes_: float, *, up: bool) -> float:
        """Ms of so many bytes one way, packet headers added."""
        return self.link.transfer_ms(bytes_ + PACKET_BYTES, up=up)

    def uncertainty(self, device_ms: float, link_ms: float, server_ms: float) -> float:
        """Relative standard error of a time with these parts, which err independently."""
        server = self.server.uncertainty if self.server is not None else 0.0
        errors = self.device.uncertainty * device_ms, LINK_UNCERTAINTY * link_ms, server * server_ms
        return math.hypot(*errors) / max(device_ms + link_ms + server_ms, 1e-9)


def _field(value: float) -> int:
    """Bytes of a tag and a number, or a length, as protobuf writes them."""
    return 1 + max(1, -(-int(value).bit_length() // 7))
