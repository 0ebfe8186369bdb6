"""Peak memory of an export, over the number of layers, at the shapes of Llama 2 7B.

    python benchmarks/export_memory.py [--layers 11,16] [--scratch DIR]

Writes synthetic float16 checkpoints (0.4 GB a layer, 0.5 GB for the vocabulary), exports each in a process of its own
and extrapolates the straight line through the peaks to 32 layers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from synthetic import llama_config, write_checkpoint
from tabulate import tabulate

FULL_LAYERS = 32
EXPORT = """
import sys
from isthmus import export_bundle
from isthmus.devices.memory import AnonymousPeak, process_memory
with AnonymousPeak() as anonymous:
    export_bundle(sys.argv[1], sys.argv[2], split=1)
print(process_memory().peak_resident_mb, anonymous.peak_mb)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="11,16", help="numbers of layers to measure")
    parser.add_argument("--scratch", type=Path, help="folder with some gigabytes of room")
    args = parser.parse_args()
    counts = [int(part) for part in args.layers.split(",")]
    peaks: list[tuple[float, float]] = []
    for layers in counts:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            checkpoint, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
            write_checkpoint(checkpoint, llama_config(layers))
            command = [sys.executable, "-c", EXPORT, str(checkpoint), str(out)]
            resident, anonymous = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            peaks.append((float(resident), float(anonymous)))
    slopes, bases = np.polyfit(counts, peaks, 1)
    config = llama_config(FULL_LAYERS)
    width, feed = config["hidden_size"], config["intermediate_size"]
    layer_mb = 4 * (4 * width * width + 3 * width * feed) / 1e6
    rows = [[layers, *peak] for layers, peak in zip(counts, peaks, strict=True)]
    rows.append([f"{FULL_LAYERS} (extrapolated)", *(bases + slopes * FULL_LAYERS)])
    print(f"one layer in float32: {layer_mb:.0f} MB")
    print(tabulate(rows, headers=["layers", "peak resident MB", "peak anonymous MB"], floatfmt=".0f"))


if __name__ == "__main__":
    main()
