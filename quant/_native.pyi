# What quant/_native.c exports. Arrays are C-contiguous; outputs are written in place.
from typing import Any

def quantize(
    values: Any, contexts: Any, cumulative: Any, gains: Any, points: Any, costs: Any, bit: float, indices: Any, /
) -> None: ...
def encode(
    indices: Any, contexts: Any, cumulative: Any, gains: Any, seed: int, output: bytearray, trellis: bool, /
) -> int: ...
def decode(
    payload: Any, contexts: Any, cumulative: Any, gains: Any, points: Any, values: Any, trellis: bool, /
) -> int: ...
def count(values: Any, indices: Any, contexts: Any, gains: Any, counts: Any, sums: Any, /) -> None: ...
def gains(values: Any, contexts: Any, found: Any, /) -> None: ...
def multiply(inputs: Any, matrix: Any, outputs: Any, inner: int, stride: int, width: int, /) -> None: ...
def encode_hidden(
    hidden: Any,
    ids: Any,
    predicted: Any,
    ordinary: bytearray,
    gains: bytearray,
    finenesses: bytearray,
    output: bytearray,
    matrix: Any,
    scales: Any,
    predicted_scale: Any,
    importance: Any,
    bias: float,
    limit: float,
    steps: Any,
    contexts: Any,
    cumulative: Any,
    points: Any,
    costs: Any,
    bit: float,
    seed: int,
    /,
) -> int: ...
