"""What the split saves a server, and what one precision change saves a device: the paper's two claims, our numbers.

    python benchmarks/claims.py [--work FOLDER] [--json]

Server time per decoded token inside onnxruntime, a third of the layers being on the device, against the whole model on
the server at the same bits; one thread, over loopback, in turn. Once with the default model, of which the head is a
fifth, and once with random weights at Llama 2 7B's proportions (32 layers, its widths and vocabulary divided by 4), of
which it is a fiftieth, as in models of the size that the paper measures.

And the longest context that fits under memory ceilings with a 4-bit front, with an 8-bit one and in float, by the
estimate that the runtime checks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from synthetic import llama_config, write_checkpoint
from tabulate import tabulate

from isthmus.cli.progress import progress_bar
from isthmus.devices.budget import INTERPRETER_MB
from isthmus.export.export import export_bundle
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.bench import generate_exactly
from isthmus.runtime.edge.generate import PREFILL_CHUNK
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.memory import longest_context
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

MODEL = "smollm2-135m-instruct"
PROMPT, NEW, ROUNDS = 64, 96, 5
CEILINGS_MB = (180, 200, 250, 300)
FRONTS = {"OPSC, split 10, 4 bits": (10, 4), "split 10, 8 bits": (10, 8), "split 10, float": (10, 32)}
WHOLE = {"whole model, 4 bits": (None, 4), "whole model, float": (None, 32)}
LARGE, LARGE_LAYERS, DIVISOR = "7B's proportions", 32, 4
SERVED = {  # split and front bits by what the server runs; the back has 8
    MODEL: {"whole model": (0, 8), "two thirds": (10, 4)},
    LARGE: {"whole model": (0, 8), "two thirds": (11, 4)},
}


def exported(model: str, root: Path, split: int | None, front_bits: int) -> Path:
    """A bundle with a back of 8 bits, made if it is not in the folder."""
    out = root / f"{'all' if split is None else split}-{front_bits}-8"
    if not out.exists():
        options = {"split": split, "front_bits": front_bits, "back_bits": 8, "calibration_tokens": 0}
        export_bundle(model, out, **options, max_length=8192 if model == MODEL else None)
    return out


def large_model(root: Path) -> Path:
    """A checkpoint of random weights at the proportions of Llama 2 7B."""
    folder = root / "checkpoint"
    if not folder.exists():
        root.mkdir(exist_ok=True)
        write_checkpoint(folder, llama_config(LARGE_LAYERS, DIVISOR))
    return folder


def server_ms(bundles: dict[str, Path]) -> dict[str, float]:
    """Median ms per token inside the server's onnxruntime, by what the server runs, for a bundle each."""
    times: dict[str, list[float]] = {}
    servers = {
        name: BackServer.from_bundle(bundle / "server", threads=1, security=ServerSecurity(insecure=True))
        for name, bundle in bundles.items()
    }
    for server in servers.values():
        server.start()
    try:
        models = {
            name: EdgeModel(
                bundle / "device",
                server=servers[name].address,
                security=ChannelSecurity(insecure=True),
                codec="ids" if name == "whole model" else "raw16",
                threads=1,
            )
            for name, bundle in bundles.items()
        }
        for _ in range(ROUNDS):
            for name, model in models.items():
                _, tokens = generate_exactly(model, PROMPT, NEW)
                times.setdefault(name, []).extend(token.report.onnxruntime_s * 1e3 for token in tokens[1:])
    finally:
        for server in servers.values():
            server.stop()
    return {name: median(values) for name, values in times.items()}


def contexts(root: Path) -> list[list[object]]:
    """A row a precision: the longest context under each ceiling."""
    rows: list[list[object]] = []
    for name, (split, bits) in (FRONTS | WHOLE).items():
        bundle = open_bundle(exported(MODEL, root, split, bits) / "device", verify=False)
        rows.append(
            [
                name,
                *(
                    longest_context(bundle, chunk=PREFILL_CHUNK, limit_mb=limit, process_mb=INTERPRETER_MB)
                    for limit in CEILINGS_MB
                ),
            ]
        )
    return rows


def main() -> None:
    """Export what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where bundles are kept (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, progress_bar() as progress:
        root = args.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        models = {MODEL: (MODEL, root), LARGE: (str(large_model(root / "large")), root / "large")}
        served = {}
        for index, (name, (model, folder)) in enumerate(models.items()):
            progress(f"server, {name}", index, len(models))
            served[name] = server_ms({part: exported(model, folder, *cut) for part, cut in SERVED[name].items()})
        progress("contexts", 1, 1)
        rows = contexts(root)
    if args.json:
        print(json.dumps({"server_ms": served, "contexts": rows, "ceilings_mb": CEILINGS_MB}, indent=1))
        return
    lines = [[name, *times.values(), times["whole model"] / times["two thirds"]] for name, times in served.items()]
    headers = ["model", "the server runs the whole, ms per token", "two thirds, ms per token", "ratio"]
    print(tabulate(lines, headers, floatfmt=".2f"))
    print("\nlongest context that fits (positions; 0: not even an empty one)\n")
    print(tabulate(rows, ["device holds", *(f"{limit} MB" for limit in CEILINGS_MB)]))


if __name__ == "__main__":
    main()
