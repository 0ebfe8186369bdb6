"""Hidden states of the float32 model at a layer, and the loss's gradients there, over many texts.

A layer's weights are read when it is its turn, for all texts at once, and gone before the next layer's are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import ExportError
from ..runtime.bundle import Architecture
from .checkpoint import Checkpoint
from .families import family_of
from .families.common import EMBEDDING
from .float_attention import Floats
from .float_layer import FloatHead, FloatLayer
from .progress import Progress, silent


def hidden_at(
    checkpoint: Checkpoint, split: int, windows: Sequence[Sequence[int]], *, progress: Progress = silent
) -> list[Floats]:
    """Hidden states ``[tokens, d_model]`` at the input of layer ``split`` for each window of token ids.

    Raises:
        ModelError: no family builds the checkpoint, or it lacks a weight.
        ExportError: there is no such layer.
    """
    _split_layers(checkpoint, split)
    embedding = checkpoint.tensor(EMBEDDING)
    hidden = [embedding[list(window)] for window in windows]
    del embedding
    for index in range(split):
        progress(f"float layer {index}", index, split)
        hidden = _forward_all(checkpoint, index, hidden)
    return hidden


def gradients_at(
    checkpoint: Checkpoint,
    split: int,
    windows: Sequence[Sequence[int]],
    *,
    draws: int = 1,
    seed: int = 0,
    start: Sequence[Floats] | None = None,
    progress: Progress = silent,
) -> list[Floats]:
    """Gradients of the loss at the input of layer ``split``; their mean outer product is the Fisher information.

    The loss is the sum over a window's tokens of ``-log p(label)``, with labels drawn from the model's own
    distribution: the text's own would give another matrix (Kunstner et al., arXiv 1905.12558). In memory are every
    window's hidden states at the input of every layer from ``split`` on; the rest is computed again on the way back.

    Args:
        checkpoint: the float model.
        split: a layer, or the number of layers for the head's input.
        windows: token ids.
        draws: sets of labels for each window; a further one costs a backward pass only.
        seed: of the labels; a window's depend on its place and its content, not on the other windows.
        start: hidden states ``[tokens, d_model]`` of each window at the split, of a quantized front for example;
            the float model's own if None.
        progress: called as layers are done.

    Returns:
        ``draws`` gradients ``[tokens, d_model]`` for the first window, as many for the second, and so on.

    Raises:
        ModelError: no family builds the checkpoint, or it lacks a weight.
        ExportError: there is no such layer, or ``start`` does not fit the windows.
    """
    for _, gradients in gradients_down_to(  # noqa: B007 - the last, at the split, is the one that is wanted
        checkpoint, split, windows, draws=draws, seed=seed, start=start, progress=progress
    ):
        pass
    return [gradient for window in gradients for gradient in window]


def gradients_down_to(
    checkpoint: Checkpoint,
    split: int,
    windows: Sequence[Sequence[int]],
    *,
    draws: int = 1,
    seed: int = 0,
    start: Sequence[Floats] | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[int, list[list[Floats]]]]:
    """What `gradients_at` does, with the gradients at every layer on the way.

    Yields:
        A layer, from the number of layers (the head's input) down to ``split``, and for each window its ``draws``
        gradients ``[tokens, d_model]`` there.
    """
    arch, layers = _split_layers(checkpoint, split)
    if start is None:
        start = hidden_at(checkpoint, split, windows, progress=progress)
    found, fitting = [text.shape for text in start], [(len(window), arch.d_model) for window in windows]
    if found != fitting:
        raise ExportError(f"start has shapes {found[:3]}, the windows ask for {fitting[:3]}; run the front over them")
    inputs, steps = [list(start)], 2 * len(layers) + 1
    for step, index in enumerate(layers):
        progress(f"float layer {index}", step, steps)
        inputs.append(_forward_all(checkpoint, index, inputs[-1]))
    progress("gradients at the head", len(layers), steps)
    gradients = _head_gradients(checkpoint, inputs.pop(), draws, seed)
    yield arch.layers, gradients
    for step, index in enumerate(reversed(layers), len(layers) + 1):
        progress(f"gradients at layer {index}", step, steps)
        gradients = _backward_all(checkpoint, index, inputs.pop(), gradients)
        yield index, gradients
    progress("gradients", steps, steps)


def _split_layers(checkpoint: Checkpoint, split: int) -> tuple[Architecture, range]:
    """The layers from the split on."""
    arch: Architecture = family_of(checkpoint.config).architecture(checkpoint.config)
    if not 0 <= split <= arch.layers:
        raise ExportError(f"split {split}: the model has {arch.layers} layers; choose from 0 to {arch.layers}")
    return arch, range(split, arch.layers)


def _read_layer(checkpoint: Checkpoint, index: int) -> FloatLayer:
    family = family_of(checkpoint.config)
    return FloatLayer.read(checkpoint, family, family.architecture(checkpoint.config), index)


def _forward_all(checkpoint: Checkpoint, index: int, inputs: Sequence[Floats]) -> list[Floats]:
    layer = _read_layer(checkpoint, index)
    return [layer.forward(hidden)[0] for hidden in inputs]


def _backward_all(
    checkpoint: Checkpoint, index: int, inputs: Sequence[Floats], gradients: Sequence[Sequence[Floats]]
) -> list[list[Floats]]:
    layer, results = _read_layer(checkpoint, index), []
    for hidden, draws in zip(inputs, gradients, strict=True):
        activations = layer.activations(hidden)
        results.append([layer.backward(hidden, activations, gradient) for gradient in draws])
    return results


def _head_gradients(checkpoint: Checkpoint, inputs: Sequence[Floats], draws: int, seed: int) -> list[list[Floats]]:
    head = FloatHead.read(checkpoint, family_of(checkpoint.config).architecture(checkpoint.config))
    return [
        head.sampled_gradients(hidden, draws, np.random.default_rng((seed, window)))
        for window, hidden in enumerate(inputs)
    ]
