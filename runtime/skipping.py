"""What generated tokens leave out: blocks of layers by their place in the text, and single feed-forward networks.

Skip decoding. Source: SkipDecode (arXiv 2307.02628), whose budget of layers falls linearly over the generated tokens
(there ``E(t) = round((1 - r) E_max + r E_min)``, ``r = t / T``) and is the same for all texts at that place. It never
rises, so that every layer that a token runs has run for all tokens before it: no key or value is ever missing. The
prompt runs at full depth. Ours: what is left out are whole blocks, the graphs of a bundle, so that the budget is the
least number of layers that run; which of them go first is measured when they are exported (`bypass_order`) in place
of "from the bottom up"; the first and the last block always run; and nothing was trained for it.

Networks: see `isthmus.export.feed_forward`, whose graphs decide by a threshold for each row. The prompt and the text's
first positions run whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .bundle import FFN_ALL, Manifest

FFN_WARM_UP = 30  # positions of a text; the paper's benefit saturates at 25 to 30 tokens


@dataclass(frozen=True)
class Bypass:
    """What the positions of a session leave out.

    Attributes:
        blocks: of each block that is left out, by its first layer, the position from which on.
        ffn_similarity: the cosine from which on the next feed-forward network is left out; None runs all.
        ffn_from: the first position of which networks may be left out.
    """

    blocks: Mapping[int, int] = field(default_factory=dict)
    ffn_similarity: float | None = None
    ffn_from: int = 0

    def ffn_thresholds(self, position: int, tokens: int) -> NDArray[np.float32]:
        """Of each of some positions, the graphs' input `FFN_SIMILARITY`."""
        thresholds = np.full(tokens, FFN_ALL, np.float32)
        if self.ffn_similarity is not None:
            thresholds[max(0, self.ffn_from - position) :] = self.ffn_similarity
        return thresholds


NO_BYPASS = Bypass()


@dataclass(frozen=True)
class SkipSchedule:
    """A budget of layers for each generated token.

    Attributes:
        most: of the first one.
        least: of those from ``tokens`` on.
        tokens: over which it falls.
    """

    most: int
    least: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> SkipSchedule:
        """Read ``MOST:LEAST:TOKENS``; raises `RequestError` if it is something else."""
        try:
            most, least, tokens = map(int, text.split(":"))
        except ValueError as error:
            raise RequestError(
                f"skip schedule {text!r}: must be MOST:LEAST:TOKENS, as in 30:24:128 (from 30 layers down to 24 over "
                "128 tokens)"
            ) from error
        return cls(most, least, tokens)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise RequestError(f"skip schedule {self}: layers must fall, and stay above 0, as in 30:24:128")
        if self.tokens < 1:
            raise RequestError(f"skip schedule {self}: it needs at least one token to fall over")

    def __str__(self) -> str:
        return f"{self.most}:{self.least}:{self.tokens}"

    def budget(self, token: int) -> int:
        """Least layers of a generated token, the first one being 0."""
        share = min(1.0, token / self.tokens)
        return round((1 - share) * self.most + share * self.least)

    def blocks(self, order: Sequence[range], layers: int, prompt_tokens: int) -> dict[int, int]:
        """Where each block begins to be left out, see `Bypass`.

        Args:
            order: blocks that may be, the one that matters least first, see `bypass_order`.
            layers: of the whole model.
            prompt_tokens: positions that run at full depth.

        Raises:
            RequestError: the schedule is for a deeper model, its last budget is too small for the blocks that must run,
                or too large for any to be left out.
        """
        if self.most > layers:
            raise RequestError(f"skip schedule {self}: the model has {layers} layers; begin with as many or fewer")
        if layers - sum(map(len, order)) > self.least:
            raise RequestError(
                f"skip schedule {self}: {layers - sum(map(len, order))} of {layers} layers always run in this bundle; "
                "end with as many or more, or export smaller blocks (--layers-per-block 1)"
            )
        first = len(order[0])
        if self.least < layers < self.least + first:
            raise RequestError(
                f"skip schedule {self}: nothing is ever left out, the block that goes first has {first} layers; end "
                f"with {layers - first} or fewer, or export smaller blocks (--layers-per-block 1)"
            )
        blocks: dict[int, int] = {}
        running, token = layers, 0
        for block in order:
            while self.budget(token) > running - len(block):
                if token == self.tokens:
                    return blocks
                token += 1
            blocks[block.start] = prompt_tokens + token
            running -= len(block)
        return blocks


def checked_similarity(similarity: float, manifest: Manifest) -> float:
    """A threshold that networks may be left out by; raises `RequestError` unless it is one, and the bundle can."""
    if not 0.0 < similarity <= 1.0:
        raise RequestError(f"ffn skip {similarity:g}: must be a cosine above 0, and 1 at most, as in 0.98")
    if not manifest.skips_ffn:
        raise RequestError(
            "ffn skip: this bundle's graphs run every feed-forward network; export it again with --ffn-skip"
        )
    return similarity


def bypass_order(manifest: Manifest) -> list[range]:
    """The blocks that may be left out, the one that matters least first, as export has measured it.

    Raises:
        RequestError: the bundle has too few blocks, or was exported before that was measured.
    """
    measured: Mapping[str, float] = manifest.validation.get("influence", {})
    blocks = [segment for segment in manifest.segments if segment.kind == "block"]
    if len(blocks) < 3:
        raise RequestError(
            f"skip schedule: this bundle has {len(blocks)} blocks, of which the first and the last always run; export "
            "smaller ones (--layers-per-block 2)"
        )
    inner = blocks[1:-1]
    if any(block.name not in measured for block in inner):
        raise RequestError("skip schedule: this bundle was exported before blocks were weighed; export it again")
    inner.sort(key=lambda block: measured[block.name] / (block.last_layer - block.first_layer))
    return [range(block.first_layer, block.last_layer) for block in inner]


def halves(bypass: Bypass, split: int) -> tuple[Bypass, Bypass]:
    """What concerns the layers before the split, and those behind it."""
    front = {layer: position for layer, position in bypass.blocks.items() if layer < split}
    back = {layer: position for layer, position in bypass.blocks.items() if layer >= split}
    return replace(bypass, blocks=front), replace(bypass, blocks=back)


def running_layers(bypass: Bypass, manifest: Manifest, position: int) -> int:
    """Layers that the token at a position goes through."""
    skipped = (
        segment.last_layer - segment.first_layer
        for segment in manifest.segments
        if segment.kind == "block" and bypass.blocks.get(segment.first_layer, position + 1) <= position
    )
    return manifest.architecture.layers - sum(skipped)


def running_blocks(bypass: Bypass, starts: Sequence[int], position: int) -> tuple[int, ...]:
    """Which of some blocks, given their first layers, a position runs through."""
    return tuple(index for index, start in enumerate(starts) if bypass.blocks.get(start, position + 1) > position)


def stretches(bypass: Bypass, position: int, tokens: int) -> Iterator[slice]:
    """Cut rows ``[0, tokens)`` from a position on where blocks begin to be left out."""
    ends = sorted({start - position for start in bypass.blocks.values() if position < start < position + tokens})
    for first, end in zip([0, *ends], [*ends, tokens], strict=True):
        yield slice(first, end)
