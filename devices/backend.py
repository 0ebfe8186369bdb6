"""The execution backend: onnxruntime's CPU provider."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import BundleError, RequestError

MINIMUM_ONNXRUNTIME = "1.28.0"  # the first with an int8 path for 2-bit weights

# A waiting thread stays awake for so long before it sleeps. Matrix products follow each other within that time, blocks
# and steps do not. Measured with two threads on SmolLM2's decode: 47 % more tokens than without, and within a tenth
# where other processes want the cores. onnxruntime's default (milliseconds) halves them there, and burns a core while a
# device waits for its server.
SPIN_MICROSECONDS = 20


def default_threads() -> int:
    """Processors that this process may use, at most four: small models gain nothing from more."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(affinity, 4)


def require_onnxruntime(minimum: str) -> None:
    """Raise `BundleError` if the installed onnxruntime is older than a bundle's ``minimum``, such as ``1.28.0``."""
    installed, needed = (tuple(int(part) for part in version.split(".")[:2]) for version in (ort.__version__, minimum))
    if installed < needed:
        raise BundleError(f"onnxruntime {ort.__version__}: this bundle needs {minimum} or newer; upgrade onnxruntime")


class Graph:
    """One opened ONNX model, with a pool of ``threads`` threads.

    Args:
        model: its file, or the bytes of one that needs no other file.
        threads: at least 1.

    Attributes:
        seconds: time spent inside onnxruntime by `run_bound`, summed over calls.

    Raises:
        BundleError: onnxruntime cannot open it.
    """

    def __init__(self, model: Path | bytes, threads: int) -> None:
        self.seconds = 0.0
        if threads < 1:
            raise RequestError(f"threads={threads}: must be at least 1")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # shapes change with every chunk length
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
        try:
            source = model if isinstance(model, bytes) else str(model)
            self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no narrower base class
            name = "graph" if isinstance(model, bytes) else model.name
            raise BundleError(f"{name}: onnxruntime {ort.__version__} cannot open it: {error}") from error

    def binding(self) -> ort.IOBinding:
        """A fresh set of input and output bindings."""
        return self.session.io_binding()

    def run_bound(self, binding: ort.IOBinding) -> None:
        """Run once over bound memory."""
        started = perf_counter()
        self.session.run_with_iobinding(binding)
        self.seconds += perf_counter() - started

    def run(self, inputs: dict[str, NDArray[Any]], output: str) -> NDArray[np.float32]:
        """Run once over NumPy arrays and return one output."""
        result: NDArray[np.float32] = self.session.run([output], inputs)[0]
        return result
