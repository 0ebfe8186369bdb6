"""What a quantized KV cache costs and saves: quality, speed and bytes, against the same weights with a float cache.

    python benchmarks/kv_cache.py [--text FILE] [--tokens 4096] [--calibration FILE]

The default model is exported at split 10 with a 4 bit front and an 8 bit back, once for each pair of KV bits, and both
halves run in this process without a codec between them. Without a text the one that ships for validation is read, for
the scales and for the quality (about 500 tokens: a rough figure). The first window of the text has 1024 tokens, the
others 512. Speeds are medians over runs that alternate between the bundles; decode is at the end of a prompt of that
length.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate
from tokenizers import Tokenizer
from tqdm import tqdm

from isthmus import export_bundle
from isthmus.export.validate import log_softmax, validation_text
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.generate import PREFILL_CHUNK
from isthmus.runtime.segments import Embedding, Head, LayerStack

KV_BITS = ((32, 32), (8, 8), (4, 4), (8, 32), (32, 8), (4, 32), (32, 4))  # front, back
FIRST_WINDOW, WINDOW = 1024, 512
LENGTHS = (128, 1024)
DECODED = 24
ROWS = 64  # logits of that many tokens are in memory at a time


class Chain:
    """Both halves of a bundle, one after the other."""

    def __init__(self, folder: Path, threads: int) -> None:
        device, server = open_bundle(folder, "device", verify=False), open_bundle(folder, "server", verify=False)
        self.manifest = device.manifest
        self._embedding = Embedding(device)
        self._stacks = [LayerStack(device, threads), LayerStack(server, threads)]
        self._head = Head(server, threads)
        self.tokenizer = Tokenizer.from_file(str(device.path("tokenizer.json")))

    def token_bytes(self) -> int:
        """Bytes of KV cache for each token of context, both sides together."""
        return sum(spec.token_bytes(self.manifest.half_layers(half)) for half, spec in self.manifest.kv.items())

    def hidden(self, ids: list[int]) -> NDArray[np.float32]:
        """Hidden states ``[tokens, d_model]`` after the last layer, of a window that begins a text."""
        hidden = self._embedding.rows(ids)
        for stack in self._stacks:
            hidden = stack.session(len(ids)).forward(hidden)
        return hidden.copy()

    def log_probabilities(self, hidden: NDArray[np.float32]) -> NDArray[np.float64]:
        """Log probabilities ``[tokens, vocabulary]`` of hidden states after the last layer."""
        return log_softmax(self._head.logits_many(hidden))

    def speeds(self, ids: list[int]) -> tuple[float, float]:
        """Tokens/s of a prefill in the runtime's chunks, and of the decode after it."""
        sessions = [stack.session(len(ids) + DECODED) for stack in self._stacks]

        def step(part: list[int]) -> None:
            hidden = self._embedding.rows(part)
            for session in sessions:
                hidden = session.forward(hidden)
            self._head.logits(hidden[-1])

        started = perf_counter()
        for first in range(0, len(ids), PREFILL_CHUNK):
            step(ids[first : first + PREFILL_CHUNK])
        prefilled = perf_counter()
        times = []
        for token in ids[:DECODED]:
            before = perf_counter()
            step([token])
            times.append(perf_counter() - before)
        return len(ids) / (prefilled - started), 1 / median(times)


def quality(chains: list[Chain], windows: list[list[int]]) -> NDArray[np.float64]:
    """KL, top-1 agreement and perplexity ratio of each chain ``[chains, 3]``, against the first."""
    sums = np.zeros((len(chains), 3))
    for ids in tqdm(windows, desc="quality"):
        hidden = [chain.hidden(ids) for chain in chains]
        for first in range(0, len(ids), ROWS):
            rows = slice(first, first + ROWS)
            following = np.array(ids[first + 1 : first + 1 + ROWS])
            targets = (np.arange(len(following)), following)
            exact = chains[0].log_probabilities(hidden[0][rows])
            weights = np.exp(exact)
            for row, chain, states in zip(sums, chains, hidden, strict=True):
                coded = chain.log_probabilities(states[rows])
                row += (
                    np.vdot(weights, exact - coded),
                    (exact.argmax(1) == coded.argmax(1)).sum(),
                    (exact[targets] - coded[targets]).sum(),
                )
    tokens = sum(map(len, windows))
    sums /= (tokens, tokens, tokens - len(windows))
    sums[:, 2] = np.exp(sums[:, 2])
    return sums


def speeds(chains: list[Chain], repetitions: int) -> list[list[float]]:
    """For each chain and length: median prefill and decode tokens/s, each followed by its ratio to the first chain."""
    columns: list[list[float]] = [[] for _ in chains]
    for length in LENGTHS:
        ids = np.random.default_rng(0).integers(chains[0].manifest.architecture.vocab_size, size=length).tolist()
        samples = np.array(
            [[chain.speeds(ids) for chain in chains] for _ in tqdm(range(repetitions + 1), desc=f"speed at {length}")][
                1:
            ]
        )
        medians = np.median(samples, axis=0)
        ratios = np.median(samples / samples[:, :1], axis=0)
        for column, speed, ratio in zip(columns, medians, ratios, strict=True):
            column += [speed[0], ratio[0], speed[1], ratio[1]]
    return columns


def main() -> None:
    """Export, measure, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--split", type=int, default=10)
    parser.add_argument("--text", type=Path, help="on which quality is measured")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text from which the scales are measured")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    text = args.text.read_bytes().decode().replace("\r\n", "\n") if args.text else validation_text()
    with tempfile.TemporaryDirectory() as scratch:
        chains: list[Chain] = []
        calibration = None
        for front, back in tqdm(KV_BITS, desc="exports"):
            folder = Path(scratch) / f"{front}-{back}"
            export_bundle(
                args.model,
                folder,
                split=args.split,
                front_kv_bits=front,
                back_kv_bits=back,
                calibration_windows=calibration,
            )
            chains.append(Chain(folder, args.threads))
            if args.calibration and calibration is None:
                ids = chains[0].tokenizer.encode(args.calibration.read_text(encoding="utf-8")).ids
                ids = ids[: args.calibration_tokens]
                calibration = [ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]
        ids = chains[0].tokenizer.encode(text).ids[: args.tokens]
        windows = [ids[:FIRST_WINDOW]]
        windows += [ids[first : first + WINDOW] for first in range(FIRST_WINDOW, len(ids), WINDOW)]
        windows = [window for window in windows if len(window) > 1]
        measured = quality(chains, windows)
        timed = speeds(chains, args.repetitions)
    names = [[front, back] for front, back in KV_BITS]
    print(f"{sum(map(len, windows))} tokens of {args.text or 'the validation text'}")
    headers = ["front", "back", "bytes/token", "KL", "top-1", "perplexity ratio"]
    rows = [[*name, chain.token_bytes(), *row] for name, chain, row in zip(names, chains, measured, strict=True)]
    print(tabulate(rows, headers, floatfmt=("", "", "", ".5f", ".4f", ".4f")))
    print(f"\ntokens/s, {args.threads} thread(s), {args.repetitions} alternating runs; ratio to 32 bits")
    headers = ["front", "back", *(c for n in LENGTHS for c in (f"prefill {n}", "ratio", f"decode at {n}", "ratio"))]
    rows = [[*name, *row] for name, row in zip(names, timed, strict=True)]
    print(tabulate(rows, headers, floatfmt=("", "", *(".1f", ".2f") * 4)))


if __name__ == "__main__":
    main()
