"""Hidden states at the split, as the staged device half computes them: what a codec is fitted to."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ..devices.backend import Graph, default_threads
from ..quant.opsc import Precision, Recipe
from ..runtime.bundle import Architecture, KVSpec, Segment
from .batched import BatchedLayers
from .checkpoint import Checkpoint
from .progress import Progress, silent
from .validate import run_block
from .weights import Weights

Hidden = NDArray[np.float32]

NEAR_BLOCK_SIZE = 32
PROBED_AT_ONCE = 256  # sequences, each with a cache of its own
PROBES_CACHE_BYTES = 1 << 29  # for all of them


def hidden_states(
    root: Path,
    segments: Sequence[Segment],
    checkpoint: Checkpoint,
    arch: Architecture,
    recipe: Recipe,
    windows: Sequence[Sequence[int]],
    *,
    progress: Progress = silent,
) -> list[Hidden]:
    """Hidden states ``[tokens, d_model]`` of each window after the device's layers, each from its first position on.

    One block is open at a time.

    Args:
        root: the staging folder, with ``device/`` below.
        segments: what was written there; those of the device that are blocks are run.
        checkpoint: the source model, for the embedding.
        arch: its numbers.
        recipe: tells the bits of embedding and KV cache.
        windows: token ids of texts.
        progress: called as windows are done.
    """
    table = Weights(checkpoint, recipe.precision).embedding()
    texts = [table[list(ids)] for ids in windows]
    kv = KVSpec(recipe.front_kv_bits, arch.kv_heads, arch.head_dim)
    blocks = [segment for segment in segments if segment.kind == "block" and segment.half == "device"]
    total = len(blocks) * len(texts)
    for done, segment in enumerate(blocks):
        graph = Graph(root / "device" / segment.graph_file, default_threads())
        span = range(segment.first_layer, segment.last_layer)
        for index, hidden in enumerate(texts):
            progress("hidden states at the split", done * len(texts) + index, total)
            texts[index] = run_block(graph, span, kv, hidden)
    progress("hidden states at the split", total, total)
    return texts


def typical_states(
    checkpoint: Checkpoint,
    family: ModuleType,
    arch: Architecture,
    recipe: Recipe,
    texts: Sequence[Sequence[int]],
    *,
    tokens: NDArray[np.int64] | None = None,
    progress: Progress = silent,
) -> Hidden:
    """Hidden states ``[vocab_size, d_model]`` at the split of every token right after each of some texts, averaged.

    Many tokens are run at once, with the front's weights, in graphs without the dummy row and with a float32 cache;
    calibrated weights, which are made once and not kept, are rounded to 8 bits, closer to what they aim at than at
    their own. So they are close to what the staged blocks give and not its bits: enough for a prediction,
    of which a codec sends the error.

    Args:
        checkpoint: the source model.
        family: its builder.
        arch: its numbers.
        recipe: tells the split and the front's precision.
        texts: token ids, equally many in each.
        tokens: ids of those that are wanted, the others' states are 0; all by default.
        progress: called as tokens are done.
    """
    table = Weights(checkpoint, recipe.precision).embedding()
    tokens = np.arange(arch.vocab_size) if tokens is None else tokens
    states = np.zeros((arch.vocab_size, arch.d_model), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        layers = BatchedLayers(
            Path(folder),
            Weights(checkpoint, partial(_without_calibration, recipe)),
            family,
            arch,
            range(recipe.split),
            capacity=len(texts[0]) + 1,
        )
        at_once = min(PROBED_AT_ONCE, max(1, PROBES_CACHE_BYTES // layers.sequence_bytes))
        for done, text in enumerate(texts):
            opening = layers.session(1)
            for token in text:
                opening.step(table[[token]])
            for first in range(0, len(tokens), at_once):
                progress("hidden state of each token", done * len(tokens) + first, len(texts) * len(tokens))
                ids = tokens[first : first + at_once]
                if first == 0 or len(ids) < at_once:
                    session = layers.session(len(ids))
                    for name, array in session.cache.items():
                        array[:] = opening.cache[name]
                session.length = len(text)
                states[ids] += session.step(table[ids])
    progress("hidden state of each token", len(texts) * len(tokens), len(texts) * len(tokens))
    states /= len(texts)
    return states


def _without_calibration(recipe: Recipe, name: str) -> Precision:
    precision = recipe.precision(name)
    return Precision(8, NEAR_BLOCK_SIZE) if precision.method == "gptq" and precision.packed else precision
