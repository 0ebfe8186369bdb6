"""How long a device takes for layers, prefill and head, from its profile.

A call of a graph takes ``call_us``, ``op_us`` for each operator, and bytes or operations over the profile's rates:
decoding reads every weight once a token and every cached key and value; a prefill multiplies. What lies between, such
as a few tokens at once, is the larger of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..devices.profile import DeviceProfile
from .draft_costs import DraftFigures
from .footprint import OPERATORS_PER_LAYER, Footprint

CHUNK = 128  # tokens of a prefill's chunk
LAYERS_PER_BLOCK = 10
KLT_VALUE_US = 0.09, 0.07  # encode and decode of one value by `klt`, beside an operator's 5.5 µs: 51 and 39 µs at 576
_REFERENCE_OP_US = 5.5  # of the processor on which that was measured
_HEAD_OPERATORS = 3


@dataclass(frozen=True)
class MachineSpeed:
    """One machine with one model. Times are in ms, with ``profile.threads`` threads unless said otherwise.

    Attributes:
        threads: fewer than the profile's, by its thread scaling; None for all.
        sharing: generations whose steps it computes one after the other, so that each waits for the others.
    """

    profile: DeviceProfile
    footprint: Footprint
    threads: int | None = None
    sharing: int = 1

    @cached_property
    def _slower(self) -> float:
        scaling = self.profile.thread_scaling
        threads = len(scaling) if self.threads is None else min(self.threads, len(scaling))
        return self.sharing * scaling[-1] / scaling[threads - 1]

    @cached_property
    def _operator_ms(self) -> float:
        return self.sharing * self.profile.op_us / 1e3

    @cached_property
    def _call_ms(self) -> float:
        return self.sharing * self.profile.call_us / 1e3

    def decode_layer(self, bits: int, length: int) -> float:
        """One token through one layer, attending to ``length`` positions."""
        weights = self.footprint.layer_bytes[bits] / self._decode_rate(bits)
        # Decoding over a quantized cache takes as long as over a float one: it is dequantized on the way.
        cache = self.footprint.kv_bytes(1, 32, length)
        attention = cache / (self.profile.attention_gb_s * 1e9)
        return 1e3 * (weights + attention) * self._slower + OPERATORS_PER_LAYER * self._operator_ms

    def prefill_layer(self, bits: int, tokens: int, start: int = 0) -> float:
        """So many tokens through one layer, in chunks, after ``start`` positions."""
        if tokens == 0:
            return 0.0
        arch = self.footprint.arch
        gflops = self.profile.prefill_gflops[_computed(bits)]
        products = 2 * self.footprint.layer_parameters * tokens / (gflops * 1e9)
        chunks = -(-tokens // CHUNK)
        reading = chunks * self.footprint.layer_bytes[bits] / self._decode_rate(bits)
        pairs = tokens * (start + (tokens + 1) / 2)
        attention = 4 * arch.heads * arch.head_dim * pairs / (self.profile.attention_gflops * 1e9)
        operators = chunks * OPERATORS_PER_LAYER * self._operator_ms
        return 1e3 * (max(products, reading) + attention) * self._slower + operators

    def head(self, bits: int) -> float:
        """Logits of one token, and the choice among them."""
        reading = self.footprint.head_weights[bits][0].bytes / self._decode_rate(bits)
        choosing = 4 * self.footprint.arch.vocab_size / (self.profile.bandwidth_gb_s * 1e9)
        return 1e3 * (reading + choosing) * self._slower + _HEAD_OPERATORS * self._operator_ms + self._call_ms

    def guess(self, draft: DraftFigures, length: int) -> float:
        """One guess of a draft after ``length`` positions: its layer, its head, and the choice."""
        layer, head = draft.weights(self.footprint)
        reading = sum(weight.bytes / self._decode_rate(weight.bits) for weight in (*layer, *head))
        reading += self.footprint.kv_bytes(1, 32, length) / (self.profile.attention_gb_s * 1e9)
        operators = OPERATORS_PER_LAYER + 1 + _HEAD_OPERATORS
        return 1e3 * reading * self._slower + operators * self._operator_ms + 2 * self._call_ms

    def calls(self, layers: int) -> float:
        """Fixed cost of the calls of so many layers' blocks."""
        return -(-layers // LAYERS_PER_BLOCK) * self._call_ms

    def codec(self, *, encode: bool, tokens: int = 1) -> float:
        """Encoding or decoding hidden states with `klt`."""
        values = tokens * self.footprint.arch.d_model
        return KLT_VALUE_US[0 if encode else 1] * values * self._operator_ms / _REFERENCE_OP_US

    def _decode_rate(self, bits: int) -> float:
        return self.profile.decode_gb_s[_computed(bits)] * 1e9 * (16 / 32 if bits == 16 else 1)


def _computed(bits: int) -> int:
    """16-bit weights are computed in float32."""
    return 32 if bits == 16 else bits
