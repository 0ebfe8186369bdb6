"""Installing a bundle half on the machine that runs it: its weights packed once, and mapped from then on.

onnxruntime packs weights for the processor when it opens a graph and keeps the copy in memory of its own. Installed,
the packed form lies in files beside the bundle's: less memory that the system cannot take back, on twice the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..devices.backend import prepack, processor_key
from ..errors import BundleError
from .bundle import INSTALL_RECORD, INSTALLED, FileEntry, Half, open_bundle


@dataclass(frozen=True)
class Installation:
    """What `install_bundle` wrote.

    Attributes:
        folder: below the bundle half.
        graphs: how many were packed.
        bytes: of all files.
    """

    folder: Path
    graphs: int
    bytes: int


def install_bundle(
    folder: str | Path, half: Half | None = None, *, progress: Callable[[str, int, int], None] = lambda *call: None
) -> Installation:
    """Pack the weights of a bundle half for this processor and this onnxruntime.

    An earlier installation is replaced, at once when all is written.

    Args:
        folder: the half's folder, or the bundle's.
        half: which half, where the folder does not tell.
        progress: called before each graph.

    Raises:
        BundleError: no intact half there, one without weights, or its folder cannot be written to.
    """
    bundle = open_bundle(folder, half, use_installed=False)
    segments = [segment for half in bundle.with_own_back() for segment in half.segments() if segment.graph_file]
    if not segments:
        raise BundleError(
            f"{bundle.folder}: this half holds no weights to pack, and needs no installation; install the server half"
        )
    staging = bundle.path(f".{INSTALLED}.partial-{os.getpid()}")
    try:
        staging.mkdir()
        for index, segment in enumerate(segments):
            progress(segment.name, index, len(segments))
            prepack(bundle.path(segment.graph_file), staging / segment.graph_file)
        progress("written", len(segments), len(segments))
        entries = [FileEntry.of(path) for path in sorted(staging.iterdir())]
        record = {
            "manifest_sha256": bundle.manifest_sha256,
            "processor": processor_key(),
            "files": [asdict(entry) for entry in entries],
        }
        (staging / INSTALL_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        target = bundle.path(INSTALLED)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    except OSError as error:
        raise BundleError(
            f"{bundle.folder}: cannot write the packed weights there ({error}); make room for as many bytes as the "
            "half has, or copy it to a folder of yours"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Installation(target, len(segments), sum(entry.bytes for entry in entries))
