"""The progress bar of long commands, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield ``progress(what, done, total)``, shown as a bar that a change of ``total`` starts anew."""
    from tqdm import tqdm

    bar = tqdm(total=0, bar_format="{desc:<28} {bar:30} {n_fmt}/{total_fmt} {elapsed}", leave=False, disable=None)

    def progress(what: str, done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.unit_scale = total > 100_000  # bytes, not steps
        bar.set_description_str(what, refresh=True)

    try:
        yield progress
    finally:
        bar.close()
