"""The progress of long commands, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

_LINE_EVERY_S = 30.0  # so that short commands leave logs as they are


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield ``progress(what, done, total)``, shown as a bar that a change of ``total`` starts anew."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from tqdm import tqdm

    bar = tqdm(total=0, bar_format="{desc:<28} {bar:30} {n_fmt}/{total_fmt} {elapsed}", leave=False)

    def progress(what: str, done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.unit_scale = total > 100_000  # bytes, not steps
        bar.set_description_str(what, refresh=True)

    try:
        yield progress
    finally:
        bar.close()


def _lines() -> Callable[[str, int, int], None]:
    """``progress`` that prints a line every `_LINE_EVERY_S`."""
    told = monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal told
        if monotonic() - told >= _LINE_EVERY_S:
            told = monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return progress
