"""Logits of transformers' own model over the same checkpoint tensors: an outside opinion on our graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ExportError
from .checkpoint import Checkpoint


def transformers_model(checkpoint: Checkpoint) -> Any:
    """The checkpoint as transformers' own model, in float32 with eager attention, ready to be run.

    Raises:
        ExportError: torch or transformers is not installed, or the checkpoint is not what its config says.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ExportError(
            f"comparing with transformers: {error}; install it with `pip install torch transformers`"
        ) from error
    config = AutoConfig.for_model(**_transformers_config(checkpoint))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    state = {name: torch.from_numpy(checkpoint.tensor(name)) for name in checkpoint.names()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ExportError(f"comparing with transformers: missing weights {missing[:3]}, unexpected {unexpected[:3]}")
    return model.eval()


def transformers_logits(checkpoint: Checkpoint, ids: Sequence[int]) -> NDArray[np.float32]:
    """Float32 logits ``[tokens, vocab_size]`` of a whole text, see `transformers_model`.

    Raises:
        ExportError: see `transformers_model`.
    """
    model = transformers_model(checkpoint)
    import torch

    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([list(ids)])).logits[0].float().numpy()
    return logits


def _transformers_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The checkpoint's config with rope in the place where transformers 5 looks for it."""
    config = {key: value for key, value in checkpoint.config.items() if key not in ("rope_theta", "rope_scaling")}
    scaling = checkpoint.config.get("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {"rope_theta": checkpoint.config.get("rope_theta", 10000.0), **scaling}
    return config
