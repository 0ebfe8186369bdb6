"""How often a draft agrees with the full model, by its confidence: measured on given texts through both halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..devices.backend import default_threads
from ..errors import BundleError
from .bundle import Bundle, open_bundle
from .chain import HEAD_ROWS, Chain, chunks
from .draft_bundle import open_draft, write_exits
from .edge.generate import PREFILL_CHUNK
from .exits import ExitCurve
from .segments import Head, LayerStack

Progress = Callable[[str, int, int], None]  # what, done, in all


class ExitText(NamedTuple):
    """A text to measure on.

    Attributes:
        ids: of its tokens.
        written: bool, same length: the model wrote the token; exits are measured there only.
    """

    ids: Sequence[int]
    written: NDArray[np.bool_]


class Measured(NamedTuple):
    """What a draft said of the written tokens of a text, ``[tokens]`` each.

    Attributes:
        confidence: the draft's probability of its likeliest token.
        agreed: whether that is the full model's likeliest, too.
    """

    confidence: NDArray[np.float32]
    agreed: NDArray[np.bool_]


def measure_exits(
    device: Bundle,
    server: Bundle,
    texts: Sequence[ExitText],
    *,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Measured]:
    """Run texts through both halves and the draft, and compare their greedy choices; nothing is lost to a codec.

    Args:
        device: with a draft.
        server: of the same export.
        texts: each no longer than the context.
        threads: of onnxruntime; by default the processors at hand, at most four.
        progress: called after each text.

    Raises:
        BundleError: there is no draft, or the halves do not fit.
    """
    draft = open_draft(device)
    if draft is None:
        raise BundleError(f"{device.folder} holds no draft to exit with; run `isthmus distill`")
    chain = Chain(device, server, threads=threads)
    layer = LayerStack(draft.bundle, threads or 1).session(device.manifest.max_length)
    head = Head(draft.bundle, threads or 1)
    results = []
    for number, text in enumerate(texts):
        chain.truncate(0)
        layer.cache.truncate(0)
        hidden = chain.front(text.ids)
        final = chain.back(hidden)
        features = np.concatenate([layer.forward(hidden[rows]).copy() for rows in chunks(len(hidden), PREFILL_CHUNK)])
        at = np.flatnonzero(text.written[1:])  # the positions before the written ones
        parts: list[Measured] = []
        for rows in chunks(len(at), HEAD_ROWS):
            guesses, shares = most_likely(head.logits_many(features[at[rows]]))
            chosen = chain.logits(final[at[rows]]).argmax(axis=1)
            parts.append(Measured(shares, draft.vocabulary[guesses] == chosen))
        results.append(Measured(*(np.concatenate(each) for each in zip(*parts, strict=True))) if parts else _NONE)
        progress("measuring exits", number + 1, len(texts))
    return results


def calibrate_exits(
    out: str | Path, texts: Sequence[ExitText], text: str, *, progress: Progress = lambda what, done, total: None
) -> ExitCurve:
    """Measure the exits of ``out/device/draft`` against ``out/server``, and put the curve into the draft's record.

    Args:
        out: what an export wrote.
        texts: that the draft was not trained on.
        text: what they are, for people.
        progress: see `measure_exits`.

    Raises:
        BundleError: a half or the draft is missing, or the record cannot be written.
    """
    device = open_bundle(out, "device")
    server = open_bundle(device.folder.parent / "server", "server")
    measured = measure_exits(device, server, texts, threads=default_threads(), progress=progress)
    curve = ExitCurve.of(measured, text)
    write_exits(device, curve)
    return curve


_NONE = Measured(np.zeros(0, np.float32), np.zeros(0, np.bool_))


def most_likely(logits: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The likeliest row of logits ``[tokens, rows]``, and its probability."""
    best = logits.argmax(axis=1)
    shares = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return best, shares
