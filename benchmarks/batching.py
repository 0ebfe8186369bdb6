"""Sessions that advance together against sessions that take turns: tokens/s and time per token, side by side.

    python benchmarks/batching.py --bundle OUT [--sessions 1,2,4,8,16,32] [--output docs/results]

Two servers of the same bundle run on this machine, one with ``--max-batch 1``. A few generations are recorded once, on
the one that serves in turns, and replayed on both from so many sessions at once: no front works meanwhile, and each
token is compared with the recorded one. Runs alternate, so that the machine's noise hits both, and medians over the
repetitions are reported. The clients are one more process, on the same processors.

Then ``--decoding`` sessions generate while two others begin with a prompt of ``--long`` tokens: what that adds to the
time per token of the first.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from processes import serving
from tabulate import tabulate
from tqdm import tqdm

from isthmus.runtime.edge.load import LoadReport, Recordings, record, replay
from isthmus.runtime.wire.security import ChannelSecurity

SECURITY = ChannelSecurity(insecure=True)
TOGETHER, IN_TURNS = "together", "in turns"


def measure(recordings: Recordings, servers: dict[str, str], sessions: int, repetitions: int) -> dict[str, Any]:
    """Medians of the repetitions, of each server, and their ratio."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for _ in range(repetitions):
        for name, address in servers.items():
            report = replay(recordings, address, sessions=sessions, security=SECURITY)
            numbers = report.to_dict()
            if not report.identical or numbers["errors"]:
                raise SystemExit(f"{sessions} sessions {name}: other tokens, or errors: {numbers}")
            runs[name].append(numbers)
    row: dict[str, Any] = {"sessions": sessions}
    for name, numbers in runs.items():
        row[name] = {"tokens_per_s": median(each["tokens_per_s"] for each in numbers)} | {
            point: median(each["ms_per_token"][point] for each in numbers) for point in ("p50", "p95", "max")
        }
    pairs = zip(runs[TOGETHER], runs[IN_TURNS], strict=True)
    row["ratio"] = median(one["tokens_per_s"] / other["tokens_per_s"] for one, other in pairs)
    return row


def beside_long_prompts(report: LoadReport, decoding: int) -> dict[str, float]:
    """Time per token of the sessions that only decoded."""
    ms = [1e3 * seconds for each in report.replays[:decoding] for seconds in each.token_s]
    p50, p95 = np.percentile(ms, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "max": max(ms)}


def with_long_prompts(
    short: Recordings, long: Recordings, servers: dict[str, str], decoding: int, repetitions: int
) -> list[dict[str, Any]]:
    """Time per token of ``decoding`` sessions, alone and beside two that begin with a long prompt."""
    few = [short.generations[number % len(short.generations)] for number in range(decoding)]
    loads = {0: replace(short, generations=tuple(few)), 2: replace(short, generations=(*few, *long.generations[:2]))}
    rows = []
    for name, address in servers.items():
        for count, load in loads.items():
            seen = []
            for _ in range(repetitions):
                report = replay(load, address, sessions=len(load.generations), security=SECURITY)
                seen.append(beside_long_prompts(report, decoding))
            points = {point: median(each[point] for each in seen) for point in ("p50", "p95", "max")}
            rows.append({"served": name, "long_prompts": count} | points)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Throughput as Markdown."""
    headers = ["sessions", "tokens/s together", "in turns", "ratio"]
    headers += ["ms a token together: p50", "p95", "max", "in turns: p50", "p95", "max"]
    cells = [
        [row["sessions"], row[TOGETHER]["tokens_per_s"], row[IN_TURNS]["tokens_per_s"], f"{row['ratio']:.2f}"]
        + [row[name][point] for name in (TOGETHER, IN_TURNS) for point in ("p50", "p95", "max")]
        for row in rows
    ]
    return tabulate(cells, headers, tablefmt="github", floatfmt=".1f")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s and time per token over the number of sessions."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sessions = [row["sessions"] for row in rows]
    for name, colour in ((TOGETHER, "tab:blue"), (IN_TURNS, "tab:grey")):
        left.plot(sessions, [row[name]["tokens_per_s"] for row in rows], "o-", color=colour, label=name)
        right.plot(sessions, [row[name]["p50"] for row in rows], "o-", color=colour, label=f"{name}, median")
        right.plot(sessions, [row[name]["p95"] for row in rows], "--", color=colour, label=f"{name}, 95 %")
    for axis, label in ((left, "tokens/s, all sessions"), (right, "ms per token of a session")):
        axis.set(xscale="log", xlabel="sessions", ylabel=label, ylim=(0, None))
        axis.set_xticks(sessions, [str(count) for count in sessions])
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print the tables, and write figures and numbers if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT")
    parser.add_argument("--sessions", default="1,2,4,8,16,32")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--decoding", type=int, default=8)
    parser.add_argument("--long", type=int, default=1024)
    parser.add_argument("--output", type=Path, metavar="DIR", help="write batching.json and batching.png there")
    args = parser.parse_args()
    folder = args.bundle / "server"
    # Every repetition computes its prompts.
    command = ("serve", folder, "--listen", "127.0.0.1:0", "--insecure", "--prefix-cache", 0)
    with serving(*command) as (together, _), serving(*command, "--max-batch", 1) as (in_turns, _):
        servers = {TOGETHER: together, IN_TURNS: in_turns}
        short, long = (
            record(
                args.bundle / "device",
                in_turns,
                prompt_tokens=(length,),
                new_tokens=args.new_tokens,
                codec="raw16",
                security=SECURITY,
            )
            for length in (args.prompt_tokens, args.long)
        )
        rows = [
            measure(short, servers, int(count), args.repetitions)
            for count in tqdm(args.sessions.split(","), unit="load", disable=None)
        ]
        beside = with_long_prompts(short, long, servers, args.decoding, args.repetitions)
    print(table(rows), tabulate(beside, "keys", tablefmt="github", floatfmt=".1f"), sep="\n\n")
    print(f"\nload average {', '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} processors")
    if args.output:
        numbers = {"throughput": rows, "beside_long_prompts": beside}
        (args.output / "batching.json").write_text(json.dumps(numbers, indent=1) + "\n")
        plot(rows, args.output / "batching.png")


if __name__ == "__main__":
    main()
