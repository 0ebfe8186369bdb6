"""The kernels that a model spends its time in, as graphs with random weights: what the probe times.

A graph holds products with weights of their own, and attention over caches of its own. Before each timed call the
processor's caches are emptied, because a model reads all its other weights in between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .backend import Graph
from .onnx_bytes import CONTRIB, model, node, tensor, value

SECONDS = 0.8  # of calls for one timing
FEWEST_CALLS, MOST_CALLS = 4, 400
EVICTING_BYTES = 64_000_000  # read between calls; more than most caches hold

# Root mean square of uniform codes of so many bits: scales that divide by it keep activations of size 1 in a chain.
_CODE_RMS = {2: 1.2247, 4: 4.6368, 8: 73.901}

# What a block runs in decode: the row of the token and one below it, see the exporter's graphs.
DECODE_QUERIES = 2


@dataclass(frozen=True)
class ModelShape:
    """Widths of a model; the defaults are SmolLM2-135M's.

    Attributes:
        d_model: width of the hidden states.
        d_ff: width inside the feed-forward part.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        block_size: weights that share a scale.
    """

    d_model: int = 576
    d_ff: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 32


@dataclass(frozen=True)
class Products:
    """A chain of products in one graph.

    Attributes:
        graph: the model's bytes; input ``x`` ``[1, rows, width]``, output ``y`` of the same shape.
        width: of input and output.
        count: of products.
        weight_bytes: of all weights, scales included.
        flops: of one row.
    """

    graph: bytes
    width: int
    count: int
    weight_bytes: int
    flops: int


def product_chain(bits: int, widths: tuple[int, int], total_bytes: float, block_size: int) -> Products:
    """Products from width to width and back, over and over, each with weights of its own.

    Args:
        bits: 2, 4 or 8 for ``MatMulNBits`` with int8 activations, 32 for a float ``MatMul``.
        widths: of the input and between the two products of a pair.
        total_bytes: of weights, about; at least one pair is made.
        block_size: weights that share a scale.
    """
    rng = np.random.default_rng(0)
    nodes: list[bytes] = []
    weights: list[bytes] = []
    size = flops = 0
    hidden = "x"
    while size < total_bytes:
        for columns, rows in (widths, widths[::-1]):
            name = f"w{len(nodes)}"
            arrays = _weight(rng, bits, rows, columns, block_size)
            weights += [tensor(f"{name}.{part}", array) for part, array in arrays.items()]
            names = [hidden, *(f"{name}.{part}" for part in arrays)]
            hidden = f"h{len(nodes)}"
            if bits == 32:
                nodes.append(node("MatMul", names, [hidden]))
            else:
                sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block_size, "accuracy_level": 4}
                nodes.append(node("MatMulNBits", names, [hidden], CONTRIB, **sizes))
            size += sum(array.nbytes for array in arrays.values())
            flops += 2 * rows * columns
    count = len(nodes)
    nodes.append(node("Identity", [hidden], ["y"]))
    rows_in = [value("x", np.float32, [1, "rows", widths[0]])]
    graph = model(nodes, weights, rows_in, [value("y", np.float32, [1, "rows", widths[0]])])
    return Products(graph, widths[0], count, size, flops)


def _weight(
    rng: np.random.Generator, bits: int, rows: int, columns: int, block_size: int
) -> dict[str, NDArray[np.float32] | NDArray[np.uint8]]:
    if bits == 32:
        return {"float": rng.standard_normal((columns, rows), np.float32) / np.float32(np.sqrt(columns))}
    blocks = -(-columns // block_size)
    scale = np.float32(1 / (_CODE_RMS[bits] * np.sqrt(columns)))
    # Codes lie half a step below zero on average, which a chain would blow up; signs of both kinds cancel that.
    signs = rng.integers(0, 2, (rows, blocks)).astype(np.float32) * 2 - 1
    return {
        "codes": rng.integers(0, 256, (rows, blocks, block_size * bits // 8), np.uint8),
        "scales": scale * signs,
    }


def time_products(products: Products, rows: int, threads: int) -> float:
    """Seconds of one call over so many rows."""
    graph = Graph(products.graph, threads)
    shape = (1, rows, products.width)
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    binding = graph.binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(np.empty(shape, np.float32)))
    return time_calls(graph, binding)


class Attention:
    """Attention over caches, one in each of several layers, in one graph.

    Args:
        shape: of the model.
        layers: each with its own cache of keys and values.
        capacity: positions of a cache.
        threads: of the graph.
    """

    def __init__(self, shape: ModelShape, layers: int, capacity: int, threads: int) -> None:
        self.layers = layers
        self.position_bytes = 2 * layers * shape.kv_heads * shape.head_dim * 4
        self._flops_of_pair = 4 * layers * shape.heads * shape.head_dim
        self._shape = shape
        self._graph = Graph(_attention_graph(shape, layers, capacity), threads)
        rng = np.random.default_rng(2)
        cache = (1, shape.kv_heads, capacity, shape.head_dim)
        self._caches = [
            ort.OrtValue.ortvalue_from_numpy(rng.standard_normal(cache, np.float32)) for _ in range(2 * layers)
        ]

    def seconds(self, queries: int, length: int) -> float:
        """Of one call of ``queries`` new positions, the last of ``length``."""
        shape = self._shape
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        qkv = np.random.default_rng(3).standard_normal((1, queries, width), np.float32)
        binding = self._graph.binding()
        inputs: dict[str, NDArray[Any]] = {
            "qkv": qkv,
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
        }
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for layer in range(self.layers):
            for part, cache in zip(("key", "value"), self._caches[2 * layer : 2 * layer + 2], strict=True):
                binding.bind_ortvalue_input(f"past_{part}.{layer}", cache)
                binding.bind_ortvalue_output(f"present_{part}.{layer}", cache)
            attended = np.empty((1, queries, shape.heads * shape.head_dim), np.float32)
            binding.bind_ortvalue_output(f"attended.{layer}", ort.OrtValue.ortvalue_from_numpy(attended))
        return time_calls(self._graph, binding)

    def flops(self, queries: int, length: int) -> int:
        """Operations of such a call, over the pairs of a query and a key that it sees."""
        pairs = queries * (length - queries) + queries * (queries + 1) // 2
        return self._flops_of_pair * pairs


def _attention_graph(shape: ModelShape, layers: int, capacity: int) -> bytes:
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    cache = [1, shape.kv_heads, capacity, shape.head_dim]
    inputs = [
        value("qkv", np.float32, [1, "queries", width]),
        value("seqlens_k", np.int32, [1]),
        value("total_sequence_length", np.int32, []),
    ]
    outputs: list[bytes] = []
    nodes: list[bytes] = []
    angles = np.outer(np.arange(capacity), np.arange(shape.head_dim // 2) / shape.head_dim).astype(np.float32)
    for layer in range(layers):
        past: Sequence[str] = (f"past_key.{layer}", f"past_value.{layer}")
        present = (f"present_key.{layer}", f"present_value.{layer}")
        inputs += [value(name, np.float32, cache) for name in past]
        outputs += [value(name, np.float32, cache) for name in present]
        outputs.append(value(f"attended.{layer}", np.float32, [1, "queries", shape.heads * shape.head_dim]))
        nodes.append(
            node(
                "GroupQueryAttention",
                ["qkv", "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"],
                [f"attended.{layer}", *present],
                CONTRIB,
                num_heads=shape.heads,
                kv_num_heads=shape.kv_heads,
                do_rotary=1,
            )
        )
    return model(nodes, [tensor("cos", np.cos(angles)), tensor("sin", np.sin(angles))], inputs, outputs)


def time_calls(graph: Graph, binding: ort.IOBinding) -> float:
    """Seconds of one call: the lower quartile of many, each with cold caches, after a first that does not count.

    Between two calls of one kernel a model reads all its other weights, so that caches are emptied before each call.
    Other programs only ever lengthen a call, and on a busy machine the median is several times as long as the lower
    quartile; on one that has nothing else to do they agree within a few percent.
    """
    graph.run_bound(binding)
    samples: list[float] = []
    started = perf_counter()
    while len(samples) < FEWEST_CALLS or (len(samples) < MOST_CALLS and perf_counter() - started < SECONDS):
        _empty_caches()
        before = perf_counter()
        graph.run_bound(binding)
        samples.append(perf_counter() - before)
    return float(np.quantile(samples, 0.25))


def _empty_caches() -> None:
    _evicting().sum()


@functools.cache
def _evicting() -> NDArray[np.int64]:
    return np.ones(EVICTING_BYTES // 8, np.int64)
