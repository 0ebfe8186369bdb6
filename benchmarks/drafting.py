"""Drafted against undrafted generation over a link: speed, round trips, and whether the tokens are the same.

    python benchmarks/drafting.py --bundle OUT [--parts speed,sweep,identity] [--output docs/results]

Server, link and device are processes of their own on this machine, one thread each for server and device; where it has
two processors, server and device get one each; the link may run on any. On a busy machine use `nice -n -15` and not
`chrt -f`: the device computes while frames cross, and its own threads that send them would wait for it. The prompts are
those of `benchmarks/prompts`.

- speed: every prompt over ``--rtt`` and ``--rate``, drafted (``auto``) and undrafted in turns;
- sweep: ways of drafting over round-trip times, on the first chat prompts;
- identity: each way of drafting without a delay, with an exact and a lossy codec, every prompt: the same tokens?
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from processes import serving
from tabulate import tabulate
from tqdm import tqdm

from isthmus.runtime.edge.model import EdgeModel, Prompt
from isthmus.runtime.edge.options import DraftMode
from isthmus.runtime.edge.prompt_bench import PromptReport, bench_prompts, read_prompts
from isthmus.runtime.wire.security import ChannelSecurity

PROMPTS = Path(__file__).parent / "prompts"
KINDS = ("chat", "summarise", "code")
# What is drafted, and whether the device drafts on while it waits.
WAYS: dict[str, tuple[DraftMode, bool]] = {
    "undrafted": ("off", False),
    "n-grams": ("ngram", True),
    "chain": ("chain", False),
    "chain, overlapped": ("chain", True),
    "tree": ("tree", True),
    "auto, not overlapped": ("auto", False),
    "auto": ("auto", True),
}
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#999999", "#D55E00")


class Bench:
    """A bundle, its running server, and the cores that a link may use."""

    def __init__(self, bundle: Path, server: str, cores: Sequence[int], rate: str) -> None:
        self._bundle, self._server, self._cores, self._rate = bundle, server, cores, rate

    def model(self, address: str, way: str, codec: str) -> EdgeModel:
        """The device half with a way of drafting."""
        draft, overlap = WAYS[way]
        security = ChannelSecurity(insecure=True)
        device = self._bundle / "device"
        return EdgeModel(
            device, server=address, security=security, codec=codec, threads=1, draft=draft, overlap=overlap
        )

    @contextmanager
    def link(self, rtt: str) -> Iterator[str]:
        """The server's address through a link."""
        arguments = ("--connect", self._server, "--rtt", rtt, "--rate", self._rate, "--listen", "127.0.0.1:0")
        with serving("link", *arguments, cores=self._cores) as (address, _):
            yield address

    def speed(self, rtt: str, prompts: dict[str, list[Prompt]], tokens: int) -> dict[str, Any]:
        """Every kind of prompt, drafted and undrafted in turns."""
        results = {}
        with self.link(rtt) as address:
            for kind, several in prompts.items():
                model = self.model(address, "auto", "klt")
                with tqdm(total=len(several), desc=kind, disable=None) as bar:
                    report = bench_prompts(
                        model,
                        several,
                        max_new_tokens=tokens,
                        vs_undrafted=True,
                        progress=lambda what, done, total, bar=bar: bar.update(),
                    )
                results[kind] = _described(report)
        return results

    def sweep(self, rtts: Sequence[str], prompts: list[Prompt], tokens: int) -> dict[str, dict[str, float]]:
        """Median tokens/s of each way over each round-trip time."""
        results: dict[str, dict[str, float]] = {way: {} for way in WAYS}
        for rtt in tqdm(rtts, desc="round-trip times", disable=None):
            with self.link(rtt) as address:
                models = {way: self.model(address, way, "klt") for way in WAYS}
                for model in models.values():
                    model.generate(prompts[-1], max_new_tokens=48)  # the pace is learned
                speeds: dict[str, list[float]] = {way: [] for way in WAYS}
                for prompt in prompts:
                    for way, model in models.items():
                        result = model.generate(prompt, max_new_tokens=tokens)
                        speeds[way].append(result.decode_tokens_per_s)
            for way, values in speeds.items():
                results[way][rtt] = median(values)
        return results

    def identity(self, prompts: list[Prompt], tokens: int) -> dict[str, dict[str, str]]:
        """Prompts with the same tokens as undrafted, by codec and way."""
        results: dict[str, dict[str, str]] = {}
        for codec in ("raw32", "klt"):
            models = {way: self.model(self._server, way, codec) for way in WAYS}
            same = dict.fromkeys(WAYS, 0)
            for prompt in tqdm(prompts, desc=codec, disable=None):
                plain = models["undrafted"].generate(prompt, max_new_tokens=tokens).token_ids
                for way in list(WAYS)[1:]:
                    same[way] += models[way].generate(prompt, max_new_tokens=tokens).token_ids == plain
            results[codec] = {way: f"{count} of {len(prompts)}" for way, count in same.items() if way != "undrafted"}
        return results


def _described(report: PromptReport) -> dict[str, Any]:
    return report.to_dict() | {"tried": report.tried, "right": report.right}


def speed_table(results: dict[str, Any]) -> str:
    """Medians of each kind of prompt."""
    rows = [
        [
            kind,
            len(each["prompts"]),
            each["undrafted_tokens_per_s"],
            each["tokens_per_s"],
            each["ratio"],
            each["tokens_per_round_trip"],
            "yes" if each["identical"] else "NO",
        ]
        for kind, each in results.items()
    ]
    headers = ["prompts", "", "undrafted tokens/s", "drafted", "ratio", "tokens per round trip", "same tokens"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".2f")


def place_table(results: dict[str, Any], places: int = 6) -> str:
    """How often a guess was right, by its place after the last sure token."""
    rows = [
        [kind, *(f"{r / t:.0%} of {t}" for r, t in list(zip(each["right"], each["tried"], strict=True))[:places] if t)]
        for kind, each in results.items()
    ]
    return tabulate(rows, ["place", *range(1, places + 1)], tablefmt="github")


def plot(results: dict[str, Any], path: Path) -> None:
    """Tokens/s over the round-trip time, and acceptance by place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (way, speeds), colour in zip(results.get("sweep", {}).items(), COLOURS, strict=False):
        milliseconds = [float(rtt.removesuffix("ms")) for rtt in speeds]
        left.plot(milliseconds, list(speeds.values()), "o-", color=colour, markersize=4, label=way)
    left.set_xlabel("round-trip time, ms")
    left.set_ylabel("tokens/s")
    left.legend(frameon=False, fontsize=8)
    for (kind, each), colour in zip(results.get("speed", {}).items(), ("#0072B2", "#009E73", "#D55E00"), strict=False):
        shares = [r / t for r, t in zip(each["right"], each["tried"], strict=True) if t >= 10]
        right.plot(range(1, len(shares) + 1), shares, "o-", color=colour, markersize=4, label=kind)
    right.set_xlabel("place after the last sure token")
    right.set_ylabel("guesses that were right")
    right.set_ylim(0, 1)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Measure the parts asked for; with --output, keep the figures and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bundle", type=Path, required=True, metavar="OUT", help="split, with a draft and the codec klt"
    )
    parser.add_argument("--parts", default="speed,sweep,identity", metavar="PART,…")
    parser.add_argument("--rtt", default="80ms", metavar="TIME", help="of the part speed")
    parser.add_argument("--rate", default="10mbit", metavar="RATE")
    parser.add_argument("--rtts", default="0ms,10ms,40ms,80ms,160ms", metavar="TIME,…", help="of the part sweep")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="after each prompt")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts of each kind only")
    parser.add_argument("--sweep-prompts", type=int, default=6, metavar="N")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where drafting.json and drafting.png go")
    args = parser.parse_args()

    prompts = {kind: read_prompts(PROMPTS / f"{kind}.jsonl")[: args.limit] for kind in KINDS}
    cores = sorted(os.sched_getaffinity(0))
    here, there = ([cores[0]], cores[1:2]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, here)
    kept = args.output / "drafting.json" if args.output is not None else None
    results: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
    served = (
        "serve",
        args.bundle / "server",
        "--insecure",
        "--threads",
        1,
        "--prefix-cache",
        0,
        "--listen",
        "127.0.0.1:0",
    )
    with serving(*served, cores=there) as (server, _):
        bench = Bench(args.bundle, server, cores, args.rate)
        for part in args.parts.split(","):
            if part == "speed":
                results[part] = bench.speed(args.rtt, prompts, args.tokens)
                print(f"{speed_table(results[part])}\n\n{place_table(results[part])}\n")
            elif part == "sweep":
                results[part] = bench.sweep(args.rtts.split(","), prompts["chat"][: args.sweep_prompts], args.tokens)
                rows = [[way, *speeds.values()] for way, speeds in results[part].items()]
                print(tabulate(rows, ["tokens/s", *args.rtts.split(",")], tablefmt="github", floatfmt=".1f"), "\n")
            elif part == "identity":
                results[part] = bench.identity(
                    [prompt for several in prompts.values() for prompt in several], args.tokens
                )
                rows = [[codec, *counts.values()] for codec, counts in results[part].items()]
                print(tabulate(rows, ["same tokens", *list(WAYS)[1:]], tablefmt="github"), "\n")
            else:
                parser.error(f"part {part!r}: must be speed, sweep or identity")
            if kept is not None:
                kept.write_text(json.dumps(results, indent=1) + "\n")
    if args.output is not None:
        plot(results, args.output / "drafting.png")


if __name__ == "__main__":
    main()
