"""Where bits matter: the loss that each weight's rounding causes, estimated from one gradient.

A change ``d`` of a matrix's output moves the model's predictions by a KL divergence of about half the mean of
``(g . d) ** 2``, with ``g`` the gradient of the loss at that output for labels drawn from the model itself (the second
order, with the Fisher matrix for the Hessian). The change is that of rounding to nearest; the calibrated codes that a
bundle gets lose less, by a factor that is taken for the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np

from ..errors import ExportError
from ..quant.allocation import Choice, allocate
from ..quant.grids import quantize
from ..quant.nbits import PACKED_BITS, dequantize
from ..quant.offsets import OffsetWeight
from ..quant.opsc import BLOCK_SIZES, Precision, Recipe
from ..runtime.bundle import Architecture
from .checkpoint import Checkpoint
from .families.common import EMBEDDING, ROLES
from .float_attention import Floats
from .float_layer import FloatHead, FloatLayer
from .progress import Progress
from .weights import copied, copy_blocks

SENSITIVITY_TOKENS = 2048  # the estimate's spread is below a tenth then
_BLOCK_SIZES = (32, 64, 128)


def auto(
    recipe: Recipe,
    checkpoint: Checkpoint,
    family: ModuleType,
    arch: Architecture,
    windows: Sequence[Sequence[int]],
    progress: Progress,
) -> dict[str, Precision]:
    """Precisions that lose least for the bytes that the recipe takes without exceptions, each half for itself.

    Args:
        recipe: its layers' bits and block size set the budget; halves of 16 or 32 bits stay as they are.
        checkpoint: the float model.
        family: its family.
        arch: its architecture.
        windows: the calibration text, token ids.
        progress: called as layers are done.

    Raises:
        ExportError: no choice fits the budget.
    """
    sample = [window for index, window in enumerate(windows) if index * len(window) < SENSITIVITY_TOKENS]
    halves: list[dict[str, list[Choice]]] = [{}, {}]
    budgets = [0, 0]
    for name, weight, inputs, gradients in _outputs(checkpoint, family, arch, sample, progress):
        wanted = recipe.precision(name)
        if not wanted.packed:
            continue
        half = int(int(name.split(".")[1]) >= recipe.split)
        budgets[half] += wanted.bytes_for(*weight.shape)
        tensors = family.tensors(arch, int(name.split(".")[1])).matrices()[name.split(".")[2]]
        halves[half][name] = list(_choices(checkpoint, tensors, wanted, weight, inputs, gradients))
    chosen: dict[str, Precision] = {}
    for choices, budget in zip(halves, budgets, strict=True):
        try:
            best = allocate(choices, budget)
        except ValueError as error:
            raise ExportError(f"weights=auto: {error}; use more bits") from error
        chosen |= {name: choice.precision for name, choice in best.items()}
    return chosen


def _choices(
    checkpoint: Checkpoint, tensors: Sequence[str], wanted: Precision, weight: Floats, inputs: Floats, gradients: Floats
) -> Iterator[Choice]:
    for bits in PACKED_BITS:
        for size in {*_BLOCK_SIZES, wanted.block_size} & set(BLOCK_SIZES[bits]):
            precision = replace(wanted, bits=bits, block_size=size)
            if (own := copied(checkpoint, tensors, precision, "")) is not None:
                stored = copy_blocks(checkpoint, tensors)
                nbytes = stored.packed.nbytes if isinstance(stored, OffsetWeight) else stored.nbytes
                yield Choice(own, nbytes, 0.0)
                continue
            method = "mse" if bits == 2 else "rtn"  # the search is slow, and worth little at more bits
            change = dequantize(quantize(weight, bits, size, method, symmetric=wanted.symmetric)) - weight
            products = np.einsum("tn,tn->t", inputs @ change.T, gradients)
            yield Choice(precision, precision.bytes_for(*weight.shape), float(np.square(products).sum()))


def _outputs(
    checkpoint: Checkpoint,
    family: ModuleType,
    arch: Architecture,
    windows: Sequence[Sequence[int]],
    progress: Progress,
) -> Iterator[tuple[str, Floats, Floats, Floats]]:
    """Each matrix's name, weight, inputs and gradients at its outputs over all windows, the last layer's first."""
    embedding = checkpoint.tensor(EMBEDDING)
    hidden = [[embedding[list(window)] for window in windows]]
    del embedding
    steps = 2 * arch.layers
    for index in range(arch.layers):
        progress(f"float layer {index}", index, steps)
        layer = FloatLayer.read(checkpoint, family, arch, index)
        hidden.append([layer.forward(text)[0] for text in hidden[-1]])
    head = FloatHead.read(checkpoint, arch)
    generator = np.random.default_rng(0)
    gradients = [head.sampled_gradients(text, 1, generator)[0] for text in hidden.pop()]
    del head
    for step, index in enumerate(reversed(range(arch.layers)), arch.layers):
        progress(f"sensitivity of layer {index}", step, steps)
        layer = FloatLayer.read(checkpoint, family, arch, index)
        inputs: dict[str, list[Floats]] = {role: [] for role in ROLES}
        outputs: dict[str, list[Floats]] = {role: [] for role in ROLES}
        for window, text in enumerate(hidden.pop()):
            kept = layer.activations(text)
            gradients[window], at_outputs = layer.gradients(text, kept, gradients[window])
            given = (kept.normed, kept.attended, kept.post_normed, kept.post_normed, kept.gated)
            for role, values in zip(ROLES, given, strict=True):
                inputs[role].append(values)
                outputs[role].append(at_outputs[role])
        for role in ROLES:
            weight: Floats = getattr(layer, role)
            yield f"layers.{index}.{role}", weight, np.concatenate(inputs[role]), np.concatenate(outputs[role])
