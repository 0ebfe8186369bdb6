"""The probe's graphs do the products and the attention that they claim to time."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.devices import kernels
from isthmus.devices.backend import Graph
from isthmus.devices.kernels import Attention, ModelShape, product_chain, time_products
from isthmus.errors import BundleError

TINY = ModelShape(d_model=64, d_ff=96, heads=4, kv_heads=2, head_dim=16)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SECONDS", 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_a_chain_has_the_weights_that_it_counts_and_keeps_activations_of_size_one(bits: int) -> None:
    chain = product_chain(bits, (64, 96), 200_000, 32)
    pair = 2 * 64 * 96
    stored = pair * 4 if bits == 32 else pair * bits // 8 + pair // 32 * 4
    assert chain.count == 2 * -(-200_000 // stored)
    assert chain.weight_bytes == chain.count // 2 * stored
    assert chain.flops == chain.count * 2 * 64 * 96
    assert len(chain.graph) > chain.weight_bytes
    x = np.random.default_rng(0).standard_normal((1, 5, 64), np.float32)
    y = Graph(chain.graph, 1).run({"x": x}, "y")
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    assert 0.01 < np.std(y) < 100


def test_weights_of_a_chain_differ() -> None:
    chain = product_chain(4, (64, 64), 10_000, 32)
    assert chain.count == 4
    x = np.ones((1, 2, 64), np.float32)
    single = product_chain(4, (64, 64), 1, 32)
    assert not np.allclose(Graph(chain.graph, 1).run({"x": x}, "y"), Graph(single.graph, 1).run({"x": x}, "y"))


@pytest.mark.parametrize("rows", [1, 7])
def test_a_chain_takes_time(rows: int) -> None:
    assert time_products(product_chain(4, (64, 96), 10_000, 32), rows, 1) > 0


def test_attention_runs_at_every_length_and_counts_the_pairs_that_a_query_sees() -> None:
    attention = Attention(TINY, layers=3, capacity=64, threads=1)
    assert attention.position_bytes == 3 * 2 * TINY.kv_heads * TINY.head_dim * 4
    for queries, length in ((1, 1), (2, 64), (16, 16), (16, 64)):
        assert attention.seconds(queries, length) > 0
        pairs = sum(length - queries + 1 + query for query in range(queries))
        assert attention.flops(queries, length) == 4 * 3 * TINY.heads * TINY.head_dim * pairs


def test_attention_reads_the_caches_and_writes_new_positions_into_them() -> None:
    attention = Attention(TINY, layers=1, capacity=32, threads=1)
    before = [cache.numpy().copy() for cache in attention._caches]
    attention.seconds(4, 32)
    for old, cache in zip(before, attention._caches, strict=True):
        changed = (old != cache.numpy()).any(axis=(0, 1, 3))
        assert changed.tolist() == [False] * 28 + [True] * 4


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(BundleError, match="graph: onnxruntime"):
        Graph(b"not a model", 1)
