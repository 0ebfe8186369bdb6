"""The execution backend: onnxruntime's CPU provider."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path
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


_CPUINFO = Path("/proc/cpuinfo")


def default_threads() -> int:
    """Processors that this process may use, at most four: small models gain nothing from more."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(affinity, 4)


def require_onnxruntime(minimum: str) -> None:
    """Raise `BundleError` if the installed onnxruntime is older than a bundle's ``minimum``, such as ``1.28.0``."""
    installed, needed = (tuple(int(part) for part in version.split(".")[:2]) for version in (ort.__version__, minimum))
    if installed < needed:
        raise BundleError(f"onnxruntime {ort.__version__}: this bundle needs {minimum} or newer; upgrade onnxruntime")


@functools.cache
def _share_arena() -> None:
    """Give all sessions of this process one arena, which grows by what is asked for.

    By default each session has an arena of its own, which doubles. Blocks run one after the other, so that one serves
    all: measured on SmolLM2 with chunks of 128 tokens, 10 MB in place of 27 for three blocks, at the same speed.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = {
        "arena_extend_strategy": 1,
        "max_mem": 0,
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(as_requested))


def prepack(graph: Path, target: Path) -> None:
    """Save a graph as onnxruntime runs it on this processor: ``target`` and, with the packed weights, ``target.data``.

    Opened in place of the original it maps those weights from the file instead of packing a copy of its own.

    Raises:
        BundleError: onnxruntime cannot open the graph or write the files.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no narrower base class
        raise BundleError(f"{graph.name}: onnxruntime {ort.__version__} cannot prepack it: {error}") from error


def processor_key() -> str:
    """What packed weights depend on: onnxruntime's version, the architecture and the processor's features."""
    features = ""
    if _CPUINFO.is_file():
        lines = _CPUINFO.read_text(errors="replace").splitlines()
        names = ("flags", "Features")  # x86, Arm
        features = next((line.split(":", 1)[1] for line in lines if line.split(":")[0].strip() in names), "")
    digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:16]
    return f"onnxruntime {ort.__version__}, {platform.machine()}, features {digest}"


class Graph:
    """One opened ONNX model, with a pool of ``threads`` threads.

    Args:
        model: its file, or the bytes of one that needs no other file.
        threads: at least 1.

    Raises:
        BundleError: onnxruntime cannot open it.
    """

    def __init__(self, model: Path | bytes, threads: int) -> None:
        if threads < 1:
            raise RequestError(f"threads={threads}: must be at least 1")
        _share_arena()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # shapes change with every chunk length
        options.add_session_config_entry("session.use_env_allocators", "1")
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
        self.session.run_with_iobinding(binding)

    def run(self, inputs: dict[str, NDArray[Any]], output: str) -> NDArray[np.float32]:
        """Run once over NumPy arrays and return one output."""
        result: NDArray[np.float32] = self.session.run([output], inputs)[0]
        return result
