"""What a plan must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..devices.budget import INTERPRETER_MB
from ..errors import PlanError


@dataclass(frozen=True)
class Limits:
    """What a plan must keep. None: no limit.

    Attributes:
        memory_mb: resident memory of the device's process.
        context: positions of a generation, prompt included.
        prompt_tokens: of them, in the prompt.
        deadline_ms: for each token but the first.
        first_token_ms: for the first.
        max_drop: expected increase in perplexity, in percent.
        server_memory_mb: resident memory of the server's process.
        sessions: generations that share the server, which computes their steps one after the other.

    Raises:
        PlanError: a limit that nothing can keep.
    """

    memory_mb: float | None = None
    context: int = 1024
    prompt_tokens: int = 128
    deadline_ms: float | None = None
    first_token_ms: float | None = None
    max_drop: float | None = 5.0
    server_memory_mb: float | None = None
    sessions: int = 1

    def __post_init__(self) -> None:
        if self.sessions < 1:
            raise PlanError(f"sessions={self.sessions}: must be at least 1")
        for name in ("memory_mb", "deadline_ms", "first_token_ms", "max_drop", "server_memory_mb"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise PlanError(f"{name}={value}: must be positive")
        if self.memory_mb is not None and self.memory_mb < INTERPRETER_MB:
            raise PlanError(
                f"memory {self.memory_mb:.0f} MB: the interpreter and its libraries alone take {INTERPRETER_MB:.0f} MB"
            )
        if not 1 <= self.prompt_tokens < self.context:
            raise PlanError(
                f"prompt of {self.prompt_tokens} tokens in a context of {self.context}: must be 1 to {self.context - 1}"
            )

    def bounds(self) -> dict[str, tuple[str, float]]:
        """Limits that are set: name -> the candidate's field that it bounds, and the bound."""
        fields = {
            "memory_mb": "memory_mb",
            "deadline_ms": "worst_ms",
            "first_token_ms": "ttft_ms",
            "max_drop": "drop",
            "server_memory_mb": "server_memory_mb",
        }
        return {name: (field, getattr(self, name)) for name, field in fields.items() if getattr(self, name) is not None}
