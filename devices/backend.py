"""The execution backend: onnxruntime's CPU provider."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import BundleError, RequestError

MINIMUM_ONNXRUNTIME = "1.30.0"  # 1.28 and 1.29 crash in these graphs

_global_pool_threads: int | None = None


def default_threads() -> int:
    """Processors that this process may use, at most four: small models gain nothing from more."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(affinity, 4)


def require_onnxruntime(minimum: str) -> None:
    """Raise `BundleError` if the installed onnxruntime is older than a bundle's ``minimum``, such as ``1.30.0``."""
    installed, needed = (tuple(int(part) for part in version.split(".")[:2]) for version in (ort.__version__, minimum))
    if installed < needed:
        raise BundleError(f"onnxruntime {ort.__version__}: this bundle needs {minimum} or newer; upgrade onnxruntime")


@dataclass(frozen=True)
class Threads:
    """How the graphs of one model share the processor.

    Attributes:
        count: threads that work on one graph.
        spin: keep waiting threads busy in one process-wide pool. It gains up to a third on an otherwise idle
            machine and loses up to half on a shared one; a device that waits for its server would burn a core
            all the while. Without it each graph has its own pool, whose threads sleep.
    """

    count: int = field(default_factory=default_threads)
    spin: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RequestError(f"threads={self.count}: must be at least 1")

    def session_options(self) -> ort.SessionOptions:
        """Options for one session.

        Raises:
            RequestError: the process spins with another number of threads already, or spins and this model should
                not; onnxruntime cannot change it.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # shapes change with every chunk length
        if self.spin:
            self._size_global_pool()
            options.use_per_session_threads = False
        elif _global_pool_threads is not None:
            raise RequestError(f"spin=False: this process already spins with {_global_pool_threads}; use a new process")
        else:
            options.intra_op_num_threads = self.count
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def _size_global_pool(self) -> None:
        global _global_pool_threads
        if _global_pool_threads is None:
            ort.set_global_thread_pool_sizes(self.count, 1)
            _global_pool_threads = self.count
        elif _global_pool_threads != self.count:
            raise RequestError(
                f"threads={self.count}: this process already spins with {_global_pool_threads}; use a new process"
            )


class Graph:
    """One opened ONNX file.

    Attributes:
        seconds: time spent inside onnxruntime by `run_bound`, summed over calls.
    """

    def __init__(self, path: Path, threads: Threads) -> None:
        self.seconds = 0.0
        try:
            self.session = ort.InferenceSession(
                str(path), threads.session_options(), providers=["CPUExecutionProvider"]
            )
        except RequestError:
            raise
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
