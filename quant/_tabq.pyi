# What quant/_tabq.c exports. Arrays are C-contiguous; outputs are written in place. A threshold below 0 is none.
from typing import Any

def quantize(
    hidden: Any,
    d_model: int,
    threshold: float,
    outliers: int,
    tolerance: float,
    q_min: int,
    q_max: int,
    head: Any,
    codes: Any,
    coded: Any,
    /,
) -> None: ...
def encode(
    hidden: Any, d_model: int, threshold: float, outliers: int, tolerance: float, q_min: int, q_max: int, /
) -> bytes | None: ...
def decode(payload: Any, tokens: int, hidden: Any, /) -> bool: ...
