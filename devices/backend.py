"""The execution backend: onnxruntime's CPU provider over one process-wide thread pool."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import BundleError, IsthmusError

MINIMUM_ONNXRUNTIME = "1.28.0"  # the first with an int8 path for 2-bit weights; 4 and 8 bits would run from 1.24

log = logging.getLogger(__name__)
_pool_threads: int | None = None


def use_threads(threads: int) -> None:
    """Size the process-wide pool, once, before the first session opens.

    With a pool per session, four segments in sequence run 2.7 times slower.

    Raises:
        IsthmusError: another size was chosen before; onnxruntime cannot change it in a running process.
    """
    global _pool_threads
    if threads < 1:
        raise IsthmusError(f"threads={threads}: must be at least 1")
    if _pool_threads is None:
        ort.set_default_logger_severity(3)
        ort.set_global_thread_pool_sizes(threads, 1)
        _pool_threads = threads
    elif _pool_threads != threads:
        raise IsthmusError(
            f"threads={threads}: this process already runs its pool with {_pool_threads}; a new process can change it"
        )


class Graph:
    """One opened ONNX file.

    Attributes:
        seconds: time spent inside onnxruntime by `run_bound`, summed over calls.
    """

    def __init__(self, path: Path) -> None:
        if _pool_threads is None:
            use_threads(default_threads())
        self.seconds = 0.0
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.enable_mem_pattern = False  # shapes change with every chunk length
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no narrower base class
            raise BundleError(f"{path.name}: onnxruntime {ort.__version__} cannot open it: {error}") from error

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


def default_threads() -> int:
    """Processors that this process may use, at most four: small models gain nothing from more."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(affinity, 4)
