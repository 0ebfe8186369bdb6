"""The baselines of benchmarks/tables compute what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

FOLDER = Path(__file__).parent.parent / "benchmarks" / "tables"


def load(name: str) -> ModuleType:
    """A script as a module, under a name that hides no other module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def codecs() -> ModuleType:
    return load("codecs")


@pytest.fixture(scope="module")
def schemes() -> ModuleType:
    pytest.importorskip("torch")
    return load("schemes")


def hidden_states(tokens: int) -> NDArray[np.float32]:
    hidden = np.random.default_rng(1).standard_t(4, (tokens, 64)).astype(np.float32)
    hidden[0, 3] = 20000  # an attention sink
    hidden[-1, 5:] = 0
    return hidden


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("bits", [4, 8])
def test_uniform_codes_are_within_half_a_step(codecs: ModuleType, tokens: int, bits: int) -> None:
    hidden = hidden_states(tokens)
    codec = codecs.Uniform(bits)
    payload = codec.encode(hidden)
    assert len(payload) == 8 * tokens + tokens * 64 * bits // 8
    step = (hidden.max(1) - hidden.min(1)) / (2**bits - 1)
    assert (np.abs(codec.decode(payload, tokens, 64) - hidden) <= 0.501 * step[:, None]).all()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_entropy_coder_gives_every_code_back(codecs: ModuleType, tokens: int, bits: int) -> None:
    hidden = hidden_states(tokens)
    hidden[tokens // 2] = np.linspace(-1, 1, 64)  # codes beyond the tables: escapes
    codec = codecs.EntropyCoded(bits)
    span = np.maximum(hidden.max(1), 0) - np.minimum(hidden.min(1), 0)
    scales = (span / np.float32(2**bits - 1))[:, None]
    payload = codec.encode(hidden)
    np.testing.assert_array_equal(codec.decode(payload, tokens, 64), np.rint(hidden / scales) * scales)


@pytest.mark.parametrize("frame", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_a_low_pass_keeps_what_is_low(codecs: ModuleType, tokens: int, frame: bool) -> None:
    smooth = np.tile(np.cos(np.linspace(0, 2 * np.pi, 64, endpoint=False)), (tokens, 1)).astype(np.float32)
    for share, tolerance in ((1.0, 1e-3), (0.25, 1e-3)):
        codec = codecs.LowPass(share, frame)
        payload = codec.encode(smooth)
        assert len(payload) == pytest.approx(4 + share * 4 * tokens * 33, rel=0.1)
        np.testing.assert_allclose(codec.decode(payload, tokens, 64), smooth, atol=tolerance)
    alternating = smooth * np.where(np.arange(64) % 2, 1, -1).astype(np.float32)
    cut = codecs.LowPass(0.25, frame)
    np.testing.assert_allclose(cut.decode(cut.encode(alternating), tokens, 64), 0, atol=1e-3)


def test_rounding_to_many_bits_changes_next_to_nothing(schemes: ModuleType) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 96, generator=generator)
    inputs[:, 5] *= 50
    group = schemes.Group(0, torch.randn(24, 96, generator=generator), inputs, after_norm=True)
    expected = group.inputs @ group.weight.T
    for scheme, tolerance in (
        (schemes.round_to_nearest(16), 1e-3),
        (schemes.smooth_quant(16), 1e-3),
        (schemes.omniquant_style(16), 1e-3),
        (schemes.isthmus(1, 8, 8), 2e-2),
    ):
        rounded = scheme(group)
        actual = rounded.transform(inputs) @ rounded.weight.T
        assert float((actual - expected).norm() / expected.norm()) < tolerance


def test_schemes_lower_the_error_of_plain_rounding_in_order(schemes: ModuleType) -> None:
    """One channel fifty times the others, as language models have them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 192, generator=generator)
    inputs[:, 5] *= 50
    group = schemes.Group(0, torch.randn(32, 192, generator=generator), inputs, after_norm=True)
    expected = group.inputs @ group.weight.T

    def error(scheme: object) -> float:
        rounded = scheme(group)  # type: ignore[operator]
        return float((rounded.transform(inputs) @ rounded.weight.T - expected).norm())

    errors = [
        error(scheme)
        for scheme in (
            schemes.round_to_nearest(4),
            schemes.smooth_quant(4),
            schemes.omniquant_style(4),
            schemes.atom_style(4),
            schemes.smooth_quant(8),
        )
    ]
    assert errors == sorted(errors, reverse=True)


def test_atoms_outliers_keep_eight_bits(schemes: ModuleType) -> None:
    import torch

    inputs = torch.randn(50, 160, generator=torch.Generator().manual_seed(0))
    inputs[:, 7:39] *= 20
    group = schemes.Group(0, torch.ones(4, 160), inputs, after_norm=False)
    rounded = schemes.atom_style(4)(group)
    outliers = rounded.transform(inputs)[:, 128:]
    kept = {tuple(column) for column in inputs[:, 7:39].T.argsort(dim=1).tolist()}
    assert len(kept) == outliers.shape[1] == schemes.OUTLIERS
    largest = inputs[:, 7:39].abs().amax(1)
    wanted, given = inputs[:, 7:39].abs().sort(dim=1).values, outliers.abs().sort(dim=1).values
    assert ((wanted - given).abs() <= 0.51 * largest[:, None] / 127).all()
    assert rounded.weight_bits == (4 * 128 + 8 * 32 + 16 * 2) / 160
