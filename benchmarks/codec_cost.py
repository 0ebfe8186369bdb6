"""What the codecs cost: microseconds per token to encode and to decode, and bits per element.

Synthetic hidden states: Student's t, with a few massive channels. Run ``python benchmarks/codec_cost.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from isthmus.quant.codec import CODECS, make_codec
from numpy.typing import NDArray
from tabulate import tabulate

D_MODELS = (576, 4096)
TOKENS = (1, 128)
SECONDS_PER_CELL = 0.5


def synthetic_hidden(tokens: int, d_model: int) -> NDArray[np.float32]:
    """Hidden states ``[tokens, d_model]`` float32 with heavy tails and three massive channels."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_t(6, (tokens, d_model)).astype(np.float32)
    hidden[:, rng.choice(d_model, 3, replace=False)] *= np.float32(100)
    return hidden


def median_microseconds(call: Callable[[], object]) -> float:
    """Median time of one call, in microseconds, over `SECONDS_PER_CELL`."""
    call()
    times = []
    stop = time.perf_counter() + SECONDS_PER_CELL
    while time.perf_counter() < stop:
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return float(np.median(times)) / 1000


def main() -> None:
    """Measure every codec at every size and print a table."""
    rows = []
    for d_model in D_MODELS:
        for tokens in TOKENS:
            hidden = synthetic_hidden(tokens, d_model)
            for name in CODECS:
                codec = make_codec(name)
                payload = codec.encode(hidden)
                encode = median_microseconds(partial(codec.encode, hidden)) / tokens
                decode = median_microseconds(partial(codec.decode, payload, tokens, d_model)) / tokens
                bits = 8 * len(payload) / hidden.size
                rows.append((d_model, tokens, name, encode, decode, encode + decode, bits, 16 / bits))
    headers = ("d_model", "tokens", "codec", "encode us", "decode us", "both us", "bits", "vs 16 bit")
    print("per token, median; bits per element with everything counted\n")
    print(tabulate(rows, headers, floatfmt=("d", "d", "", ".1f", ".1f", ".1f", ".3f", ".1f")))


if __name__ == "__main__":
    main()
