"""One decoder layer, and the head, in float32 NumPy with their gradients.

For what an exported graph cannot give: the input of every linear layer, and gradients. One text at a time, from
its first token, without a cache. Weights get no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.bundle import Architecture
from .checkpoint import Checkpoint
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .float_attention import Attention, Floats, attend, attend_backward

HEAD_ROWS = 64  # logits of that many tokens are in memory at a time


@dataclass(frozen=True)
class Activations:
    """What one layer computed over a text, float32, a row for each token unless said otherwise.

    Attributes:
        normed: input of the query, key and value projections, ``[tokens, d_model]``.
        attention: what the attention's gradient needs.
        attended: input of the attention's output projection, ``[tokens, heads * head_dim]``.
        residual: hidden state after the attention, ``[tokens, d_model]``.
        post_normed: input of the gate and up projections, ``[tokens, d_model]``.
        gate: output of the gate projection, ``[tokens, d_ff]``; up alike.
        gated: input of the down projection, ``[tokens, d_ff]``.
    """

    normed: Floats
    attention: Attention
    attended: Floats
    residual: Floats
    post_normed: Floats
    gate: Floats
    up: Floats
    gated: Floats


@dataclass(frozen=True)
class FloatLayer:
    """One decoder layer; matrices are ``[out, in]``, as in the checkpoint."""

    arch: Architecture
    input_norm: Floats
    qkv: Floats
    qkv_bias: Floats | None
    attention_output: Floats
    post_norm: Floats
    gate: Floats
    up: Floats
    down: Floats

    @classmethod
    def read(cls, checkpoint: Checkpoint, family: ModuleType, arch: Architecture, index: int) -> FloatLayer:
        """Read one layer's weights.

        Raises:
            ModelError: the checkpoint lacks one.
        """
        names, read = family.tensors(arch, index), checkpoint.tensor
        return cls(
            arch=arch,
            input_norm=read(names.input_norm),
            qkv=np.concatenate([read(name) for name in (names.query, names.key, names.value)]),
            qkv_bias=np.concatenate([read(name) for name in names.qkv_biases]) if names.qkv_biases else None,
            attention_output=read(names.attention_output),
            post_norm=read(names.post_norm),
            gate=read(names.gate),
            up=read(names.up),
            down=read(names.down),
        )

    def forward(self, hidden: Floats) -> tuple[Floats, Activations]:
        """Output ``[tokens, d_model]`` for hidden states of that shape, and what was computed on the way."""
        activations = self.activations(hidden)
        return activations.residual + activations.gated @ self.down.T, activations

    def activations(self, hidden: Floats) -> Activations:
        """All of `forward` but its last product, which `backward` does not need."""
        normed = self.normed(hidden)
        attended, attention = self.attended(normed)
        residual = attended @ self.attention_output.T
        residual += hidden
        post_normed = self.post_normed(residual)
        gate, up, gated = self.gated(post_normed)
        return Activations(normed, attention, attended, residual, post_normed, gate, up, gated)

    def normed(self, hidden: Floats) -> Floats:
        """Input of the query, key and value projections."""
        return _norm(hidden, self.input_norm, self.arch.norm_epsilon)

    def attended(self, normed: Floats) -> tuple[Floats, Attention]:
        """Input of the attention's output projection, and what the attention's gradient needs."""
        qkv = normed @ self.qkv.T
        if self.qkv_bias is not None:
            qkv += self.qkv_bias
        return attend(self.arch, qkv)

    def post_normed(self, residual: Floats) -> Floats:
        """Input of the gate and up projections, of the hidden state after the attention."""
        return _norm(residual, self.post_norm, self.arch.norm_epsilon)

    def gated(self, post_normed: Floats) -> tuple[Floats, Floats, Floats]:
        """Outputs of the gate and up projections, and the input of the down projection."""
        gate, up = post_normed @ self.gate.T, post_normed @ self.up.T
        gated = _sigmoid(gate)
        gated *= gate
        gated *= up
        return gate, up, gated

    def backward(self, hidden: Floats, activations: Activations, gradient: Floats) -> Floats:
        """Gradient with respect to the layer's input.

        Args:
            hidden: the input, ``[tokens, d_model]``.
            activations: what `forward` or `activations` gave for it.
            gradient: with respect to the output, ``[tokens, d_model]``; it is not changed.
        """
        return self.gradients(hidden, activations, gradient)[0]

    def gradients(self, hidden: Floats, activations: Activations, gradient: Floats) -> tuple[Floats, dict[str, Floats]]:
        """`backward`, and the gradients with respect to each matrix's output, by the matrix's name."""
        arch, kept = self.arch, activations
        up_gradient = gradient @ self.down
        slope = _sigmoid(kept.gate)
        silu = kept.gate * slope
        slope += silu - silu * slope  # silu' = s + x s (1 - s)
        slope *= kept.up
        slope *= up_gradient
        up_gradient *= silu
        branch = slope @ self.gate
        branch += up_gradient @ self.up
        residual_gradient = _norm_backward(kept.residual, self.post_norm, arch.norm_epsilon, branch)
        residual_gradient += gradient

        attended_gradient = residual_gradient @ self.attention_output
        qkv_gradient = attend_backward(arch, kept.attention, kept.attended, attended_gradient)
        result = _norm_backward(hidden, self.input_norm, arch.norm_epsilon, qkv_gradient @ self.qkv)
        result += residual_gradient
        outputs = {
            "qkv": qkv_gradient,
            "attention_output": residual_gradient,
            "gate": slope,
            "up": up_gradient,
            "down": gradient,
        }
        return result, outputs


@dataclass(frozen=True)
class FloatHead:
    """The final norm and the vocabulary's matrix ``[vocab_size, d_model]``."""

    norm: Floats
    weight: Floats
    epsilon: float

    @classmethod
    def read(cls, checkpoint: Checkpoint, arch: Architecture) -> FloatHead:
        """Read both.

        Raises:
            ModelError: the checkpoint lacks one.
        """
        weight = checkpoint.tensor(EMBEDDING if arch.tied_embeddings else HEAD)
        return cls(checkpoint.tensor(FINAL_NORM), weight, arch.norm_epsilon)

    def logits(self, hidden: Floats) -> Floats:
        """``[tokens, vocab_size]`` of hidden states ``[tokens, d_model]`` after the last layer."""
        return _norm(hidden, self.norm, self.epsilon) @ self.weight.T

    def sampled_label_gradient(self, hidden: Floats, labels: NDArray[np.integer[Any]]) -> Floats:
        """Gradient of the sum over tokens of ``-log p(label)`` with respect to ``hidden``.

        Args:
            hidden: after the last layer, ``[tokens, d_model]``.
            labels: a token id for each row, ``[tokens]``, whatever the text goes on with.
        """
        predictions = self._predictions(hidden)
        return np.concatenate([self._gradient(hidden[rows], mean, labels[rows]) for rows, _, mean in predictions])

    def sampled_gradients(self, hidden: Floats, draws: int, generator: np.random.Generator) -> list[Floats]:
        """`sampled_label_gradient` for ``draws`` sets of labels drawn from the model's own distribution.

        Further draws cost next to nothing: they share the probabilities and the vocabulary's mean row.
        """
        parts: list[list[Floats]] = [[] for _ in range(draws)]
        for rows, probabilities, mean in self._predictions(hidden):
            for draw, labels in enumerate(_sample(probabilities, draws, generator)):
                parts[draw].append(self._gradient(hidden[rows], mean, labels))
        return [np.concatenate(part) for part in parts]

    def _predictions(self, hidden: Floats) -> Iterator[tuple[slice, Floats, Floats]]:
        """A few rows at a time: which, their probabilities, and the mean of the vocabulary's rows under these."""
        for first in range(0, len(hidden), HEAD_ROWS):
            rows = slice(first, first + HEAD_ROWS)
            probabilities = self.logits(hidden[rows])
            probabilities -= probabilities.max(axis=1, keepdims=True)
            np.exp(probabilities, out=probabilities)
            probabilities /= probabilities.sum(axis=1, keepdims=True)
            yield rows, probabilities, probabilities @ self.weight

    def _gradient(self, hidden: Floats, mean: Floats, labels: NDArray[np.integer[Any]]) -> Floats:
        return _norm_backward(hidden, self.norm, self.epsilon, mean - self.weight[labels])


def _sample(probabilities: Floats, draws: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Token ids ``[draws, rows]``, by inverting each row's cumulative distribution."""
    cumulative = probabilities.cumsum(axis=1, dtype=np.float64)
    points = generator.random((len(probabilities), draws)) * cumulative[:, -1:]
    ids = [np.searchsorted(row, at, side="right") for row, at in zip(cumulative, points, strict=True)]
    return np.minimum(np.stack(ids, axis=1), probabilities.shape[1] - 1)


def _sigmoid(values: Floats) -> Floats:
    result = np.negative(values)
    with np.errstate(over="ignore"):  # infinity becomes the zero that is meant
        np.exp(result, out=result)
    result += 1
    return np.reciprocal(result, out=result)


def _norm(hidden: Floats, gamma: Floats, epsilon: float) -> Floats:
    return hidden * _inverse_rms(hidden, epsilon) * gamma


def _norm_backward(hidden: Floats, gamma: Floats, epsilon: float, gradient: Floats) -> Floats:
    inverse = _inverse_rms(hidden, epsilon)
    scaled = gradient * gamma
    shared = (scaled * hidden).mean(axis=1, keepdims=True) * inverse**2
    scaled -= hidden * shared
    scaled *= inverse
    return scaled


def _inverse_rms(hidden: Floats, epsilon: float) -> Floats:
    result: Floats = 1 / np.sqrt(np.square(hidden).mean(axis=1, keepdims=True) + np.float32(epsilon))
    return result
