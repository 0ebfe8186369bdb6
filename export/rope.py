"""Rotary position embedding: the cosine and sine tables that the attention operator reads.

Scaling types and formulas follow the Llama, Llama 3.1 and YaRN (arXiv 2309.00071) releases.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..runtime.bundle import Architecture

SCALINGS = ("default", "linear", "llama3", "yarn", "factors")


def rope_tables(arch: Architecture, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine ``[positions, head_dim / 2]``, float32.

    Raises:
        ModelError: the checkpoint's rope scaling has no formula here, or lacks a number.
    """
    exponents = np.arange(0, arch.head_dim, 2, dtype=np.float64) / arch.head_dim
    inverse = arch.rope_theta**-exponents
    scaling = arch.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    attention_factor = 1.0
    try:
        match kind:
            case "default":
                pass
            case "linear":
                inverse = inverse / float(scaling["factor"])
            case "llama3":
                inverse = _llama3(inverse, scaling)
            case "yarn":
                inverse, attention_factor = _yarn(inverse, scaling, arch)
            case "factors":
                inverse = inverse / np.asarray(scaling["factors"], np.float64)
            case _:
                raise ModelError(f"rope scaling {kind!r}: supported are {', '.join(SCALINGS)}")
    except KeyError as error:
        raise ModelError(f"rope scaling {kind!r}: the checkpoint's config has no {error.args[0]!r} for it") from error
    # float32 from here on, as transformers computes it: the tables then agree to the last bit or nearly.
    angles = np.outer(np.arange(positions, dtype=np.float32), inverse.astype(np.float32))
    return (
        (np.cos(angles) * np.float32(attention_factor)).astype(np.float32),
        (np.sin(angles) * np.float32(attention_factor)).astype(np.float32),
    )


def _llama3(inverse: NDArray[np.float64], scaling: dict[str, Any]) -> NDArray[np.float64]:
    """Slow down low frequencies by ``factor``, keep high ones, blend in between."""
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    turns = original * inverse / (2 * math.pi)  # rotations within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * inverse / factor + blend * inverse


def _yarn(
    inverse: NDArray[np.float64], scaling: dict[str, Any], arch: Architecture
) -> tuple[NDArray[np.float64], float]:
    """YaRN's ramp between interpolated and original frequencies, and its attention temperature."""
    factor = float(scaling["factor"])
    original = float(scaling.get("original_max_position_embeddings") or arch.max_positions)
    beta_fast, beta_slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)

    def dimension(rotations: float) -> float:
        return arch.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(arch.rope_theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, arch.head_dim - 1)
    ramp = np.clip((np.arange(len(inverse)) - low) / max(high - low, 0.001), 0.0, 1.0)
    given = scaling.get("attention_factor")
    attention_factor = float(given) if given is not None else 0.1 * math.log(factor) + 1.0
    return inverse / factor * ramp + inverse * (1 - ramp), attention_factor
