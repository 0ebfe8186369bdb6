"""Embedding rows, the KV cache and its bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from isthmus.devices.backend import Graph
from isthmus.errors import BundleError, RequestError
from isthmus.quant.kv import KV_BITS
from isthmus.quant.nbits import dequantize, quantize_rtn
from isthmus.quant.opsc import WEIGHT_BITS
from isthmus.runtime.back import BackEngine
from isthmus.runtime.bundle import KVSpec, open_bundle
from isthmus.runtime.segments import MAX_LANES, Embedding, KVCache, LayerStack

Models = Callable[[Path], Any]

IDS = [0, 255, 7, 7, 128]


def expected_rows(checkpoint: Path, bits: int) -> np.ndarray:
    table = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    if bits >= 16:
        return table.astype(np.float16 if bits == 16 else np.float32).astype(np.float32)[IDS]
    return dequantize(quantize_rtn(table, bits, 32))[IDS]


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize(("kind", "split"), [("llama", None), ("llama", 2), ("llama-untied", None)])
def test_embedding_rows_are_the_table_s_at_its_precision(tiny: Any, bits: int, kind: str, split: int | None) -> None:
    bundle = open_bundle(tiny.bundle(kind, bits=bits, split=split), "device")
    rows = Embedding(bundle).rows(IDS)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, expected_rows(tiny.checkpoint(kind), bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("split", [None, 2], ids=["in the head's file", "in its own"])
def test_embedding_rows_have_their_zero_points(tiny: Any, bits: int, split: int | None) -> None:
    bundle = open_bundle(tiny.bundle(bits=bits, split=split, symmetric=False), "device")
    table = load_file(tiny.checkpoint() / "model.safetensors")["model.embed_tokens.weight"]
    expected = dequantize(quantize_rtn(table, bits, 32, symmetric=False))
    assert np.array_equal(Embedding(bundle).rows(IDS), expected[IDS])


def test_a_tied_packed_table_is_stored_once(tiny: Any) -> None:
    tied, untied, split = (
        open_bundle(tiny.bundle(kind, bits=4, split=at), "device")
        for kind, at in (("llama", None), ("llama-untied", None), ("llama", 2))
    )
    assert tied.segments("embed")[0].data_file == tied.segments("head")[0].data_file
    assert untied.segments("embed")[0].data_file != untied.segments("head")[0].data_file
    assert not split.segments("head")
    assert not (tied.folder / "embed.data").exists()


def test_a_table_and_a_head_of_different_precision_are_stored_apart(tiny: Any) -> None:
    bundle = open_bundle(tiny.bundle(bits=4, embed_bits=8), "device")
    assert np.array_equal(Embedding(bundle).rows(IDS), expected_rows(tiny.checkpoint("llama"), 8))


@pytest.mark.parametrize("token", [-1, 256, 1 << 40])
def test_an_id_outside_the_vocabulary_is_refused(tiny: Any, token: int) -> None:
    embedding = Embedding(open_bundle(tiny.bundle(), "device"))
    with pytest.raises(RequestError, match=f"token id {token}: must lie between 0 and 255"):
        embedding.rows([3, token])


@pytest.mark.parametrize("bits", KV_BITS)
def test_a_cache_is_as_large_as_it_says_and_keeps_spare_rows(bits: int) -> None:
    spec = KVSpec(bits, kv_heads=2, head_dim=16)
    cache = KVCache(range(3, 6), spec, capacity=10)
    taken = sum(value.tensor_size_in_bytes() for value in cache.values.values())
    assert taken == spec.cache_bytes(3, 10) == 2 * 3 * 2 * 12 * 16 * bits // 8
    assert spec.token_bytes(3) == taken // 12
    assert {layer for _, layer in cache.values} == {3, 4, 5}


def test_each_half_counts_the_bytes_of_its_own_cache(tiny: Any, local_model: Models) -> None:
    folder = tiny.bundle(split=1, front_kv_bits=4, back_kv_bits=8)
    front, back = local_model(folder).stacks
    assert [front.kv_bytes(10), back.kv_bytes(10)] == [1 * 2 * 2 * 12 * 8, 3 * 2 * 2 * 12 * 16]
    assert BackEngine.open(folder / "server").kv_bytes(10) == back.kv_bytes(10)
    for stack in (front, back):
        values = stack.session(10).cache.values.values()
        assert sum(value.tensor_size_in_bytes() for value in values) == stack.kv_bytes(10)


@pytest.mark.parametrize("length", [-1, 6])
def test_rolling_back_to_where_nothing_is_is_refused(tiny: Any, local_model: Models, length: int) -> None:
    session = local_model(tiny.bundle()).session(8)
    session.forward([1, 2, 3, 4, 5])
    with pytest.raises(RequestError, match=f"roll back to {length}: must lie between 0 and 5"):
        session.truncate(length)


def test_a_session_takes_its_capacity_and_not_one_more(tiny: Any, local_model: Models) -> None:
    model = local_model(tiny.bundle())
    session = model.session(8)
    session.forward([1, 2, 3, 4, 5])
    with pytest.raises(RequestError, match="5 positions and 4 more: this session was opened for 8"):
        session.forward([1, 2, 3, 4])
    # The refusal changed nothing, and the last position is as good as in a larger session.
    hidden, _ = session.forward([6, 7, 8])
    assert np.array_equal(hidden, model.session(100).forward([1, 2, 3, 4, 5, 6, 7, 8])[0][5:])


def test_more_chunk_lengths_than_there_are_buffers_give_the_same_hidden_states(tiny: Any, local_model: Models) -> None:
    lengths = [*range(1, MAX_LANES + 4), *range(MAX_LANES + 3, 0, -1)]
    ids = np.random.default_rng(0).integers(0, 256, sum(lengths)).tolist()
    model = local_model(tiny.bundle())
    assert np.array_equal(model.run(ids, lengths)[0], model.run(ids, [len(ids)])[0])


def test_a_graph_that_onnxruntime_cannot_open_is_named(tmp_path: Path) -> None:
    (tmp_path / "block.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"block\.onnx: onnxruntime .* cannot open it"):
        Graph(tmp_path / "block.onnx", 1)


@pytest.mark.parametrize("threads", [0, -2])
def test_fewer_threads_than_one_are_refused(tiny: Any, threads: int) -> None:
    with pytest.raises(RequestError, match=f"threads={threads}: must be at least 1"):
        Graph(tiny.bundle() / "device" / "head.onnx", threads)


def test_a_bundle_for_a_newer_onnxruntime_is_refused(tiny):
    bundle = open_bundle(tiny.bundle(bits=4), "device")
    newer = replace(bundle, manifest=replace(bundle.manifest, minimum_onnxruntime="99.0.0"))
    with pytest.raises(BundleError, match=r"needs 99\.0\.0"):
        LayerStack(newer, 1)


@pytest.mark.parametrize("bits", KV_BITS)
def test_keys_and_values_taken_out_and_appended_elsewhere_are_the_same_cache(tiny: Any, bits: int) -> None:
    bundle = open_bundle(tiny.bundle(front_kv_bits=bits), "device")
    hidden = np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)
    stack = LayerStack(bundle, 1)
    one, other = stack.session(12), stack.session(12)
    one.forward(hidden[:6])
    for first, last in ((0, 1), (1, 5), (5, 6)):
        rows = one.cache.rows(first, last)
        assert rows.shape == (4, 2, 2, last - first, bundle.kv.row_width)
        other.cache.append(rows)
    assert other.cache.length == 6
    assert np.array_equal(other.cache.rows(0, 6), one.cache.rows(0, 6))
    assert np.array_equal(other.forward(hidden[6:]), one.forward(hidden[6:]))


def test_keys_and_values_beyond_a_cache_are_refused() -> None:
    cache = KVCache(range(2), KVSpec(32, 1, 8), 4)
    cache.append(np.zeros((2, 2, 1, 3, 8), np.float32))
    with pytest.raises(RequestError, match="5 positions: this session was opened for 4"):
        cache.append(np.zeros((2, 2, 1, 2, 8), np.float32))
    for first, last in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(RequestError, match="must lie between 0 and 3"):
            cache.rows(first, last)
