"""Print, as JSON, digests of the hidden states and logits of one text run in several chunkings.

A program and not a test: the spinning thread pool belongs to the process, so that comparing takes several.
Usage: ``python digest_chunkings.py TOKENS THREADS {spin,sleep} BUNDLE...``
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys

import numpy as np

from isthmus.devices.backend import Threads
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.segments import Embedding, Head, LayerStack


def chunkings(tokens: int) -> dict[str, list[int]]:
    """Lengths of chunks that sum to ``tokens``."""
    mixed = list(itertools.takewhile(lambda n: n < tokens, itertools.accumulate([1, 7, 2, 1, 64, 3, 1, 33, 5])))
    return {
        "whole": [tokens],
        "ones": [1] * tokens,
        "twos": [2] * (tokens // 2) + [1] * (tokens % 2),
        "mixed": np.diff([0, *mixed, tokens]).tolist(),
    }


def digests(folder: str, tokens: int, threads: Threads) -> dict[str, str]:
    halves = [open_bundle(folder, "device")]
    if not halves[0].manifest.device_only:
        halves.append(open_bundle(folder, "server"))
    stacks = [LayerStack(half, threads) for half in halves]
    head = Head(halves[-1], threads)
    ids = np.random.default_rng(3).integers(0, halves[0].manifest.architecture.vocab_size, tokens).tolist()
    rows = Embedding(halves[0]).rows(ids)
    found = {}
    for name, chunks in chunkings(tokens).items():
        sessions, digest, start = [stack.session(tokens) for stack in stacks], hashlib.sha256(), 0
        for length in chunks:
            hidden = rows[start : start + length]
            for session in sessions:
                hidden = session.forward(hidden)
            for state in hidden:
                digest.update(state.tobytes())
                digest.update(head.logits(state).tobytes())
            start += length
        found[name] = digest.hexdigest()
    return found


if __name__ == "__main__":
    _, tokens, count, waiting, *folders = sys.argv
    threads = Threads(int(count), spin=waiting == "spin")
    json.dump([digests(folder, int(tokens), threads) for folder in folders], sys.stdout)
