"""Calibrated weights: each layer on what the quantized layers before it really give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.families import family_of
from isthmus.export.families.common import EMBEDDING, ROLES
from isthmus.export.float_layer import FloatLayer
from isthmus.export.gptq import CalibratedWeights
from isthmus.quant.grids import quantize
from isthmus.quant.nbits import dequantize
from isthmus.quant.opsc import Precision

LAYERS = 4
WINDOWS = np.random.default_rng(0).integers(0, 256, (24, 96)).tolist()
FRESH = np.random.default_rng(1).integers(0, 256, (3, 96)).tolist()


class Model:
    """A tiny checkpoint's float layers."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = open_checkpoint(folder)
        self.family = family_of(self.checkpoint.config)
        self.arch = self.family.architecture(self.checkpoint.config)
        self.layers = [FloatLayer.read(self.checkpoint, self.family, self.arch, i) for i in range(self.arch.layers)]

    def calibrated(self, precision: Callable[[str], Precision]) -> CalibratedWeights:
        return CalibratedWeights(self.checkpoint, self.family, self.arch, precision, WINDOWS)

    def output(self, layers: list[FloatLayer]) -> np.ndarray:
        hidden = [self.checkpoint.tensor(EMBEDDING)[window] for window in FRESH]
        for layer in layers:
            hidden = [layer.forward(text)[0] for text in hidden]
        return np.concatenate(hidden)

    def error(self, weight: Callable[[str, np.ndarray], np.ndarray]) -> float:
        """Of the last hidden states on text that was not calibrated on, with weights replaced."""
        layers = [
            replace(layer, **{role: weight(f"layers.{i}.{role}", getattr(layer, role)) for role in ROLES})
            for i, layer in enumerate(self.layers)
        ]
        exact = self.output(self.layers)
        return float(np.square(self.output(layers) - exact).sum() / np.square(exact).sum())


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tiny: Any) -> Model:
    return Model(tiny.checkpoint(request.param))


def test_the_model_comes_closer_than_with_rounding(model: Model) -> None:
    precision = Precision(4, 32, "gptq")
    calibrated = model.calibrated(lambda name: precision)
    rounded = model.error(lambda name, weight: dequantize(quantize(weight, 4, 32)))
    assert model.error(lambda name, weight: dequantize(calibrated(name))) < 0.95 * rounded


def test_layers_that_are_not_packed_pass_through(model: Model) -> None:
    def precision(name: str) -> Precision:
        return Precision(32, 0) if name.startswith("layers.0") else Precision(4, 32, "gptq")

    calibrated = model.calibrated(precision)
    assert calibrated("layers.1.qkv").bits == 4
    with pytest.raises(KeyError):
        calibrated("layers.0.qkv")


def test_each_matrix_may_have_its_own_precision(model: Model) -> None:
    chosen = dict(zip(ROLES, (8, 4, 2, 4, 8), strict=True))
    calibrated = model.calibrated(lambda name: Precision(chosen[name.split(".")[2]], 32, "gptq", symmetric=False))
    for role, bits in chosen.items():
        packed = calibrated(f"layers.2.{role}")
        assert (packed.bits, packed.columns) == (bits, getattr(model.layers[2], role).shape[1])
        assert packed.zero_points is not None
        assert len(packed.codes) == len(getattr(model.layers[2], role))
