"""Rotary tables against transformers' own, at the settings of released models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isthmus.errors import ModelError
from isthmus.export.rope import rope_tables
from isthmus.runtime.bundle import Architecture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Llama 3.1's, Qwen2.5's for long context, Llama 2's stretched, and a model that scales nothing.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES = {
    "default": (10000.0, None),
    "linear": (10000.0, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (500000.0, LLAMA3),
    "yarn": (1000000.0, YARN),
    "yarn with betas": (1000000.0, YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn with attention factor": (1000000.0, YARN | {"attention_factor": 1.25}),
    "yarn untruncated": (1000000.0, YARN | {"truncate": False}),
}


def architecture(theta: float, scaling: dict[str, Any] | None, head_dim: int = 128) -> Architecture:
    return Architecture(
        family="llama",
        layers=1,
        d_model=4 * head_dim,
        heads=4,
        kv_heads=4,
        head_dim=head_dim,
        d_ff=64,
        vocab_size=16,
        norm_epsilon=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=131072,
        tied_embeddings=True,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_tables_equal_those_of_transformers(case: str, head_dim: int) -> None:
    theta, scaling = CASES[case]
    arch = architecture(theta, scaling, head_dim)
    config = transformers.LlamaConfig(
        hidden_size=arch.d_model,
        num_attention_heads=arch.heads,
        head_dim=head_dim,
        max_position_embeddings=arch.max_positions,
        rope_parameters={"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = 4096
    expected = rotary(torch.zeros(1), torch.arange(positions)[None])
    for table, reference in zip(rope_tables(arch, positions), expected, strict=True):
        assert table.shape == (positions, head_dim // 2)
        assert table.dtype == np.float32
        # Frequencies that differ in the last bit are 4096 * 2**-24 apart at the last position.
        np.testing.assert_allclose(table, reference[0, :, : head_dim // 2].numpy(), atol=5e-4)
        np.testing.assert_allclose(table[:64], reference[0, :64, : head_dim // 2].numpy(), atol=1e-5)


def test_factors_divide_the_frequencies_one_by_one() -> None:
    factors = np.linspace(1.0, 8.0, 8)
    plain = rope_tables(architecture(10000.0, None, 16), 2)
    scaled = rope_tables(architecture(10000.0, {"rope_type": "factors", "factors": factors.tolist()}, 16), 2)
    np.testing.assert_allclose(
        np.arctan2(scaled[1][1], scaled[0][1]), np.arctan2(plain[1][1], plain[0][1]) / factors, rtol=1e-5
    )


def test_an_unknown_scaling_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="rope scaling 'dynamic': supported are default, linear, llama3"):
        rope_tables(architecture(10000.0, {"rope_type": "dynamic", "factor": 2.0}), 4)
