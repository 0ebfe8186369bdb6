"""Scales of a quantized KV cache, measured on calibration text with the float model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ExportError
from ..quant.kv import KVScales, absmax_scales
from ..quant.opsc import Recipe
from .progress import Progress
from .rope import rope_tables
from .validate import FloatModel

SEED = 0


def calibrate_kv(
    reference: FloatModel, recipe: Recipe, windows: Sequence[Sequence[int]], max_length: int, progress: Progress
) -> dict[int, KVScales]:
    """Scales of every layer whose cache the recipe quantizes.

    Largest magnitudes, because clipping costs more than the finer step gains: measured on SmolLM2 at 4 bits, scales
    of least squared error have the same KL and raise the perplexity twice as much (2,048 tokens, float weights).

    Args:
        reference: the float model, run layer by layer.
        recipe: tells the bits.
        windows: token ids of texts, each from its first position on.
        max_length: positions that keys must be covered at.
        progress: called as layers are done.

    Raises:
        ExportError: there is no window, or one is empty, longer than ``max_length`` or outside the vocabulary.
    """
    quantized = [layer for layer in range(recipe.layers) if recipe.kv_bits(layer) < 32]
    if not quantized:
        return {}
    vocabulary = reference.arch.vocab_size
    for ids in windows:
        if not 1 <= len(ids) <= max_length:
            raise ExportError(
                f"calibration window of {len(ids)} tokens: must have between 1 and {max_length}, the context"
            )
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ExportError(
                f"calibration window with token ids {min(ids)} to {max(ids)}: must lie between 0 and {vocabulary - 1}"
            )
    if not windows:
        raise ExportError("no calibration window: give at least one, to measure the scales of the KV cache")
    texts = [reference.embed(ids) for ids in windows]
    scales = {}
    for layer in range(quantized[-1] + 1):
        progress(f"calibrating the KV cache of layer {layer}", layer, quantized[-1] + 1)
        outputs, keys, values = zip(*reference.layer_with_cache(layer, texts), strict=True)
        texts = list(outputs)
        if layer in quantized:
            bits = recipe.kv_bits(layer)
            spread = spread_keys(keys, *rope_tables(reference.arch, max_length))
            scales[layer] = KVScales(bits, absmax_scales(spread, bits), absmax_scales(np.concatenate(values), bits))
    return scales


def spread_keys(
    keys: Sequence[NDArray[np.float32]], cos: NDArray[np.float32], sin: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Keys of several texts, turned on to positions drawn from the whole context.

    The cache holds keys after their rotation. Slow frequencies turn little within a calibration text: a channel that is
    small at its positions may be large at later ones. Position 0 stays, where models put an attention sink.

    Args:
        keys: of each text ``[tokens, kv_heads, head_dim]``, rotated to positions 0, 1, …
        cos: ``[positions, head_dim / 2]``, the rotation's tables.
        sin: like ``cos``.

    Returns:
        ``[tokens, kv_heads, head_dim]`` of all texts.
    """
    rng = np.random.default_rng(SEED)
    length = np.hypot(cos[0], sin[0])  # of YaRN's tables not 1; the keys hold that factor already
    turned = []
    for text in keys:
        steps = rng.integers(0, len(cos) - np.arange(len(text)))
        steps[0] = 0
        c, s = (table[steps, None] / length for table in (cos, sin))
        x, y = np.split(text, 2, axis=-1)
        turned.append(np.concatenate([x * c - y * s, x * s + y * c], axis=-1))
    return np.concatenate(turned)
