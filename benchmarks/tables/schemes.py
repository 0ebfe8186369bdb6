"""Quantization of weights and activations, simulated: numbers are rounded as a scheme has it and computed in float32.

Every scheme sees a decoder layer's linear maps in groups that read the same inputs (query, key and value; attention
output; gate and up; down) and gives the group's rounded weight and what becomes of its inputs. Attention, norms,
embedding and head stay in float32, and so does the KV cache, which Atom and OmniQuant quantize as well: that favours
every scheme but `isthmus`, which rounds embedding and head too.

Scales count 16 bits each in ``weight_bits``, as the schemes store them, and 32 for Isthmus, which does store that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from isthmus.quant.nbits import dequantize, quantize_rtn

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
AFTER_NORM = (GROUPS[0], GROUPS[2])

SMOOTHING = 0.5  # SmoothQuant's alpha
ALPHAS = tuple(step / 10 for step in range(11))
CLIPS = tuple(1 - step / 20 for step in range(11))  # down to half the range
GROUP_SIZE, OUTLIERS = 128, 32  # Atom's group; its 128 outlier channels are of 4096
ATOM_WEIGHT_CLIP, ATOM_INPUT_CLIP = 0.85, 0.9  # its published settings at 4 bits
BLOCK_SIZE = 32  # Isthmus' default

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """Linear maps of one layer that read the same inputs.

    Attributes:
        weight: float32 ``[outputs, inputs]``, of all of them.
        inputs: of the float model over calibration text, ``[samples, inputs]``.
        after_norm: a norm makes the inputs, so that a scale per channel folds into its weight.
    """

    layer: int
    weight: Tensor
    inputs: Tensor
    after_norm: bool


@dataclass(frozen=True)
class Rounded:
    """What a scheme makes of a group.

    Attributes:
        weight: ``[outputs, inputs]``, for transformed inputs.
        transform: rounds inputs ``[..., inputs]``, token by token.
        weight_bits: mean over the weights, scales and zero points included.
    """

    weight: Tensor
    transform: Transform
    weight_bits: float


Scheme = Callable[[Group], Rounded]


class RoundedLinear(nn.Module):
    """A linear map that rounds its inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: Transform) -> None:
        super().__init__()
        self.weight, self.bias, self._transform = weight, bias, transform

    def forward(self, inputs: Tensor) -> Tensor:
        """The map of the rounded inputs."""
        return linear(self._transform(inputs), self.weight, self.bias)


def symmetric(values: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Round along the last axis with one scale, ``clip * max|x| / (2**(bits - 1) - 1)``."""
    top = 2 ** (bits - 1) - 1
    scale = (values.abs().amax(-1, keepdim=True) * clip / top).clamp_min(1e-12)
    return (values / scale).round().clamp(-top - 1, top) * scale


def asymmetric(values: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """Round along the last axis between ``clip`` times its least and its largest value (and 0), with a zero point."""
    low = values.amin(-1, keepdim=True).clamp_max(0) * clip
    high = values.amax(-1, keepdim=True).clamp_min(0) * clip
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    zero = (-low / scale).round()
    return ((values / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def grouped(values: Tensor, bits: int, size: int, clip: float = 1.0) -> Tensor:
    """`symmetric` with a scale for every ``size`` values of the last axis; the last group may be shorter."""
    return torch.cat([symmetric(part, bits, clip) for part in values.split(size, dim=-1)], dim=-1)


def round_to_nearest(bits: int) -> Scheme:
    """Weights per output channel, inputs per token, both symmetric."""

    def scheme(group: Group) -> Rounded:
        return Rounded(
            symmetric(group.weight, bits), lambda inputs: symmetric(inputs, bits), bits + 16 / group.weight.shape[1]
        )

    return scheme


def smooth_quant(bits: int) -> Scheme:
    """SmoothQuant (arXiv 2211.10438): per channel, inputs are divided and weights multiplied before rounding.

    ``s = max|x| ** alpha / max|w| ** (1 - alpha)`` (equation 4) over calibration inputs, for inputs that a norm makes,
    as its code for Llama has it. Then `round_to_nearest`, scales of the inputs token by token.
    """
    plain = round_to_nearest(bits)

    def scheme(group: Group) -> Rounded:
        if not group.after_norm:
            return plain(group)
        scale = _smoothing(group, SMOOTHING)
        return Rounded(
            symmetric(group.weight * scale, bits),
            lambda inputs: symmetric(inputs / scale, bits),
            bits + 16 / group.weight.shape[1],
        )

    return scheme


def omniquant_style(bits: int) -> Scheme:
    """OmniQuant's two ideas (arXiv 2308.13137), searched on grids where it learns by gradient.

    Equivalent transformation: alpha of `smooth_quant`'s scale is chosen per group, or no scale, for the least squared
    error of the rounded outputs over calibration inputs. Weight clipping: then each output channel's range is shrunk
    by one of `CLIPS` for the least error over the rounded inputs. Both sides asymmetric, as there. Left out: block-wise
    training with the preceding blocks rounded, a scale for each channel of its own, and the scales between value and
    attention output and between query and key.
    """

    def scheme(group: Group) -> Rounded:
        wanted = group.inputs @ group.weight.T

        def error(scale: Tensor) -> float:
            actual = asymmetric(group.inputs / scale, bits) @ asymmetric(group.weight * scale, bits).T
            return float((actual - wanted).square().sum())

        scales = [torch.ones(group.weight.shape[1])]
        if group.after_norm:
            scales += [_smoothing(group, alpha) for alpha in ALPHAS]
        scale = min(scales, key=error)
        weight = group.weight * scale
        rounded_inputs = asymmetric(group.inputs / scale, bits)
        gram = rounded_inputs.T @ rounded_inputs
        errors = []
        for clip in CLIPS:
            change = asymmetric(weight, bits, clip) - weight
            errors.append((change @ gram * change).sum(1))
        best = torch.tensor(CLIPS)[torch.stack(errors).argmin(0)][:, None]
        return Rounded(
            asymmetric(weight, bits, best),
            lambda inputs: asymmetric(inputs / scale, bits),
            bits + (16 + bits) / group.weight.shape[1],
        )

    return scheme


def atom_style(bits: int) -> Scheme:
    """Atom's mixed precision (arXiv 2310.19102): outlier channels in 8 bits, the others in groups of 128.

    The `OUTLIERS` channels of largest mean square over calibration inputs are moved to the end, in weights and inputs,
    and share one scale a row; the others have a symmetric scale for every 128, with Atom's clipping. Left out: GPTQ
    (weights are rounded to nearest) and the 4-bit KV cache.
    """

    def scheme(group: Group) -> Rounded:
        order = group.inputs.square().mean(0).argsort()
        columns = len(order)
        dense = columns - OUTLIERS

        def reordered(values: Tensor, clip: float) -> Tensor:
            normal, outliers = values[..., order].split([dense, OUTLIERS], dim=-1)
            return torch.cat([grouped(normal, bits, GROUP_SIZE, clip), symmetric(outliers, 8)], dim=-1)

        scales = -(-dense // GROUP_SIZE) + 1
        return Rounded(
            reordered(group.weight, ATOM_WEIGHT_CLIP),
            lambda inputs: reordered(inputs, ATOM_INPUT_CLIP),
            (bits * dense + 8 * OUTLIERS + 16 * scales) / columns,
        )

    return scheme


def isthmus(split: int, front_bits: int, back_bits: int) -> Scheme:
    """A bundle's weights (OPSC): precision changes at the split. Inputs as its kernel has them, see `block_inputs`."""

    def scheme(group: Group) -> Rounded:
        bits = front_bits if group.layer < split else back_bits
        return Rounded(block_weight(group.weight, bits), block_inputs, bits + 32 / BLOCK_SIZE)

    return scheme


def block_weight(weight: Tensor, bits: int) -> Tensor:
    """A weight through Isthmus' own quantizer."""
    return torch.from_numpy(dequantize(quantize_rtn(weight.numpy(), bits, BLOCK_SIZE)))


def block_inputs(inputs: Tensor) -> Tensor:
    """Symmetric 8 bits with a scale for each block, as ``MatMulNBits`` rounds its inputs at ``accuracy_level=4``."""
    blocks = inputs.unflatten(-1, (-1, BLOCK_SIZE))
    return symmetric(blocks, 8).flatten(-2)


def apply(model: Any, scheme: Scheme, inputs: dict[str, Tensor], progress: Callable[[int, int], None]) -> float:
    """Replace a model's linear maps in place.

    Args:
        model: transformers' Llama-like decoder.
        scheme: what rounds them.
        inputs: of each group of the float model, see `calibrate`.
        progress: called with layers done and in all.

    Returns:
        Mean bits of a weight of the layers.
    """
    layers = model.model.layers
    bits = weights = 0.0
    for index, layer in enumerate(layers):
        progress(index, len(layers))
        for names in GROUPS:
            members = [layer.get_submodule(name) for name in names]
            weight = torch.cat([member.weight.detach() for member in members])
            rounded = scheme(Group(index, weight, inputs[f"{index}.{names[0]}"], names in AFTER_NORM))
            parts = rounded.weight.split([len(member.weight) for member in members])
            for name, member, part in zip(names, members, parts, strict=True):
                layer.set_submodule(name, RoundedLinear(part, member.bias, rounded.transform))
            bits += rounded.weight_bits * weight.numel()
            weights += weight.numel()
    progress(len(layers), len(layers))
    return bits / weights


def calibrate(model: Any, windows: list[list[int]]) -> dict[str, Tensor]:
    """Inputs ``[tokens, width]`` of each group over windows of token ids, by layer and the group's first name."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        layer.get_submodule(names[0]).register_forward_pre_hook(
            lambda _, arguments, key=f"{index}.{names[0]}": seen.setdefault(key, []).append(arguments[0][0])
        )
        for index, layer in enumerate(model.model.layers)
        for names in GROUPS
    ]
    with torch.no_grad():
        for ids in windows:
            model.model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {key: torch.cat(parts) for key, parts in seen.items()}


def _smoothing(group: Group, alpha: float) -> Tensor:
    inputs = group.inputs.abs().amax(0).clamp_min(1e-5)
    weights = group.weight.abs().amax(0).clamp_min(1e-5)
    return (inputs**alpha / weights ** (1 - alpha)).clamp_min(1e-5)
