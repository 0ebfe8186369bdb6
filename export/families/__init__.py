"""One file per architecture family: how its config and tensor names map onto the common graph."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ...errors import ModelError
from . import llama, qwen2

FAMILIES: dict[str, ModuleType] = {model_type: module for module in (llama, qwen2) for model_type in module.MODEL_TYPES}


def family_of(config: dict[str, Any]) -> ModuleType:
    """The family that builds a checkpoint's ``model_type``.

    Raises:
        ModelError: no family does.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r}: there are builders for {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
