"""Training a draft on what its model wrote: knowledge distillation of the next token, and of the features behind it.

Loss: ``KL(model || draft)`` over the draft's vocabulary, the model's probabilities renormalised to it, and towards the
end TVD++ in its place; plus smooth L1 between the normed features of both (EAGLE, arXiv 2401.15077, section 4.2, has a
cross entropy and smooth L1). Only tokens that the model chose count, for only those are drafted at run time.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
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
TVD_SHARE = 0.3  # of the time, at its end: raises the overlap with sampled text, and leaves greedy agreement as it is

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


class Measurement(NamedTuple):
    """How good a draft is on held-out conversations.

    Attributes:
        step: of the training.
        seconds: of it.
        agreement: share of the tokens chosen greedily that the draft guesses.
        overlap: of the sampled ones, the mean sum of the lesser of both probabilities: the chance, at temperature 1,
            that the best coupling of both makes a guess right.
    """

    step: int
    seconds: float
    agreement: float
    overlap: float

    @property
    def score(self) -> float:
        """What training goes by: half of what is drafted for is greedy."""
        return (self.agreement + self.overlap) / 2


@dataclass
class TrainingState:
    """Where a training is; saved and read back whole.

    Attributes:
        step: done.
        seconds: spent.
        curve: measurements so far.
        best: weights of the best measurement.
        tvd_from: seconds at which the loss became TVD++.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[Measurement] = field(default_factory=list)
    best: dict[str, Floats] = field(default_factory=dict)
    tvd_from: float | None = None

    @property
    def best_measurement(self) -> Measurement:
        """Of the best weights."""
        return max(self.curve, key=lambda each: each.score, default=Measurement(0, 0.0, 0.0, 0.0))

    @property
    def stopped_rising(self) -> bool:
        """Whether the last measurements were no better than one before them."""
        before, recent = self.curve[:-PATIENCE], self.curve[-PATIENCE:]
        return bool(before) and max(each.score for each in recent) < max(each.score for each in before)


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
    """Train until the time is over, less if the held-out score stops rising.

    The last `TVD_SHARE` of the time is TVD++'s; it comes sooner where the KL divergence does no more good.

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
        measured = Measurement(state.step, state.seconds, *quality(model, teacher, held_out))
        if measured.score > state.best_measurement.score or not state.best:
            state.best = {name: array.copy() for name, array in model.arrays().items()}
        state.curve.append(measured)
        _assign(model, current)
        _save(keep, state, model, optimizer, average)

    sequences = [(group, row) for group, text in enumerate(texts) for row in range(len(text.ids))]
    per_epoch = len(sequences) // BATCH
    started = time.monotonic() - state.seconds
    while (share := _share(state, 60 * minutes)) < 1.0:
        if state.tvd_from is None and share >= 1 - TVD_SHARE:
            state.tvd_from = state.seconds
        epoch, place = divmod(state.step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(sequences))
        batch = [sequences[index] for index in order[place * BATCH : (place + 1) * BATCH]]
        hidden = torch.from_numpy(np.stack([texts[group].hidden[row] for group, row in batch])).float()
        final = torch.from_numpy(np.stack([texts[group].final[row] for group, row in batch])).float()
        written = torch.from_numpy(np.stack([texts[group].written[row] for group, row in batch]))
        rate = LEARNING_RATE * min(1.0, (state.step + 1) / WARM_UP) * _cosine(share)
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
        own = logits.float().log_softmax(-1)
        divergence = kl_divergence(own, wanted) if state.tvd_from is None else tvd_plus(own, wanted)
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
            if state.tvd_from is None and state.stopped_rising:
                state.tvd_from = state.seconds
        progress(
            f"training: step {state.step}, loss {loss.item():.3f}, agreement {state.best_measurement.agreement:.3f}",
            min(round(state.seconds), round(60 * minutes)),
            round(60 * minutes),
        )
    if not state.curve or state.curve[-1].step != state.step:
        measure()
    return state


def kl_divergence(own: Tensor, wanted: Tensor) -> Tensor:
    """Mean ``KL(model || draft)`` of log probabilities ``[tokens, vocabulary]``."""
    return functional.kl_div(own, wanted, reduction="batchmean", log_target=True)


def tvd_plus(own: Tensor, wanted: Tensor) -> Tensor:
    """A loss with the gradient of TVD++ for log probabilities ``[tokens, vocabulary]`` of the draft and of the model.

    Source: arXiv 2403.00858. The total variation distance falls by a policy gradient whose reward is 1 where the model
    gives a token more than the draft does, normalized over the batch. Ours: the expectation over the draft's tokens is
    taken over its whole vocabulary in place of samples.
    """
    with torch.no_grad():
        probabilities = own.exp()
        reward = (wanted > own).float()
        mean = (probabilities * reward).sum(-1).mean()
        spread = (probabilities * (reward - mean) ** 2).sum(-1).mean().sqrt()
        advantage = probabilities * (reward - mean) / spread.clamp(min=1e-6)
    return -(advantage * own).sum(-1).mean()


@torch.no_grad()  # type: ignore[untyped-decorator]
def quality(model: DraftModel, teacher: Teacher, held_out: Conversations) -> tuple[float, float]:
    """Agreement on greedily chosen tokens and overlap on sampled ones, see `Measurement`."""
    norm, head = torch.from_numpy(teacher.norm), torch.from_numpy(teacher.head)
    sums, tokens = [0.0, 0.0], [0, 0]
    for row in range(len(held_out.ids)):
        sampled = row % 2
        chosen = np.flatnonzero(held_out.written[row, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            features = model(torch.from_numpy(held_out.hidden[row : row + 1]).float())[0, chosen]
            logits = model.logits(features).float()
            if sampled:
                final = torch.from_numpy(held_out.final[row, chosen]).float()
                target = functional.rms_norm(final, norm.shape, norm, teacher.epsilon)
                wanted = functional.linear(target, head).float().softmax(-1)
                sums[sampled] += float(torch.minimum(wanted, logits.softmax(-1)).sum())
            else:
                guesses = teacher.vocabulary[logits.argmax(-1).numpy()]
                sums[sampled] += int((guesses == held_out.ids[row, chosen + 1]).sum())
        tokens[sampled] += len(chosen)
    agreement, overlap = (total / max(1, count) for total, count in zip(sums, tokens, strict=True))
    return agreement, overlap


def _share(state: TrainingState, seconds: float) -> float:
    """How much of a training of so many seconds is done, as its learning rate counts it."""
    if state.tvd_from is None:
        return state.seconds / seconds
    return 1 - TVD_SHARE + (state.seconds - state.tvd_from) / seconds


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
