"""Conversations that a split model writes, with what its layers compute on the way: what a draft is trained on.

Many sequences advance together, a token each per step. A sequence answers prompt after prompt until its window is full,
so that no step is wasted on one that has ended; half of them choose greedily, half sample. A prompt is given, or the
model writes it itself: what it samples where a user would speak is of the kinds that it was trained on (Magpie, arXiv
2406.08464).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ..quant.opsc import Precision
from ..runtime.bundle import Architecture, Manifest
from .batched import BatchedHead, BatchedLayers
from .checkpoint import Checkpoint
from .progress import Progress, silent
from .weights import Weights

SEQUENCES = 64
WINDOW = 512
ANSWER_TOKENS = 224  # then the next prompt comes; small models begin to repeat themselves
PROMPT_TOKENS = 160  # of a prompt that the model writes, at most
TEMPERATURE, PROMPT_TEMPERATURE = 0.8, 1.0

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Conversations:
    """What a group of sequences said.

    Attributes:
        ids: int32 ``[sequences, window]``.
        written: bool ``[sequences, window]``: the model chose the id.
        hidden: float16 ``[sequences, window, d_model]``, at the split.
        final: float16 ``[sequences, window, d_model]``, after the last layer.
    """

    ids: NDArray[np.int32]
    written: NDArray[np.bool_]
    hidden: NDArray[np.float16]
    final: NDArray[np.float16]

    def save(self, path: Path) -> None:
        """Write them in one step."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Conversations:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{field.name: file[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class ChatFormat:
    """Ids that come before a conversation's first prompt, after each prompt, and between an answer and a prompt."""

    opening: Sequence[int]
    to_answer: Sequence[int]
    to_prompt: Sequence[int]
    end_tokens: Sequence[int]


class Writer:
    """The split model, to write with.

    Args:
        folder: for its graphs; needed as long as this lives.
        manifest: of the bundle, whose precisions the weights get; calibrated ones, which cannot be made again here,
            get 8 bits.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, family: ModuleType, manifest: Manifest) -> None:
        self.arch: Architecture = manifest.architecture
        precisions = {
            name: Precision(record.bits, record.block_size, record.method, record.symmetric)
            if record.method not in ("gptq", "float")
            else Precision(8, 32)
            for segment in manifest.segments
            for name, record in segment.tensors.items()
        }
        weights = Weights(checkpoint, precisions.__getitem__)
        layers = self.arch.layers
        self._front, self._back = (
            BatchedLayers(folder, weights, family, self.arch, span, capacity=WINDOW)
            for span in (range(manifest.split), range(manifest.split, layers))
        )
        self._head = BatchedHead(folder, weights, self.arch)
        self._table = weights.embedding()

    def write(
        self,
        chat: ChatFormat,
        prompts: Iterator[Sequence[int] | None],
        rng: np.random.Generator,
        progress: Progress = silent,
    ) -> Conversations:
        """One group of `SEQUENCES` conversations of `WINDOW` tokens.

        Args:
            chat: the model's format.
            prompts: ids of prompts, None for one that the model writes; taken as they are needed.
            rng: samples.
            progress: called after each position.
        """
        shape = SEQUENCES, WINDOW
        ids, written = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        hidden = np.zeros((*shape, self.arch.d_model), np.float16)
        final = np.zeros_like(hidden)
        speakers = [Speaker(chat, prompts, TEMPERATURE if row % 2 else 0.0) for row in range(SEQUENCES)]
        front, back = self._front.session(SEQUENCES), self._back.session(SEQUENCES)
        chosen = np.zeros(SEQUENCES, np.int64)
        for position in range(WINDOW):
            for row, speaker in enumerate(speakers):
                ids[row, position], written[row, position] = speaker.next(int(chosen[row]))
            at_split = front.step(self._table[ids[:, position]])
            hidden[:, position] = at_split
            last = back.step(at_split)
            final[:, position] = last
            chosen = choose(self._head.logits(last), [speaker.temperature for speaker in speakers], rng)
            progress("writing conversations", position + 1, WINDOW)
        return Conversations(ids, written, hidden, final)


def choose(logits: Floats, temperatures: Sequence[float], rng: np.random.Generator) -> NDArray[np.int64]:
    """A token for each row of logits ``[rows, vocab_size]``: the most probable at temperature 0, else a sampled one."""
    chosen = logits.argmax(axis=1)
    warm = np.flatnonzero(temperatures)
    if len(warm):
        above = logits[warm] - logits[warm].max(axis=1, keepdims=True)
        above /= np.array(temperatures, np.float32)[warm, None]
        reached = np.exp(above, out=above).cumsum(axis=1, dtype=np.float64)
        drawn = rng.random(len(warm)) * reached[:, -1]
        chosen[warm] = [np.searchsorted(row, place, "right") for row, place in zip(reached, drawn, strict=True)]
    return chosen


class Speaker:
    """One sequence's turns: what comes next in it, the model's choice or what is given."""

    def __init__(self, chat: ChatFormat, prompts: Iterator[Sequence[int] | None], temperature: float) -> None:
        self._chat, self._prompts, self._answer_temperature = chat, prompts, temperature
        self._given = list(chat.opening)
        self._turn = 0  # tokens chosen in it
        self._prompting = False
        self._ask()

    @property
    def temperature(self) -> float:
        """Of the next choice."""
        return PROMPT_TEMPERATURE if self._prompting else self._answer_temperature

    def next(self, chosen: int) -> tuple[int, bool]:
        """The next id, and whether it is part of an answer; ``chosen`` is what the model would say."""
        if self._given:
            return self._given.pop(0), False
        self._turn += 1
        ended = chosen in self._chat.end_tokens
        answer = not self._prompting
        if answer and (ended or self._turn == ANSWER_TOKENS):
            self._give(self._chat.to_prompt, after=chosen)
            self._ask()
        elif not answer and (ended or self._turn == PROMPT_TOKENS):
            self._give(self._chat.to_answer, after=chosen)
            self._prompting = False
        return chosen, answer

    def _ask(self) -> None:
        prompt = next(self._prompts)
        self._prompting = prompt is None
        if prompt is not None:
            self._given += [*prompt, *self._chat.to_answer]

    def _give(self, between: Sequence[int], after: int) -> None:
        """What stands between two turns; a turn's end may have been chosen already."""
        self._turn = 0
        self._given = list(between[1:] if between[:1] == [after] else between)
