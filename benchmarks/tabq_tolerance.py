"""What `tabq` costs and keeps over its tolerance, on held text, against the same bundle under `raw32`.

    python benchmarks/tabq_tolerance.py [--bundle OUT] [--text FILE] [--tokens 4096]

Without a bundle the default model is exported at split 10 with a 4 bit front and an 8 bit back. Without a text the one
that ships for validation is read (about 500 tokens: a rough figure). Every byte of the payload counts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate
from tokenizers import Tokenizer
from tqdm import tqdm

from isthmus import export_bundle
from isthmus.devices.backend import default_threads
from isthmus.export.validate import log_softmax, validation_text
from isthmus.quant.codec import Codec, make_codec
from isthmus.quant.tabq import TabQ
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.segments import Embedding, Head, LayerStack

WINDOW = 512
TOLERANCES = (0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.02)


class Halves:
    """Both halves of a bundle in this process, the codec between them."""

    def __init__(self, folder: Path) -> None:
        device, server = open_bundle(folder, "device"), open_bundle(folder, "server")
        self.embedding, self.front = Embedding(device), LayerStack(device, default_threads())
        self.back, self.head = LayerStack(server, default_threads()), Head(server, default_threads())
        self.tokenizer = Tokenizer.from_file(str(device.path("tokenizer.json")))

    def hidden(self, ids: list[int]) -> NDArray[np.float32]:
        """Hidden states at the split of a window that begins a text."""
        return self.front.session(len(ids)).forward(self.embedding.rows(ids)).copy()

    def log_probabilities(self, hidden: NDArray[np.float32]) -> NDArray[np.float64]:
        """Log probabilities ``[tokens, vocabulary]`` after the back."""
        return log_softmax(self.head.logits_many(self.back.session(len(hidden)).forward(hidden)))


def measure(halves: Halves, windows: list[list[int]], codecs: dict[str, Codec]) -> list[list[object]]:
    """A row a codec: bits per element, ratio to 16 bit, KL, top-1, perplexity ratio."""
    sums = {name: np.zeros(4) for name in codecs}
    elements = tokens = 0
    for ids in tqdm(windows, desc="windows"):
        hidden = halves.hidden(ids)
        exact = halves.log_probabilities(hidden)
        elements += hidden.size
        tokens += len(ids)
        targets = (np.arange(len(ids) - 1), np.array(ids[1:]))
        for name, codec in codecs.items():
            payload = codec.encode(hidden)
            coded = halves.log_probabilities(codec.decode(payload, *hidden.shape))
            sums[name] += (
                8 * len(payload),
                (np.exp(exact) * (exact - coded)).sum(),
                (exact.argmax(1) == coded.argmax(1)).sum(),
                (exact[targets] - coded[targets]).sum(),
            )
    predicted = tokens - len(windows)
    return [
        [name, bits / elements, 16 * elements / bits, kl / tokens, agreeing / tokens, np.exp(loss / predicted)]
        for name, (bits, kl, agreeing, loss) in sums.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8").replace("\r\n", "\n") if args.text else validation_text()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.bundle
        if folder is None:
            folder = Path(scratch) / "bundle"
            export_bundle("smollm2-135m-instruct", folder, split=10)
        halves = Halves(folder)
        ids = halves.tokenizer.encode(text).ids[: args.tokens]
        windows = [ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]
        windows = [window for window in windows if len(window) > 1]
        codecs: dict[str, Codec] = {"raw16": make_codec("raw16")}
        codecs |= {f"tabq, tolerance {tolerance}": TabQ(tolerance=tolerance) for tolerance in TOLERANCES}
        rows = measure(halves, windows, codecs)
    print(f"{sum(map(len, windows))} tokens of {args.text or 'the validation text'}, windows of {WINDOW}")
    headers = ["codec", "bits/element", "ratio to 16 bit", "KL", "top-1", "perplexity ratio"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".2f", ".2f", ".5f", ".4f", ".4f")))


if __name__ == "__main__":
    main()
