# What quant/_native.c exports. Arrays are C-contiguous; outputs are written in place.
from typing import Any

def quantize(
    values: Any, contexts: Any, cumulative: Any, points: Any, costs: Any, bit: float, indices: Any, /
) -> None: ...
def encode(indices: Any, contexts: Any, cumulative: Any, seed: int, output: bytearray, trellis: bool, /) -> int: ...
def decode(payload: Any, contexts: Any, cumulative: Any, points: Any, values: Any, trellis: bool, /) -> int: ...
def count(values: Any, indices: Any, contexts: Any, counts: Any, sums: Any, /) -> None: ...
def multiply(inputs: Any, matrix: Any, outputs: Any, inner: int, stride: int, width: int, /) -> None: ...
def encode_hidden(
    hidden: Any,
    ids: Any,
    ordinary: Any,
    output: bytearray,
    matrix: Any,
    scales: Any,
    predicted: Any,
    predicted_scale: Any,
    limit: float,
    step: float,
    contexts: Any,
    cumulative: Any,
    points: Any,
    costs: Any,
    bit: float,
    seed: int,
    /,
) -> int: ...
