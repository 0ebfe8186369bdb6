"""A deadline for each token over a link that falls and recovers: with the controller, and at fixed levels.

    python benchmarks/deadline.py --bundle OUT [--deadline 67ms,85ms] [--rtt 40ms] [--output docs/results]

Server, link and device are processes of their own on this machine; where it has two processors, the server gets one and
the others share one, as they never work at the same time. The link is `isthmus link` with a trace: ``--rtt``, and
``--rates`` one after the other, each for ``--seconds``. Every configuration generates the same number of tokens after
the same prompt, end tokens or not; the configurations alternate, so that the machine's noise hits all of them.

Late is a token that took longer than the deadline, from the one before; the first one (the prompt's) does not count. KL
is that of the levels used, weighted by their tokens: each level's is measured on a text that the model wrote.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from isthmus.devices.link import parse_duration_s, parse_rate_mbit_s
from isthmus.runtime.chain import Chain
from isthmus.runtime.edge.generate import Token
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.evaluate import BundleReference, evaluate_text
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire.security import ChannelSecurity

PROMPT = "The lighthouse keeper climbed the stairs one last time, and as the lamp began to turn, he saw"
SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=1)
FIXED: tuple[tuple[str, int | None], ...] = (("raw16", None), ("klt", 0), ("klt", 2), ("klt", 6))


@dataclass(frozen=True)
class Configuration:
    """How hidden states are sent: at a fixed level, or, with a deadline, at those that the controller chooses."""

    codec: str
    level: int | None
    deadline_ms: float | None = None

    def __str__(self) -> str:
        if self.deadline_ms is not None:
            return f"{self.codec}, controller for {self.deadline_ms:g} ms"
        return self.codec if self.level is None else f"{self.codec} {self.level}"


@dataclass(frozen=True)
class Run:
    """One generation: its tokens after the first, and when each came, in seconds after the first."""

    tokens: list[Token]
    changes: int

    @property
    def ms(self) -> list[float]:
        """Time of each token."""
        return [1e3 * token.total_s for token in self.tokens]

    @property
    def at_s(self) -> list[float]:
        """When each token came, after the prompt's."""
        return np.cumsum([token.total_s for token in self.tokens]).tolist()

    def late(self, deadline_ms: float) -> int:
        """Tokens that took longer."""
        return sum(ms > deadline_ms for ms in self.ms)


@contextmanager
def command(cores: Sequence[int], *arguments: object) -> Iterator[str]:
    """An isthmus command that serves, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "isthmus.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split(" on ")[1].split()[0]
    finally:
        process.terminate()
        process.wait()


def generate(bundle: Path, address: str, configuration: Configuration, tokens: int) -> Run:
    """Generate so many tokens after the prompt's."""
    model = EdgeModel(
        bundle / "device",
        server=address,
        security=ChannelSecurity(insecure=True),
        codec=configuration.codec,
        level=configuration.level,
        deadline_ms=configuration.deadline_ms,
        threads=1,
    )
    stream = model.tokens(PROMPT, max_new_tokens=tokens + 1, sampling=SAMPLING, end_tokens=())
    try:
        return Run(list(stream)[1:], len(stream.level_changes))
    finally:
        stream.close()


def divergences(bundle: Path, ids: list[int]) -> dict[tuple[str, int | None], float]:
    """KL in nats of each codec and level on a text, against the same bundle with its hidden states sent exactly."""

    def chain() -> Chain:
        return Chain.open(bundle / "device", bundle / "server", threads=1)

    measured = chain()
    choices = measured.codecs(("raw16", "klt"), None)
    results = evaluate_text(measured, [ids], choices, BundleReference(chain(), [ids]))
    return {(choice.name, choice.level): result.kl for choice, result in zip(choices, results, strict=True)}


def table(runs: dict[Configuration, list[Run]], deadline_ms: float, kl: dict[tuple[str, int | None], float]) -> str:
    """The configurations against one deadline: medians over the repetitions."""
    rows = []
    for configuration, repeated in runs.items():
        if configuration.deadline_ms not in (None, deadline_ms):
            continue
        levels = Counter(token.level for run in repeated for token in run.tokens)
        if configuration.deadline_ms is None:
            levels = Counter({configuration.level: sum(levels.values())})
        late = [run.late(deadline_ms) for run in repeated]
        pooled = [ms for run in repeated for ms in run.ms]
        rows.append(
            [
                configuration,
                f"{median(late):g} ({min(late)}–{max(late)})",
                float(np.percentile(pooled, 50)),
                float(np.percentile(pooled, 95)),
                fmean(token.bytes_up for run in repeated for token in run.tokens),
                sum(count * kl[configuration.codec, level] for level, count in levels.items()) / levels.total(),
                ", ".join(f"{level}: {count / levels.total():.0%}" for level, count in sorted(levels.items()))
                if configuration.deadline_ms is not None
                else "",
                f"{median(run.changes for run in repeated):g}" if configuration.deadline_ms is not None else "",
            ]
        )
    headers = [f"late, of {len(repeated[0].tokens)}", "p50 ms", "p95 ms", "bytes up a token", "KL", "levels", "changes"]
    formats = ("", "", ".1f", ".1f", ".0f", ".4f", "", "")
    return tabulate(rows, ["sent as", *headers], tablefmt="github", floatfmt=formats)


def plot(
    runs: dict[Configuration, list[Run]], deadline_ms: float, trace: list[tuple[float, float]], path: Path
) -> None:
    """Each token's time and the controller's level over the time, of each configuration's run with median late."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    shown = [Configuration(*FIXED[0]), Configuration(*FIXED[1]), Configuration("klt", 0, deadline_ms)]
    last_s = 0.0
    for configuration, colour in zip(shown, ("#D55E00", "#56B4E9", "#0072B2"), strict=True):
        run = sorted(runs[configuration], key=lambda run: run.late(deadline_ms))[len(runs[configuration]) // 2]
        last_s = max(last_s, run.at_s[-1])
        above.plot(run.at_s, run.ms, ".", color=colour, markersize=4, label=str(configuration))
        if configuration.deadline_ms is not None:
            below.step(run.at_s, [token.level or 0 for token in run.tokens], color=colour, where="post")
    above.axhline(deadline_ms, color="#000000", linewidth=1, linestyle="--", label=f"deadline {deadline_ms:g} ms")
    ends = [*(start for start, _ in trace[1:]), last_s]
    for (start, rate), end in zip(trace, ends, strict=True):
        if rate == min(rate for _, rate in trace):
            for axis in (above, below):
                axis.axvspan(start, min(end, last_s), color="#eeeeee", zorder=0)
        above.text(start, 1.01, f" {rate:g} Mbit/s", transform=above.get_xaxis_transform(), fontsize=9)
    above.set_ylabel("ms a token")
    above.set_ylim(0, 1.3 * float(np.percentile([ms for runs_ in runs.values() for run in runs_ for ms in run.ms], 99)))
    above.legend(frameon=False, loc="upper right", fontsize=9)
    below.set_ylabel("klt level")
    below.set_ylim(6.5, -0.5)
    below.set_yticks(range(0, 7, 2))
    below.set_xlabel("seconds after the first token")
    for axis in (above, below):
        axis.grid(color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Measure, print the tables, and draw the first deadline's picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT", help="split, with the codec klt")
    parser.add_argument("--deadline", default="67ms,85ms", metavar="TIME[,TIME]")
    parser.add_argument("--rtt", default="40ms", metavar="TIME")
    parser.add_argument("--rates", default="10mbit,200kbit,10mbit", metavar="RATE,…")
    parser.add_argument("--seconds", default="6,12,6", metavar="N,…", help="of each rate; the last holds")
    parser.add_argument("--tokens", type=int, default=400, metavar="N")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where deadline.png goes")
    args = parser.parse_args()

    deadlines_ms = [1e3 * parse_duration_s(text) for text in args.deadline.split(",")]
    rates = [parse_rate_mbit_s(text) for text in args.rates.split(",")]
    starts = np.cumsum([0.0, *map(float, args.seconds.split(","))])[: len(rates)].tolist()
    trace = list(zip(starts, rates, strict=True))
    rtt_ms = 1e3 * parse_duration_s(args.rtt)
    configurations = [Configuration(*fixed) for fixed in FIXED]
    configurations += [Configuration("klt", 0, deadline_ms) for deadline_ms in deadlines_ms]

    cores = sorted(os.sched_getaffinity(0))
    here, there = ([cores[0]], cores[1:2]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, here)
    runs: dict[Configuration, list[Run]] = {configuration: [] for configuration in configurations}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.txt"
        file.write_text("".join(f"{start} {rate} {rtt_ms}\n" for start, rate in trace))
        listen = ("--listen", "127.0.0.1:0")
        serving: Any = ("serve", args.bundle / "server", "--insecure", "--threads", 1, "--prefix-cache", 0, *listen)
        with command(there, *serving) as server:
            generate(args.bundle, server, configurations[1], 20)  # warms the server up
            order = [each for _ in range(args.repetitions) for each in configurations]
            for configuration in tqdm(order, disable=None):
                with command(here, "link", "--connect", server, "--trace", file, *listen) as link:
                    runs[configuration].append(generate(args.bundle, link, configuration, args.tokens))
    exact = runs[configurations[0]][0]
    kl = divergences(args.bundle, [token.id for token in exact.tokens])
    phases = ", ".join(f"{rate:g} Mbit/s from {start:g} s" for start, rate in trace)
    print(f"round trip {rtt_ms:g} ms; {phases}; {args.repetitions} repetitions: median (least–most) late\n")
    for deadline_ms in deadlines_ms:
        print(f"deadline {deadline_ms:g} ms\n\n{table(runs, deadline_ms, kl)}\n")
    if args.output is not None:
        plot(runs, deadlines_ms[0], trace, args.output / "deadline.png")


if __name__ == "__main__":
    main()
