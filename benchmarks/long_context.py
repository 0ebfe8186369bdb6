"""What a guess costs over the length of the text, and what a bounded cache of keys and values could save of it.

    python benchmarks/long_context.py --bundle OUT [--threads 1] [--rounds 30] [--json]

Times of one position and of five through the front, of one guess of the trained draft behind it, and of one n-gram
look-up, for texts of random tokens of growing length; lengths in turns, medians. A draft, or a second front, whose
cache is bounded, as TriForce's is (arXiv 2404.11912), would take what it does at the bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from tabulate import tabulate

from isthmus import Sampling
from isthmus.cli.progress import progress_bar
from isthmus.errors import IsthmusError, RequestError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.draft_bundle import open_draft
from isthmus.runtime.edge.ngrams import NGramIndex
from isthmus.runtime.edge.trained_draft import TrainedDraft
from isthmus.runtime.edge.unsent_text import UnsentText
from isthmus.runtime.segments import Embedding, LayerStack

LENGTHS = (128, 256, 512, 1024, 2000)
BOUND = 256
CHUNK = 5  # a token and four drafts
PARTS = ("front_of_5", "front", "guess", "look_up")


def measure(folder: Path, threads: int, rounds: int) -> list[dict[str, float]]:
    """A row a length: its ``tokens``, and ms of each of `PARTS`.

    Raises:
        RequestError: the bundle has no draft, or is for shorter texts.
        BundleError: no bundle there.
    """
    bundle = open_bundle(folder, "device")
    draft = open_draft(bundle)
    if draft is None:
        raise RequestError(f"{folder}: has no trained draft; export the default model at split 10")
    if bundle.manifest.max_length <= LENGTHS[-1]:
        raise RequestError(
            f"{folder}: exported for {bundle.manifest.max_length} positions, {LENGTHS[-1] + 1} are needed"
        )
    rng, vocabulary = np.random.default_rng(0), bundle.manifest.architecture.vocab_size
    stack, trained, embedding = LayerStack(bundle, threads), TrainedDraft(draft, threads), Embedding(bundle)
    texts: list[tuple[UnsentText, NGramIndex]] = []
    for length in LENGTHS:
        ids = rng.integers(vocabulary, size=length).tolist()
        sessions = stack.session(length + 1), trained.session(length + 1, Sampling(), ids)
        text = UnsentText(embedding, *sessions, ids, chunk_limit=128, max_new_tokens=1, end_tokens=())
        while text.behind:
            text.run(text.chunk)
        text.draft.guesses(ids, 1)
        index = NGramIndex()
        index.extend(ids)
        texts.append((text, index))
    times: list[dict[str, list[float]]] = [{part: [] for part in PARTS} for _ in LENGTHS]
    with progress_bar() as progress:
        for number in range(rounds):
            progress("rounds", number, rounds)
            for (text, index), found in zip(texts, times, strict=True):
                ids, end = text.ids, len(text.ids)
                text.draft.truncate(end - 1)
                marks = [perf_counter()]
                for rows in (CHUNK, 1):
                    text.front.cache.truncate(end - rows)
                    hidden = text.front.forward(embedding.rows(ids[-rows:]))
                    marks.append(perf_counter())
                text.draft.observe(hidden)
                text.draft.guesses(ids, 1)
                marks.append(perf_counter())
                index.follow(ids)
                marks.append(perf_counter())
                for part, (begin, finish) in zip(PARTS, pairwise(marks), strict=True):
                    found[part].append(1e3 * (finish - begin))
    return [
        {"tokens": length} | {part: median(values) for part, values in found.items()}
        for length, found in zip(LENGTHS, times, strict=True)
    ]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT", help="with a trained draft")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args = parser.parse_args()
    try:
        rows: list[dict[str, Any]] = measure(args.bundle, args.threads, args.rounds)
    except IsthmusError as error:
        print(f"long_context: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(rows))
        return 0
    bound = next(row["guess"] for row in rows if row["tokens"] == BOUND)
    lines = [[*row.values(), 100 * max(0.0, row["guess"] - bound) / (row["front"] + row["guess"])] for row in rows]
    headers = ["tokens", *(f"{part.replace('_', ' ')}, ms" for part in PARTS), f"a draft's cache of {BOUND} saves, %"]
    print(tabulate(lines, headers, floatfmt=("d", ".2f", ".2f", ".2f", ".3f", ".1f")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
