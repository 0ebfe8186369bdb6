"""Many sequences at once, a token each per step, in onnxruntime: where calibration writes text and probes tokens.

The graphs are those of the segments without the dummy row (see `isthmus.export.decoder`): bits may depend on how
sequences are grouped here, because nothing is resumed or verified.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..devices.backend import Graph, default_threads
from ..runtime.bundle import Architecture, KVSpec
from .decoder import SegmentBuilder, build_block, build_head
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .graph import GraphWriter
from .weights import Weights

Hidden = NDArray[np.float32]


class BatchedLayers:
    """Consecutive layers in one graph.

    Args:
        folder: where the graph is written; needed as long as this lives.
        weights: of the model.
        layers: which.
        capacity: positions of a sequence.
    """

    def __init__(
        self,
        folder: Path,
        weights: Weights,
        family: ModuleType,
        arch: Architecture,
        layers: range,
        *,
        capacity: int,
    ) -> None:
        self.layers, self.capacity, self.d_model = layers, capacity, arch.d_model
        self.kv = KVSpec(32, arch.kv_heads, arch.head_dim, spare_rows=0)
        writer = GraphWriter(folder, f"layers-{layers.start}-{layers.stop}")
        builder = SegmentBuilder(writer, arch, weights, batched=True)
        names = {layer: family.tensors(arch, layer) for layer in layers}
        build_block(builder, names, capacity, self.kv, {})
        self.graph = Graph(writer.graph_path, default_threads())

    @property
    def sequence_bytes(self) -> int:
        """Bytes of KV cache that one sequence takes."""
        return self.kv.cache_bytes(len(self.layers), self.capacity)

    def session(self, sequences: int) -> BatchedSession:
        """So many empty sequences."""
        return BatchedSession(self, sequences)


class BatchedSession:
    """Sequences of equal length, their KV cache in place.

    Attributes:
        length: positions of each sequence; lowering it rolls back.
        cache: ``[sequences, kv_heads, capacity, head_dim]`` by ``key.i`` and ``value.i``.
    """

    def __init__(self, stack: BatchedLayers, sequences: int) -> None:
        self.length = 0
        self._stack = stack
        self._hidden = np.zeros((sequences, 1, stack.d_model), np.float32)
        self._out = np.zeros_like(self._hidden)
        self._seqlens = np.zeros(sequences, np.int32)
        self._total = np.zeros((), np.int32)
        shape = (sequences, *stack.kv.shape(stack.capacity)[1:])
        self.cache = {
            f"{side}.{layer}": np.zeros(shape, np.float32) for layer in stack.layers for side in ("key", "value")
        }
        self._binding = stack.graph.binding()
        inputs = {"hidden": self._hidden, "seqlens_k": self._seqlens, "total_sequence_length": self._total}
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._binding.bind_ortvalue_output("hidden_out", ort.OrtValue.ortvalue_from_numpy(self._out))
        for name, array in self.cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(f"past_{name}", value)
            self._binding.bind_ortvalue_output(f"present_{name}", value)

    def step(self, hidden: Hidden) -> Hidden:
        """Append one position to every sequence.

        Args:
            hidden: ``[sequences, d_model]``.

        Returns:
            Hidden states ``[sequences, d_model]`` after the layers, in a buffer that the next step overwrites.
        """
        self._hidden[:, 0] = hidden
        self._seqlens[:] = self.length  # valid positions afterwards, less one
        self._total[...] = self.length + 1
        self._stack.graph.run_bound(self._binding)
        self.length += 1
        return self._out[:, 0]


class BatchedHead:
    """The final norm and the vocabulary; arguments like those of `BatchedLayers`."""

    def __init__(self, folder: Path, weights: Weights, arch: Architecture) -> None:
        writer = GraphWriter(folder, "head")
        builder = SegmentBuilder(writer, arch, weights, batched=True)
        build_head(builder, FINAL_NORM, EMBEDDING if arch.tied_embeddings else HEAD)
        self._graph = Graph(writer.graph_path, default_threads())

    def logits(self, hidden: Hidden) -> Hidden:
        """Logits ``[sequences, vocab_size]`` of hidden states ``[sequences, d_model]``."""
        return self._graph.run({"hidden": np.ascontiguousarray(hidden[:, None])}, "logits")[:, 0]
