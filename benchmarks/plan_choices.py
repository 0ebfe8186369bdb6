"""The planner's choice against three fixed ones, predicted and measured, for eight pairs of a device and a link.

    python benchmarks/plan_choices.py [--work FOLDER] [--memory SIZE] [--predict] [--json]

The fixed choices: all layers on the device at 4 bits, half and half at 4 and 8 bits, all on the server at 8 bits by
token ids. A device is this machine with one thread and the share of its time that makes 4-bit decoding as fast as the
profile says, held by a control group; a link is `isthmus link`; the server is this machine with one thread on another
core. What is predicted is predicted for these emulated devices. Nothing else should run. ``--memory`` is a limit for
all devices, in place of what each has free; a choice that breaks it does not count. All answer the same chat prompts;
fixed choices do not draft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from processes import serving
from tabulate import tabulate

from isthmus.cli.progress import progress_bar
from isthmus.devices.budget import parse_megabytes
from isthmus.devices.limits import limited
from isthmus.devices.link import LinkProfile, link_profile
from isthmus.devices.probe import probe
from isthmus.devices.profile import DeviceProfile, load_profile
from isthmus.export.accuracy import find_accuracy
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.export import export_bundle
from isthmus.export.families import family_of
from isthmus.export.grid import Grid
from isthmus.export.limits import Limits
from isthmus.export.plan import Candidate
from isthmus.export.planner import search
from isthmus.export.shipped_drafts import shipped_figures
from isthmus.export.sources import resolve_model

MODEL = "smollm2-135m-instruct"
DEVICES = ("raspberry-pi-zero-2-w", "raspberry-pi-4", "raspberry-pi-5", "android-mid-range")
LINKS = ("wifi", "lte")
CONTEXT, PROMPT, NEW = 192, 64, 64
MAX_DROP = 5.0
CALIBRATION_TOKENS = 16384
FIXED = {
    "all on device": {"mode": "device-only", "front_bits": 4, "kv_bits": 32},
    "half and half": {
        "mode": "split",
        "split": 15,
        "front_bits": 4,
        "back_bits": 8,
        "kv_bits": 32,
        "codec": "klt",
        "level": 2,
        "draft_length": 0,
    },
    "all on server": {"mode": "server-only", "back_bits": 8},
}
PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Write a short letter to a friend who has moved to another town.",
    "What should I think of before I buy a used bicycle?",
)


def emulated(device: DeviceProfile, host: DeviceProfile) -> tuple[DeviceProfile, float]:
    """This machine slowed down to a device, with that device's memory; and the share of its time."""
    share = min(1.0, device.decode_gb_s[4] / host.decode_gb_s[4])
    slowed = replace(
        host,
        name=device.name,
        free_mb=min(device.free_mb, host.total_mb),
        bandwidth_gb_s=host.bandwidth_gb_s * share,
        decode_gb_s={bits: rate * share for bits, rate in host.decode_gb_s.items()},
        prefill_gflops={bits: rate * share for bits, rate in host.prefill_gflops.items()},
        attention_gb_s=host.attention_gb_s * share,
        attention_gflops=host.attention_gflops * share,
        op_us=host.op_us / share,
        call_us=host.call_us / share,
    )
    return slowed, share


def bundle_of(root: Path, candidate: Candidate) -> Path:
    """The bundle of a candidate, exported if it is missing."""
    split = 0 if candidate.mode == "server-only" else candidate.split
    folder = root / f"{split}-{candidate.front_bits}-{candidate.back_bits}-kv{candidate.kv_bits}"
    if not folder.exists():
        export_bundle(
            MODEL,
            folder,
            split=None if candidate.mode == "device-only" else split,
            front_bits=candidate.front_bits,
            back_bits=candidate.back_bits,
            front_kv_bits=candidate.kv_bits,
            calibration_tokens=CALIBRATION_TOKENS,
        )
    return folder


def measure(folder: Path, candidate: Candidate, link: LinkProfile, share: float) -> float:
    """Mean ms per token after the first, on the emulated device over the emulated link."""
    command = [sys.executable, "-m", "isthmus.cli.main"]
    generate = [
        *command,
        "generate",
        str(folder / "device"),
        "--chat",
        "-n",
        str(NEW),
        "--context",
        str(CONTEXT),
        "--threads",
        "1",
        "--json",
    ]
    if candidate.draft_length:
        generate += ["--draft-length", str(candidate.draft_length)]
    elif candidate.mode != "device-only":
        generate += ["--draft", "off"]
    with ExitStack() as stack:
        if candidate.mode != "device-only":
            serve = ("serve", folder / "server", "--listen", "127.0.0.1:0", "--threads", 1, "--prefix-cache", 0)
            address, _ = stack.enter_context(serving(*serve, cores=[1]))
            shape = ["--rtt", f"{link.rtt_ms}ms", "--jitter", f"{link.jitter_ms}ms", "--loss", f"{link.loss}"]
            shape += ["--rate-up", f"{link.up_mbit_s}mbit", "--rate-down", f"{link.down_mbit_s}mbit"]
            link_address, _ = stack.enter_context(
                serving("link", "--listen", "127.0.0.1:0", "--connect", address, *shape)
            )
            generate += ["--server", link_address]
        if candidate.level >= 0:
            generate += ["--codec", candidate.codec, "--level", str(candidate.level)]
        elif candidate.mode == "split":
            generate += ["--codec", candidate.codec]
        limits = stack.enter_context(limited(cpus=1, cpu_time=share if share < 1 else None))
        seconds, tokens = 0.0, 0
        for prompt in PROMPTS:
            command = [*generate, "-p", prompt]
            done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limits.enter)
            if done.returncode:
                sys.exit(done.stderr)
            result = json.loads(done.stdout)
            tokens += result["new_tokens"] - 1
            seconds += (result["new_tokens"] - 1) / result["decode_tokens_per_s"]
    return 1e3 * seconds / tokens


def choices(grid: Grid) -> dict[str, Candidate | None]:
    """The planner's choice and the fixed ones, None if a fixed one is not in the grid."""
    candidates = grid.candidates()

    def fixed(wanted: dict[str, Any]) -> Candidate | None:
        return next((c for c in candidates if all(getattr(c, key) == value for key, value in wanted.items())), None)

    return {"plan": search(grid).chosen} | {name: fixed(wanted) for name, wanted in FIXED.items()}


def main() -> None:
    """Plan, export, run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where bundles are kept (default: a temporary one)")
    parser.add_argument("--memory", metavar="SIZE", help="limit of all devices' processes, such as 220MB")
    parser.add_argument("--predict", action="store_true", help="run nothing but the probe")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    checkpoint = open_checkpoint(resolve_model(MODEL))
    arch = family_of(checkpoint.config).architecture(checkpoint.config)
    files = checkpoint.file_hashes()
    accuracy, drafts = find_accuracy(files), shipped_figures(files)
    if accuracy is None:
        sys.exit(f"measure it first: isthmus eval {MODEL} --for-plan")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, progress_bar() as progress:
        root = args.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        host = probe(threads=1, progress=progress)
        pairs = [(device, link) for device in DEVICES for link in LINKS]
        for index, (device, link) in enumerate(pairs):
            progress(f"{device}, {link}", index, len(pairs))
            machine, share = emulated(load_profile(device), host)
            memory_mb = parse_megabytes(args.memory) if args.memory else load_profile(device).free_mb
            limits = Limits(memory_mb=memory_mb, context=CONTEXT, prompt_tokens=PROMPT, max_drop=MAX_DROP)
            grid = Grid(arch, accuracy, machine, link_profile(link), host, limits, threads=1, drafts=drafts)
            for name, candidate in choices(grid).items():
                if candidate is None:
                    continue
                row = {"device": device, "link": link, "choice": name, "fits": grid.feasible(candidate)}
                row |= {"share": share, "predicted_ms": candidate.ms_per_token} | candidate.to_dict()
                if row["fits"] and not args.predict:
                    folder = bundle_of(root, candidate)
                    row["measured_ms"] = measure(folder, candidate, link_profile(link), share)
                rows.append(row)
    print(json.dumps(rows, indent=1) if args.json else table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """For people: a line a pair, predicted / measured ms per token of each choice."""
    lines = []
    for pair in dict.fromkeys((row["device"], row["link"]) for row in rows):
        mine = {row["choice"]: row for row in rows if (row["device"], row["link"]) == pair}
        chosen = mine["plan"]
        bits = f"{chosen['front_bits']}/{chosen['back_bits']}"
        codec = chosen["codec"] if chosen["level"] is None else f"{chosen['codec']} {chosen['level']}"
        drafts = f", {chosen['draft_length']} drafts" if chosen["draft_length"] else ""
        line = [*pair, f"{chosen['mode']}, {chosen['split']}, {bits}, {codec}{drafts}"]
        for name in ("plan", *FIXED):
            row = mine[name]
            measured = f" / {row['measured_ms']:.1f}" if "measured_ms" in row else ""
            line.append(f"{row['predicted_ms']:.1f}{measured}" if row["fits"] else "breaks a limit")
        lines.append(line)
    return tabulate(lines, ["device", "link", "plan", "plan ms", *FIXED], disable_numparse=True)


if __name__ == "__main__":
    main()
