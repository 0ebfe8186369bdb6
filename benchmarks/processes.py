"""Commands of Isthmus that serve, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple


class Serving(NamedTuple):
    """A command that serves.

    Attributes:
        address: ``HOST:PORT``, as it says on its first line.
        process: its number.
    """

    address: str
    process: int


@contextmanager
def serving(*arguments: object, cores: Sequence[int] = ()) -> Iterator[Serving]:
    """Run ``isthmus`` with arguments until the end of the ``with``, on some cores if they are given."""
    with subprocess.Popen(
        [sys.executable, "-m", "isthmus.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
    ) as process:
        try:
            line = process.stdout.readline() if process.stdout is not None else ""
            if " on " not in line:
                sys.exit(f"isthmus {arguments[0]} did not start")
            yield Serving(line.split(" on ")[1].split()[0], process.pid)
        finally:
            process.terminate()
