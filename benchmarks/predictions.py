"""Predicted against measured: peak memory, time per token and bytes per token, for twelve and more configurations.

    python benchmarks/predictions.py [--work FOLDER] [--repetitions 3] [--json]

Exports the bundles that are missing in the folder, and runs each configuration in a process of its own (and a server
in another, over loopback and TLS): a prompt that fills the context but for the last tokens, which are timed, without
drafts. Prompts are what the model wrote itself, other text for each repetition, and it goes on by sampling; a codec
that is calibrated runs more often, for its bytes vary from text to text. Predictions
are those of `isthmus plan` for this machine, which is probed before each run: a shared one's speed changes within
minutes. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from processes import serving
from tabulate import tabulate

from isthmus.cli.progress import progress_bar
from isthmus.devices.backend import default_threads
from isthmus.devices.link import link_profile
from isthmus.devices.probe import probe
from isthmus.devices.profile import DeviceProfile
from isthmus.export.accuracy import find_accuracy
from isthmus.export.calibration import self_written_windows
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.export import export_bundle
from isthmus.export.families import family_of
from isthmus.export.grid import Grid
from isthmus.export.limits import Limits
from isthmus.export.plan import Candidate
from isthmus.export.sources import resolve_model

MODEL = "smollm2-135m-instruct"
TIMED_TOKENS = 48
BYTES_REPETITIONS = 16  # of a calibrated codec, whose bytes of 48 tokens vary by 9 % from text to text
CALIBRATION_TOKENS = 16384  # as the accuracy table's codecs are fitted to
LAYERS = 30
ISTHMUS = [sys.executable, "-m", "isthmus.cli.main"]
# A process's peak begins with what its parent has resident, so that a small one starts it.
PEAK = """import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)"""


@dataclass(frozen=True)
class Configuration:
    """What is run. ``codec`` is ``none`` for a model that is wholly on the device."""

    split: int
    front_bits: int
    back_bits: int
    context: int
    threads: int
    codec: str = "none"
    level: int = -1
    kv_bits: int = 32

    @property
    def bundle(self) -> str:
        """Name of the bundle's folder."""
        return f"{self.split}-{self.front_bits}-{self.back_bits}-kv{self.kv_bits}"


def configurations(threads: int) -> list[Configuration]:
    """Device alone and split, over bits, contexts and threads."""
    alone = [
        Configuration(LAYERS, bits, bits, context, count)
        for bits, context, count in ((4, 256, 1), (4, 1024, 1), (4, 1024, threads), (8, 512, 1), (8, 2048, threads))
    ]
    split = [
        Configuration(split, front, back, context, 1, codec, level)
        for split, front, back, context, codec, level in (
            (5, 4, 8, 512, "tabq", 2),
            (10, 4, 8, 256, "tabq", 2),
            (10, 4, 8, 1024, "tabq", 2),
            (10, 4, 8, 1024, "raw16", -1),
            (10, 8, 8, 512, "tabq", 1),
            (20, 4, 8, 512, "tabq", 2),
            (20, 4, 8, 1024, "tabq", 3),
            (10, 4, 8, 512, "klt", 2),
            (20, 4, 8, 512, "klt", 3),
            (25, 4, 4, 512, "raw16", -1),
        )
    ]
    quantized = [Configuration(LAYERS, 4, 4, 1024, 1, kv_bits=8)]
    return alone + quantized + split


def predict(configuration: Configuration, machine: DeviceProfile) -> Candidate:
    """The candidate of the planner's grid that is this configuration, on this machine at both ends of loopback."""
    checkpoint = open_checkpoint(resolve_model(MODEL, offline=True))
    arch = family_of(checkpoint.config).architecture(checkpoint.config)
    accuracy = find_accuracy(checkpoint.file_hashes())
    if accuracy is None:
        sys.exit(f"measure it first: isthmus eval {MODEL} --for-plan")
    limits = Limits(context=configuration.context, prompt_tokens=configuration.context - TIMED_TOKENS, max_drop=None)
    mode = "device-only" if configuration.codec == "none" else "split"
    grid = Grid(arch, accuracy, machine, link_profile("loopback"), machine, limits, modes=(mode,))
    wanted = {
        name: getattr(configuration, name) for name in ("split", "front_bits", "back_bits", "codec", "level", "kv_bits")
    }
    return next(c for c in grid.candidates() if all(getattr(c, name) == value for name, value in wanted.items()))


def prompt_of(windows: list[list[int]], context: int, repetition: int) -> list[int]:
    """What the model wrote itself and no codec was fitted to, other text for each repetition."""
    first = CALIBRATION_TOKENS // len(windows[0])
    text = [token for window in windows[first:] for token in window]
    length = context - TIMED_TOKENS
    return text[repetition * length :][:length]


def measure(folder: Path, configuration: Configuration, prompt: list[int], seed: int) -> dict[str, float]:
    """Run it in a process of its own: peak resident memory in MB, median ms and mean bytes up of the last tokens."""
    command = [*ISTHMUS, "generate", str(folder / "device"), "--prompt-ids", ",".join(map(str, prompt))]
    command += ["--temperature", "1", "--seed", str(seed)]
    command += [
        "-n",
        str(TIMED_TOKENS),
        "--context",
        str(configuration.context),
        "--threads",
        str(configuration.threads),
    ]
    command += ["--json"]
    if configuration.codec != "none":
        command += ["--codec", configuration.codec, "--draft", "off"]
    if configuration.level >= 0:
        command += ["--level", str(configuration.level)]
    with server_of(folder, configuration) as address:
        reached = ["--server", address] if address else []
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command, *reached], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(done.stderr)
    tokens = json.loads(done.stdout)["tokens"][1:]
    if len(tokens) < TIMED_TOKENS // 2:  # the text has ended; it may also go on
        return measure(folder, configuration, prompt, seed + 1000)
    return {
        "memory_mb": int(done.stderr.split()[-1]) * 1024 / 1e6,
        "ms_per_token": median(token["ms"] for token in tokens),
        "bytes_per_token": mean(token["bytes_up"] for token in tokens),
    }


@contextmanager
def server_of(folder: Path, configuration: Configuration) -> Iterator[str]:
    """A server for a split configuration; its address, empty if none is needed."""
    if configuration.codec == "none":
        yield ""
        return
    # What is predicted is a prompt that is computed.
    command = ("serve", folder / "server", "--listen", "127.0.0.1:0", "--threads", 1, "--prefix-cache", 0)
    with serving(*command) as (address, _):
        yield address


def main() -> None:
    """Export, probe, run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where bundles are kept (default: a temporary one)")
    parser.add_argument(
        "--repetitions", type=int, default=3, metavar="N", help="of each configuration (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with tempfile.TemporaryDirectory() as temporary, progress_bar() as progress:
        root = args.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        chosen = configurations(default_threads())
        for index, configuration in enumerate(chosen):
            progress(f"export {configuration.bundle}", index, len(chosen))
            if not (root / configuration.bundle).exists():
                export_bundle(
                    MODEL,
                    root / configuration.bundle,
                    split=None if configuration.split == LAYERS else configuration.split,
                    front_bits=configuration.front_bits,
                    back_bits=configuration.back_bits,
                    front_kv_bits=configuration.kv_bits,
                    calibration_tokens=CALIBRATION_TOKENS,
                )
        checkpoint = open_checkpoint(resolve_model(MODEL, offline=True))
        family = family_of(checkpoint.config)
        windows = self_written_windows(checkpoint, family, family.architecture(checkpoint.config))
        rows: list[dict[str, Any]] = []
        for index, configuration in enumerate(chosen):
            progress(f"run {configuration.bundle}", index, len(chosen))
            predicted: list[Candidate] = []
            measured: list[dict[str, float]] = []
            for repetition in range(max(args.repetitions, BYTES_REPETITIONS if configuration.codec == "klt" else 0)):
                prompt = prompt_of(windows, configuration.context, repetition)
                if repetition < args.repetitions:
                    predicted.append(predict(configuration, probe(threads=configuration.threads)))
                measured.append(measure(root / configuration.bundle, configuration, prompt, repetition))
            row: dict[str, Any] = vars(configuration) | {"uncertainty": predicted[0].time_uncertainty}
            for name, middle in (("memory_mb", median), ("ms_per_token", median), ("bytes_per_token", mean)):
                row[f"predicted_{name}"] = middle(getattr(candidate, name) for candidate in predicted)
                row[f"measured_{name}"] = middle(values[name] for values in measured)
            rows.append(row)
    print(json.dumps(rows, indent=1) if args.json else table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """For people: predicted, measured and their ratio."""
    lines = []
    for row in rows:
        codec = row["codec"] if row["level"] < 0 else f"{row['codec']} {row['level']}"
        bits = f"{row['front_bits']}/{row['back_bits']}" + ("" if row["kv_bits"] == 32 else f", KV {row['kv_bits']}")
        line = [row["split"], bits, codec, row["context"], row["threads"]]
        for name, digits in (("memory_mb", 0), ("ms_per_token", 1), ("bytes_per_token", 0)):
            predicted, measured = row[f"predicted_{name}"], row[f"measured_{name}"]
            line += [
                f"{predicted:.{digits}f} / {measured:.{digits}f}",
                f"{predicted / measured:.2f}" if measured else "",
            ]
        lines.append(line)
    headers = ["split", "bits", "codec", "context", "threads", "MB", "ratio", "ms/token", "ratio", "bytes", "ratio"]
    return "predicted / measured\n" + tabulate(lines, headers, disable_numparse=True)


if __name__ == "__main__":
    main()
