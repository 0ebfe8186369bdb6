"""Training a draft on what its model wrote: knowledge distillation of the next token, and of the features behind it.

Loss: ``KL(model || draft)`` over the draft's vocabulary, the model's probabilities renormalised to it, plus smooth L1
between the normed features of both (EAGLE, arXiv 2401.15077, section 4.2, has a cross entropy and smooth L1). Only
tokens that the model chose count, for only those are drafted at run time.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .conversations import Conversations
from .draft_model import DraftModel
from .progress import Progress, silent

BATCH = 8  # sequences
FEATURE_WEIGHT = 0.5
LEARNING_RATE = 1.5e-3
WARM_UP = 50  # steps
CLIP = 1.0
AVERAGING = 0.995  # of the weights that are kept, an exponential mean over steps
MEASURE_EVERY = 100  # steps
PATIENCE = 8  # measurements without a better one

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Teacher:
    """What of the model the loss needs.

    Attributes:
        norm: float32 ``[d_model]``, of the final norm.
        epsilon: of that norm.
        head: float32 ``[draft vocabulary, d_model]``, the head's rows of the draft's ids.
        vocabulary: int64, those ids, rising.
    """

    norm: Floats
    epsilon: float
    head: Floats
    vocabulary: NDArray[np.int64]


@dataclass
class TrainingState:
    """Where a training is; saved and read back whole.

    Attributes:
        step: done.
        seconds: spent.
        curve: (step, seconds, agreement on the held-out conversations).
        best: weights of the best measurement.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    best: dict[str, Floats] = field(default_factory=dict)

    @property
    def agreement(self) -> float:
        """Of the best weights."""
        return max((agreement for _, _, agreement in self.curve), default=0.0)


def train(
    model: DraftModel,
    teacher: Teacher,
    texts: Sequence[Conversations],
    held_out: Conversations,
    *,
    minutes: float,
    seed: int,
    keep: Path,
    progress: Progress = silent,
) -> TrainingState:
    """Train until the time is over or the held-out agreement has stopped rising.

    Args:
        model: with its first weights.
        teacher: of the same model.
        texts: to train on.
        held_out: to measure on; only what was chosen greedily counts.
        minutes: of training, those before an interruption included.
        seed: of the order of the texts.
        keep: file of the state; if it is there, training goes on from it.
        progress: called after each step, with seconds.
    """
    norm, head = torch.from_numpy(teacher.norm), torch.from_numpy(teacher.head)
    average = {name: value.detach().clone() for name, value in model.weights.items()}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    state = TrainingState()
    if keep.exists():
        kept = torch.load(keep, weights_only=False)
        state = kept["state"]
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        average = kept["average"]

    def measure() -> None:
        """Note how well the averaged weights do, and keep everything."""
        current = {name: value.detach().clone() for name, value in model.weights.items()}
        _assign(model, average)
        agreement = agreement_of(model, teacher, held_out)
        if agreement > state.agreement or not state.best:
            state.best = {name: array.copy() for name, array in model.arrays().items()}
        state.curve.append((state.step, state.seconds, agreement))
        _assign(model, current)
        _save(keep, state, model, optimizer, average)

    sequences = [(group, row) for group, text in enumerate(texts) for row in range(len(text.ids))]
    per_epoch = len(sequences) // BATCH
    started = time.monotonic() - state.seconds
    while state.seconds < 60 * minutes:
        epoch, place = divmod(state.step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(sequences))
        batch = [sequences[index] for index in order[place * BATCH : (place + 1) * BATCH]]
        hidden = torch.from_numpy(np.stack([texts[group].hidden[row] for group, row in batch])).float()
        final = torch.from_numpy(np.stack([texts[group].final[row] for group, row in batch])).float()
        written = torch.from_numpy(np.stack([texts[group].written[row] for group, row in batch]))
        rate = LEARNING_RATE * min(1.0, (state.step + 1) / WARM_UP) * _cosine(state.seconds / (60 * minutes))
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        chosen = written.roll(-1, dims=1)
        chosen[:, -1] = False
        with torch.autocast("cpu", torch.bfloat16):
            features = model(hidden)[chosen]
            logits = model.logits(features)
            with torch.no_grad():
                target = functional.rms_norm(final[chosen], norm.shape, norm, teacher.epsilon)
                wanted = functional.linear(target, head).float().log_softmax(-1)
        divergence = functional.kl_div(logits.float().log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        distance = functional.smooth_l1_loss(features.float() / norm, target.float() / norm)
        loss = divergence + FEATURE_WEIGHT * distance
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        state.step += 1
        state.seconds = time.monotonic() - started
        weight = min(AVERAGING, state.step / (state.step + 10))
        with torch.no_grad():
            for name, value in model.weights.items():
                average[name].lerp_(value, 1 - weight)
        if state.step % MEASURE_EVERY == 0:
            measure()
            recent = [point[2] for point in state.curve[-PATIENCE:]]
            if len(state.curve) > PATIENCE and max(recent) < state.agreement:
                break
        progress(
            f"training: step {state.step}, loss {loss.item():.3f}, agreement {state.agreement:.3f}",
            min(round(state.seconds), round(60 * minutes)),
            round(60 * minutes),
        )
    if not state.curve or state.curve[-1][0] != state.step:
        measure()
    return state


@torch.no_grad()  # type: ignore[untyped-decorator]
def agreement_of(model: DraftModel, teacher: Teacher, held_out: Conversations) -> float:
    """Share of greedily chosen tokens that a draft guesses."""
    hits = total = 0
    for row in range(0, len(held_out.ids), 2):  # every other one samples
        chosen = np.flatnonzero(held_out.written[row, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            features = model(torch.from_numpy(held_out.hidden[row : row + 1]).float())[0, chosen]
            guesses = teacher.vocabulary[model.logits(features).argmax(-1).numpy()]
        hits += int((guesses == held_out.ids[row, chosen + 1]).sum())
        total += len(chosen)
    return hits / max(1, total)


def _cosine(share: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _assign(model: DraftModel, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.weights.items():
            value.copy_(weights[name])


def _save(
    path: Path, state: TrainingState, model: DraftModel, optimizer: Any, average: dict[str, torch.Tensor]
) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    kept = {"state": state, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
    torch.save(kept, partial)
    partial.replace(path)
