"""The Llama family: SmolLM2, Llama 2 and 3, Mistral."""

from __future__ import annotations

from typing import Any

from ...runtime.bundle import Architecture
from .common import LayerTensors, base_architecture, layer_tensors

MODEL_TYPES = ("llama", "mistral")


def architecture(config: dict[str, Any]) -> Architecture:
    """Read the numbers of a Hugging Face config. Mistral's ``sliding_window`` may be absent or null."""
    return base_architecture(config, "llama", sliding_window=config.get("sliding_window"))


def tensors(arch: Architecture, layer: int) -> LayerTensors:
    """Names of one layer's weights in the checkpoint."""
    return layer_tensors(layer, qkv_bias=arch.qkv_bias)
