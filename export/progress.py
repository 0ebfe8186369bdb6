"""How long work tells that it goes on."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is: steps, or bytes of a download."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
