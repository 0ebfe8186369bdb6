"""Precision assignment: one point where it changes, everything else refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import ExportError
from isthmus.quant.opsc import WEIGHT_BITS, Recipe

RECIPE = Recipe(layers=6, split=2, front_bits=4, back_bits=8, embed_bits=8, head_bits=16, block_size=32)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.sampled_from(WEIGHT_BITS))
def test_precision_changes_at_the_split_and_nowhere_else(layers_and_split: tuple[int, int], front_bits: int) -> None:
    layers, split = layers_and_split
    recipe = replace(RECIPE, layers=layers, split=split, front_bits=front_bits)
    assert [recipe.layer_bits(layer) for layer in range(layers)] == [front_bits] * split + [8] * (layers - split)


@pytest.mark.parametrize("split", [-1, 7])
def test_a_split_outside_the_model_is_refused(split: int) -> None:
    with pytest.raises(ExportError, match=rf"split {split}: must lie between 0 and 6.*--split all"):
        replace(RECIPE, split=split)


@pytest.mark.parametrize("name", ["front_bits", "back_bits", "embed_bits", "head_bits"])
@pytest.mark.parametrize("bits", [-4, 0, 1, 3, 5, 6, 12, 64])
def test_bits_that_no_kernel_has_are_refused(name: str, bits: int) -> None:
    with pytest.raises(ExportError, match=rf"{name}={bits}: must be one of 2, 4, 8, 16, 32"):
        replace(RECIPE, **{name: bits})


@pytest.mark.parametrize("name", ["front_kv_bits", "back_kv_bits"])
@pytest.mark.parametrize("bits", [-8, 0, 2, 5, 16, 64])
def test_kv_bits_that_no_kernel_has_are_refused(name: str, bits: int) -> None:
    with pytest.raises(ExportError, match=rf"{name}={bits}: must be one of 4, 8, 32"):
        replace(RECIPE, **{name: bits})


@pytest.mark.parametrize("block_size", [0, 8, 24, 48, 256])
def test_block_sizes_that_no_precision_has_are_refused(block_size: int) -> None:
    with pytest.raises(ExportError, match=rf"block_size={block_size}: must be 16, 32, 64 or 128"):
        replace(RECIPE, block_size=block_size)


@pytest.mark.parametrize("name", ["front_bits", "back_bits", "head_bits"])
def test_block_sizes_that_the_operator_computes_in_float_are_refused(name: str) -> None:
    float_recipe = replace(RECIPE, front_bits=32, back_bits=32, embed_bits=32, head_bits=32, block_size=16)
    with pytest.raises(ExportError, match=rf"block_size=16: with {name}=2 must be one of 32, 64, 128"):
        replace(float_recipe, **{name: 2})
