"""Fetch a model of the catalog and print its path."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="a catalog model, for example smollm2-135m-instruct")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="cache folder (default: $ISTHMUS_CACHE, or the user's)",
    )


def run(args: argparse.Namespace) -> int:
    """Pull the model; its path alone goes to stdout, progress to stderr."""
    from ..export.catalog import pull
    from .progress import progress_bar

    with progress_bar() as progress:
        path = pull(args.name, cache=args.cache, progress=progress)
    print(path)
    return 0
