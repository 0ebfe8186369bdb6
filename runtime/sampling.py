"""How a token is chosen from logits: greedy, or an exact sample that a seed reproduces."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token. ``temperature=0`` is greedy; the other filters apply when it is positive.

    ``top_k=0``, ``top_p=1``, ``min_p=0`` and ``repetition_penalty=1`` switch a filter off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0, 100.0),
            "top_k": (0, 1 << 30),
            "top_p": (1e-9, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 1e3),
            "seed": (0, (1 << 64) - 1),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise RequestError(f"{name}={value}: must lie between {low} and {high}")
