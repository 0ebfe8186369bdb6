"""What the codecs cost: microseconds per token to encode and to decode, and bits per element.

    python benchmarks/codec_cost.py [--bundle OUT]

Synthetic hidden states: Student's t, with a few massive channels, with the caches warm. With the device half of a
bundle also in place: one token at a time, on one thread, right after a step of the front has passed its weights
through the caches. That costs several times as much and is what a decode pays.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from isthmus.quant.codec import CODECS, make_codec
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.segments import Embedding, LayerStack

D_MODELS = (576, 4096)
TOKENS = (1, 128)
SECONDS_PER_CELL = 0.5
STEPS_IN_PLACE, WARM_UP = 300, 20


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


def measure_in_place(folder: Path) -> list[list[object]]:
    """A row a codec: medians of front, encode and decode of one token in microseconds, the codec's share in percent.

    A codec runs many steps on end, as in a decode, and is held against the front of the same steps.
    """
    bundle = open_bundle(folder, "device", verify=False)
    embedding, front = Embedding(bundle), LayerStack(bundle, 1)
    ids = np.random.default_rng(0).integers(0, bundle.manifest.architecture.vocab_size, STEPS_IN_PLACE).tolist()
    rows: list[list[object]] = []
    for name in CODECS:
        codec, session = make_codec(name), front.session(len(ids))
        times = []
        for token in ids:
            start = time.perf_counter_ns()
            hidden = session.forward(embedding.rows([token]))
            forwarded = time.perf_counter_ns()
            payload = codec.encode(hidden)
            encoded = time.perf_counter_ns()
            codec.decode(payload, *hidden.shape)
            decoded = time.perf_counter_ns()
            times.append((forwarded - start, encoded - forwarded, decoded - encoded))
        forward, encode, decode = (float(median) / 1000 for median in np.median(times[WARM_UP:], axis=0))
        rows.append([name, forward, encode, decode, encode + decode, 100 * (encode + decode) / forward])
    return rows


def main() -> None:
    """Measure every codec at every size and print a table, and one of a bundle's front if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, metavar="OUT", help="a bundle, of which the device half is read")
    args = parser.parse_args()
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
    if args.bundle:
        print("\nin place, one token after each step of the front on one thread, median\n")
        headers = ("codec", "front us", "encode us", "decode us", "both us", "share of front %")
        print(tabulate(measure_in_place(args.bundle), headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
