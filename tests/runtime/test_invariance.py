"""Bit for bit: a token's hidden state does not depend on chunks, cuts, threads, neighbours or what was rolled back.

Every comparison here is exact. Drafting, batching and resuming are lossless only because of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.quant.opsc import BLOCK_SIZES, WEIGHT_BITS
from isthmus.runtime.back import BackEngine
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling

Models = Callable[[Path], Any]

TOKENS = 48
TEXT = np.random.default_rng(5).integers(0, 256, TOKENS).tolist()
PROMPTS = [np.random.default_rng(seed).integers(0, 256, length).tolist() for seed, length in enumerate((1, 2, 7, 30))]

Precision = dict[str, int]  # options of an export


def weights_and_cache(bits: int, kv_bits: int = 32) -> Any:
    """One precision of all weights and one of the KV cache."""
    options = {"bits": bits, "front_kv_bits": kv_bits, "back_kv_bits": kv_bits}
    return pytest.param(options, id=f"{bits}" if kv_bits == 32 else f"{bits}-kv{kv_bits}")


quantized_caches = [weights_and_cache(bits, kv_bits) for bits in (4, 32) for kv_bits in (8, 4)]
all_precisions = pytest.mark.parametrize("precision", [*map(weights_and_cache, WEIGHT_BITS), *quantized_caches])
# Mistral's window of 24 is shorter than the text; Qwen2 has biases.
all_kinds = pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "llama-wide"])


def assert_same_bits(actual: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for name, a, e in zip(("hidden states", "logits"), actual, expected, strict=True):
        assert np.array_equal(a, e), f"{name} differ by up to {np.abs(a - e).max()}"


def chunks_of(cuts: set[int]) -> list[int]:
    return np.diff([0, *sorted(cuts), TOKENS]).tolist()


@all_precisions
@all_kinds
@pytest.mark.parametrize(
    "chunks",
    [[1] * TOKENS, [2] * (TOKENS // 2), [3] * (TOKENS // 3), [1, 5, 2, 8, 1, 1, 30], [TOKENS - 1, 1]],
    ids=["ones", "twos", "threes", "mixed", "all but one"],
)
def test_any_chunking_gives_the_same_bits(
    tiny: Any, local_model: Models, kind: str, precision: Precision, chunks: list[int]
) -> None:
    model = local_model(tiny.bundle(kind, **precision))
    assert_same_bits(model.run(TEXT, chunks), model.run(TEXT, [TOKENS]))


@all_precisions
def test_a_text_longer_than_the_attention_s_own_blocks_has_the_same_bits(
    tiny: Any, local_model: Models, precision: Precision
) -> None:
    ids = np.random.default_rng(6).integers(0, 256, 500).tolist()
    model = local_model(tiny.bundle("llama", **precision))
    whole = model.run(ids, [500])
    for chunks in ([128, 128, 128, 116], [1, 255, 1, 1, 242], [300, *[1] * 200]):
        assert_same_bits(model.run(ids, chunks), whole)


@all_precisions
def test_drawn_chunkings_give_the_same_bits(tiny: Any, local_model: Models, precision: Precision) -> None:
    model = local_model(tiny.bundle("llama", **precision))
    whole = model.run(TEXT, [TOKENS])

    @settings(max_examples=25, deadline=None)
    @given(st.sets(st.integers(1, TOKENS - 1)))
    def check(cuts: set[int]) -> None:
        assert_same_bits(model.run(TEXT, chunks_of(cuts)), whole)

    check()


@pytest.mark.parametrize(("bits", "block_size"), [(bits, n) for bits, sizes in BLOCK_SIZES.items() for n in sizes])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_every_block_size_that_is_offered_keeps_the_bits(
    tiny: Any, local_model: Models, bits: int, block_size: int, symmetric: bool
) -> None:
    model = local_model(tiny.bundle("llama", bits=bits, block_size=block_size, symmetric=symmetric))
    whole = model.run(TEXT, [TOKENS])
    for chunks in ([1] * TOKENS, [3] * (TOKENS // 3), [1, 5, 2, 8, 1, 1, 30]):
        assert_same_bits(model.run(TEXT, chunks), whole)


FILLED_UP = [(2, 64), (4, 32), (4, 64), (4, 128), (8, 128)]  # where some x86 kernels compute odd rows another way


@pytest.mark.parametrize(("bits", "block_size"), FILLED_UP)
def test_rows_that_may_need_filling_up_keep_their_bits_with_any_threads_split_and_rollback(
    tiny: Any, local_model: Callable[..., Any], bits: int, block_size: int
) -> None:
    folder = tiny.bundle("llama-wide", bits=bits, block_size=block_size)
    one = local_model(folder, threads=1).run(TEXT, [TOKENS])
    for threads in (2, 3):
        for chunks in ([TOKENS], [1] * TOKENS, [1, 7, TOKENS - 8]):
            assert_same_bits(local_model(folder, threads=threads).run(TEXT, chunks), one)
    halves = local_model(tiny.bundle("llama-wide", bits=bits, block_size=block_size, split=1))
    assert_same_bits(halves.run(TEXT, [20, 1, 27]), one)
    session = halves.session(TOKENS)
    session.forward(TEXT[:16] + TEXT[: TOKENS - 16])
    session.truncate(16)
    assert_same_bits(session.forward(TEXT[16:]), (one[0][16:], one[1][16:]))


@all_precisions
@pytest.mark.parametrize("kind", ["llama", "llama-wide"])
def test_the_number_of_threads_changes_no_bit(
    tiny: Any, local_model: Callable[..., Any], kind: str, precision: Precision
) -> None:
    folder = tiny.bundle(kind, **precision)
    one = local_model(folder, threads=1).run(TEXT, [TOKENS])
    for threads in (1, 2, 3):
        for chunks in ([TOKENS], [1] * TOKENS, [2] * (TOKENS // 2), [1, 7, TOKENS - 8]):
            assert_same_bits(local_model(folder, threads=threads).run(TEXT, chunks), one)


@all_precisions
@pytest.mark.parametrize("split", [1, 2, 3])
def test_every_split_computes_what_the_unsplit_model_computes(
    tiny: Any, local_model: Models, split: int, precision: Precision
) -> None:
    whole = local_model(tiny.bundle(**precision))
    halves = local_model(tiny.bundle(**precision, split=split))
    assert_same_bits(halves.run(TEXT, [20, 1, 27]), whole.run(TEXT, [TOKENS]))


@pytest.mark.parametrize("precision", [weights_and_cache(4), weights_and_cache(8), weights_and_cache(8, 8)])
@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3, repetition_penalty=1.3)], ids=str)
def test_every_split_generates_what_the_unsplit_model_generates(
    tiny: Any, local_model: Models, split: int, precision: Precision, sampling: Sampling
) -> None:
    whole = local_model(tiny.bundle(**precision))
    halves = local_model(tiny.bundle(**precision, split=split))
    for prompt in PROMPTS:
        expected = whole.generate(prompt, 64, sampling=sampling)
        assert len(set(expected)) > 10, "the model repeats itself: too easy a test"
        assert halves.generate(prompt, 64, sampling=sampling, chunk=5) == expected


@all_precisions
@pytest.mark.parametrize("layers_per_block", [1, 3, 4])
def test_how_layers_are_cut_into_blocks_changes_no_bit(
    tiny: Any, local_model: Models, layers_per_block: int, precision: Precision
) -> None:
    blocks = local_model(tiny.bundle(**precision, layers_per_block=layers_per_block))
    pairs = local_model(tiny.bundle(**precision, layers_per_block=2))
    assert len(blocks.front.blocks) == -(-4 // layers_per_block)
    assert_same_bits(blocks.run(TEXT, [TOKENS]), pairs.run(TEXT, [TOKENS]))
    assert_same_bits(blocks.run(TEXT, [1] * TOKENS), pairs.run(TEXT, [TOKENS]))


@all_precisions
@all_kinds
@pytest.mark.parametrize("kept", [0, 1, 17, TOKENS - 1])
def test_rolling_back_leaves_no_trace(
    tiny: Any, local_model: Models, kind: str, precision: Precision, kept: int
) -> None:
    model = local_model(tiny.bundle(kind, **precision))
    expected = model.run(TEXT, [TOKENS])
    session = model.session(TOKENS)
    session.forward(TEXT[:kept] + TEXT[: TOKENS - kept]) if kept else session.forward(TEXT[::-1])
    session.truncate(kept)
    assert_same_bits(session.forward(TEXT[kept:]), (expected[0][kept:], expected[1][kept:]))


@all_precisions
def test_sessions_that_take_turns_compute_what_each_computes_alone(
    tiny: Any, local_model: Models, precision: Precision
) -> None:
    model = local_model(tiny.bundle(**precision))
    texts = [TEXT, TEXT[::-1]]
    sessions = [model.session(TOKENS) for _ in texts]
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for first in range(0, TOKENS, 6):
        for text, session, results in zip(texts, sessions, parts, strict=True):
            results.append(session.forward(text[first : first + 6]))
    for text, results in zip(texts, parts, strict=True):
        together = tuple(np.concatenate(arrays) for arrays in zip(*results, strict=True))
        assert_same_bits(together, model.run(text, [TOKENS]))


@all_precisions
def test_a_chunk_of_logits_equals_logits_one_by_one(tiny: Any, local_model: Models, precision: Precision) -> None:
    folder = tiny.bundle(**precision)
    _, expected = local_model(folder).run(TEXT, [1] * TOKENS)
    assert np.array_equal(EdgeModel(folder / "device").score(TEXT), expected)


def test_a_back_that_is_rolled_back_samples_the_same_tokens_again(tiny: Any, local_model: Models) -> None:
    folder = tiny.bundle(split=2)
    front = local_model(folder).front.session(TOKENS)
    hidden = front.forward(local_model(folder).embedding.rows(TEXT)).copy()
    session = BackEngine.open(folder / "server").new_session(
        TOKENS, Sampling(temperature=1.0, repetition_penalty=1.5, seed=1), TEXT[:8]
    )

    def sample_each(rows: np.ndarray) -> list[int]:
        tokens = []
        for row in rows:
            session.advance(row[None])
            tokens.append(session.sample())
        return tokens

    first = sample_each(hidden)
    session.truncate(8)
    assert session.length == 8
    assert sample_each(hidden[8:]) == first[8:]
