"""Pack a bundle half's weights for this machine, so that they are mapped instead of copied into memory.

Run it on the device, once for each bundle and onnxruntime version; the half is used as before.
"""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="DIR", help="OUT/device or OUT/server, which must be writable")


def run(args: argparse.Namespace) -> int:
    """Install, with progress on stderr."""
    from ..runtime.install import install_bundle
    from .progress import progress_bar

    with progress_bar() as progress:
        installation = install_bundle(args.bundle, progress=progress)
    print(f"{installation.folder}: {installation.graphs} graphs, {installation.bytes / 1e6:.1f} MB")
    return 0
