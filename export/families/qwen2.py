"""The Qwen2 family (Qwen2, Qwen2.5): Llama's layer with a bias on the query, key and value projections."""

from __future__ import annotations

from typing import Any

from ...errors import ModelError
from ...runtime.bundle import Architecture
from .common import LayerTensors, base_architecture, layer_tensors

MODEL_TYPES = ("qwen2",)


def architecture(config: dict[str, Any]) -> Architecture:
    """Read the numbers of a Hugging Face config.

    Raises:
        ModelError: only some layers use a sliding window; one graph per layer kind would be needed.
    """
    window = None
    if config.get("use_sliding_window") and config.get("sliding_window"):
        if config.get("max_window_layers", 0) not in (0, None):
            raise ModelError(
                f"max_window_layers={config['max_window_layers']}: a sliding window on some layers only is not "
                "supported; export with use_sliding_window set to false if the context stays below the window"
            )
        window = config["sliding_window"]
    return base_architecture(config, "qwen2", sliding_window=window, qkv_bias=True)


def tensors(arch: Architecture, layer: int) -> LayerTensors:
    """Names of one layer's weights in the checkpoint."""
    return layer_tensors(layer, qkv_bias=arch.qkv_bias)
