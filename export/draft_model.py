"""The draft as a torch module: a square map, one decoder layer, a norm and a trimmed vocabulary.

It reads the hidden states at the split, of every position, and guesses the tokens that the whole model chooses next. In
a chain of drafts each drafted token goes through the real front before the next one is guessed, so that training on
whole texts at once is what happens at run time, too: nothing is fed back that was guessed from a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.bundle import Architecture
from .checkpoint import Checkpoint
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .rope import rope_tables

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class DraftShape:
    """What decides a draft's size.

    Attributes:
        arch: of the model that it drafts for.
        d_ff: width of its gated MLP.
        vocabulary: how many ids it can draft.
    """

    arch: Architecture
    d_ff: int
    vocabulary: int


class DraftModel(nn.Module):  # type: ignore[misc]
    """See the module. Its parameters carry the names under which `isthmus.export.draft_segment` writes them."""

    def __init__(self, shape: DraftShape, positions: int) -> None:
        super().__init__()
        arch = shape.arch
        d, width = arch.d_model, arch.head_dim
        self.shape = shape
        sizes = {
            "map": (d, d),
            "query": (arch.heads * width, d),
            "key": (arch.kv_heads * width, d),
            "value": (arch.kv_heads * width, d),
            "attention_output": (d, arch.heads * width),
            "gate": (shape.d_ff, d),
            "up": (shape.d_ff, d),
            "down": (d, shape.d_ff),
            "head": (shape.vocabulary, d),
            "input_norm": (d,),
            "post_norm": (d,),
            "final_norm": (d,),
        }
        self.weights = nn.ParameterDict({name: torch.zeros(size) for name, size in sizes.items()})
        cos, sin = rope_tables(arch, positions)
        self.register_buffer("cos", torch.from_numpy(cos), persistent=False)
        self.register_buffer("sin", torch.from_numpy(sin), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Features ``[texts, tokens, d_model]``, normed for the head, of hidden states at the split of that shape."""
        w, arch = self.weights, self.shape.arch
        texts, tokens, _ = hidden.shape
        residual = functional.linear(hidden, w["map"])
        normed = self._norm(residual, w["input_norm"])

        def heads(name: str, count: int) -> Tensor:
            return functional.linear(normed, w[name]).view(texts, tokens, count, arch.head_dim).transpose(1, 2)

        query, key = (self._rotate(heads(name, n)) for name, n in (("query", arch.heads), ("key", arch.kv_heads)))
        attended = functional.scaled_dot_product_attention(
            query, key, heads("value", arch.kv_heads), is_causal=True, enable_gqa=True
        )
        residual = residual + functional.linear(attended.transpose(1, 2).flatten(2), w["attention_output"])
        normed = self._norm(residual, w["post_norm"])
        gated = functional.silu(functional.linear(normed, w["gate"])) * functional.linear(normed, w["up"])
        return self._norm(residual + functional.linear(gated, w["down"]), w["final_norm"])

    def logits(self, features: Tensor) -> Tensor:
        """Logits over the trimmed vocabulary of what `forward` gave."""
        return functional.linear(features, self.weights["head"])

    def arrays(self) -> dict[str, Floats]:
        """Its weights by name."""
        return {name: value.detach().float().numpy() for name, value in self.weights.items()}

    def _norm(self, values: Tensor, gamma: Tensor) -> Tensor:
        return functional.rms_norm(values, gamma.shape, gamma.to(values.dtype), self.shape.arch.norm_epsilon)

    def _rotate(self, values: Tensor) -> Tensor:
        cos, sin = self.cos[: values.shape[2]], self.sin[: values.shape[2]]
        first, second = values.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(values.dtype)


def initial_weights(
    checkpoint: Checkpoint,
    family: ModuleType,
    shape: DraftShape,
    vocabulary: NDArray[np.int64],
    square_map: Floats,
    use: Floats,
) -> dict[str, Floats]:
    """The checkpoint's last layer and head, cut to a draft's shape.

    Args:
        checkpoint: the model.
        family: its builder.
        shape: of the draft.
        vocabulary: its ids.
        square_map: ``[d_model, d_model]``, from a hidden state at the split to one that the last layer can read.
        use: how much each of the last layer's ``d_ff`` components does; the draft gets those that do most.
    """
    names, read = family.tensors(shape.arch, shape.arch.layers - 1), checkpoint.tensor
    kept = np.sort(np.argsort(use)[-shape.d_ff :])
    return {
        "map": square_map,
        "query": read(names.query),
        "key": read(names.key),
        "value": read(names.value),
        "attention_output": read(names.attention_output),
        "gate": read(names.gate)[kept],
        "up": read(names.up)[kept],
        "down": read(names.down)[:, kept],
        "head": read(EMBEDDING if shape.arch.tied_embeddings else HEAD)[vocabulary],
        "input_norm": read(names.input_norm),
        "post_norm": read(names.post_norm),
        "final_norm": read(FINAL_NORM),
    }


def load_weights(model: DraftModel, weights: Mapping[str, Any]) -> None:
    """Copy arrays into a model."""
    with torch.no_grad():
        for name, value in model.weights.items():
            value.copy_(torch.as_tensor(np.asarray(weights[name])))
