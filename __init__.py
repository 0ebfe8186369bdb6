"""Isthmus: run a language model that is cut in two, its front on the device and its back on a server.

The public names are imported on first use, so that ``import isthmus`` costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ._version import __version__
from .errors import IsthmusError

if TYPE_CHECKING:
    from .export.export import export_bundle
    from .runtime.edge.handover import HandOver
    from .runtime.edge.model import EdgeModel
    from .runtime.sampling import Sampling
    from .runtime.server.server import BackServer

# onnxruntime writes a device id and a database below the user's folders when it is imported, unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["BackServer", "EdgeModel", "HandOver", "IsthmusError", "Sampling", "__version__", "export_bundle"]

_HOMES = {
    "BackServer": ".runtime.server.server",
    "EdgeModel": ".runtime.edge.model",
    "HandOver": ".runtime.edge.handover",
    "Sampling": ".runtime.sampling",
    "export_bundle": ".export.export",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
