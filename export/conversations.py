"""Conversations that a split model writes, with what its layers compute on the way: what a draft is trained on.

Many sequences advance together, a token each per step. A sequence answers prompt after prompt until its window is full,
so that no step is wasted on one that has ended; half of them choose greedily, half sample.
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
TEMPERATURE = 0.8

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
        self, chat: ChatFormat, prompts: Iterator[Sequence[int]], rng: np.random.Generator, progress: Progress = silent
    ) -> Conversations:
        """One group of `SEQUENCES` conversations of `WINDOW` tokens.

        Args:
            chat: the model's format.
            prompts: ids of prompts; taken as they are needed.
            rng: samples.
            progress: called after each position.
        """
        shape = SEQUENCES, WINDOW
        ids, written = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        hidden = np.zeros((*shape, self.arch.d_model), np.float16)
        final = np.zeros_like(hidden)
        given = [[*chat.opening, *next(prompts), *chat.to_answer] for _ in range(SEQUENCES)]
        answered = np.zeros(SEQUENCES, np.int64)
        temperature = np.where(np.arange(SEQUENCES) % 2, np.float32(TEMPERATURE), np.float32(1e-6))[:, None]
        front, back = self._front.session(SEQUENCES), self._back.session(SEQUENCES)
        chosen = np.zeros(SEQUENCES, np.int64)
        for position in range(WINDOW):
            for row, pending in enumerate(given):
                if pending:
                    ids[row, position] = pending.pop(0)
                    continue
                ids[row, position], written[row, position] = chosen[row], True
                answered[row] += 1
                ended = chosen[row] in chat.end_tokens
                if ended or answered[row] >= ANSWER_TOKENS:
                    between = list(chat.to_prompt)
                    if ended and between[:1] == [chosen[row]]:
                        del between[0]
                    given[row] = [*between, *next(prompts), *chat.to_answer]
                    answered[row] = 0
            at_split = front.step(self._table[ids[:, position]])
            hidden[:, position] = at_split
            last = back.step(at_split)
            final[:, position] = last
            logits = self._head.logits(last) / temperature
            noise = rng.exponential(size=logits.shape).astype(np.float32)
            chosen = (logits - np.log(noise, out=noise)).argmax(axis=1)
            progress("writing conversations", position + 1, WINDOW)
        return Conversations(ids, written, hidden, final)
