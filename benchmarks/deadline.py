"""A deadline for each token over a link that falls and recovers: with the controller, and at fixed levels.

    python benchmarks/deadline.py --bundle OUT [--deadline 67ms,85ms] [--rtt 40ms] [--output docs/results]

Server, link and device are processes of their own on this machine; where it has two processors, the server gets one and
the others share one. The link is `isthmus link` with a trace: ``--rtt``, and ``--rates`` one after the other, each for
``--seconds``. Every configuration generates for as long after the same prompt, end tokens or not; they alternate, so
that the machine's noise hits all of them.

Late is a token that took longer than the deadline, from the one before; the first one (the prompt's) does not count. KL
is that of the levels used, weighted by their tokens: each level's is measured on a text that the model wrote. Exited
tokens have no level; exits are greedy, everything else is sampled, as greedy texts repeat themselves and are drafted
too well.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from processes import serving
from tabulate import tabulate
from tqdm import tqdm

from isthmus.devices.link import parse_duration_s, parse_rate_mbit_s
from isthmus.runtime.chain import Chain
from isthmus.runtime.edge.generate import Token
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.options import DraftMode
from isthmus.runtime.evaluate import BundleReference, evaluate_text
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire.security import ChannelSecurity

PROMPT = "The lighthouse keeper climbed the stairs one last time, and as the lamp began to turn, he saw"
SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=1)
GREEDY = Sampling()


@dataclass(frozen=True)
class Configuration:
    """How hidden states are sent: at a fixed level, or, with a deadline, at those that the controller chooses.

    Attributes:
        draft: of `EdgeModel`.
        exit_agreement: of `EdgeModel`; 0 takes any token of the draft where the answer is late.
    """

    codec: str
    level: int | None
    deadline_ms: float | None = None
    draft: DraftMode = "off"
    exit_agreement: float | None = None

    def __str__(self) -> str:
        text = self.codec if self.level is None else f"{self.codec} {self.level}"
        if self.deadline_ms is not None:
            text = f"{self.codec}, controller for {self.deadline_ms:g} ms"
        if self.exit_agreement is not None:
            text += f", exits {self.exit_agreement:g}"
        return text if self.draft == "off" else f"{text}, drafts"


def configurations(deadlines_ms: Sequence[float]) -> list[Configuration]:
    """Without a controller, and with one for each deadline."""
    found = [Configuration("raw16", None), *(Configuration("klt", level) for level in (0, 2, 6))]
    found.append(Configuration("klt", 0, draft="auto"))
    for deadline_ms in deadlines_ms:
        paced = Configuration("klt", 0, deadline_ms)
        found += [paced, replace(paced, draft="auto")]
        found += [replace(paced, exit_agreement=agreement) for agreement in (0.9, 0.0)]
    return found


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


def generate(bundle: Path, address: str, configuration: Configuration, seconds: float) -> Run:
    """Generate for so long after the prompt's token."""
    model = EdgeModel(
        bundle / "device",
        server=address,
        security=ChannelSecurity(insecure=True),
        codec=configuration.codec,
        level=configuration.level,
        deadline_ms=configuration.deadline_ms,
        draft=configuration.draft,
        exit_agreement=configuration.exit_agreement,
        threads=1,
    )
    sampling = SAMPLING if configuration.exit_agreement is None else GREEDY
    stream = model.tokens(PROMPT, max_new_tokens=model.context, sampling=sampling, end_tokens=())
    tokens: list[Token] = []
    try:
        for number, token in enumerate(stream):
            if number == 0:
                ends = perf_counter() + seconds
            else:
                tokens.append(token)
            if perf_counter() >= ends:
                break
        return Run(tokens, len(stream.level_changes))
    finally:
        stream.close(cancel=True)


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
        else:
            del levels[None]
        late = [run.late(deadline_ms) for run in repeated]
        pooled = [token for run in repeated for token in run.tokens]
        paced = configuration.deadline_ms is not None
        shares = ", ".join(f"{level}: {count / levels.total():.0%}" for level, count in sorted(levels.items()))
        rows.append(
            [
                configuration,
                f"{median(late):g} ({min(late)}–{max(late)})",
                f"{median(len(run.tokens) for run in repeated):g}",
                f"{sum(token.source == 'exit' for token in pooled) / len(pooled):.0%}",
                float(np.percentile([1e3 * token.total_s for token in pooled], 95)),
                sum(token.bytes_up for token in pooled) / len(pooled),
                sum(count * kl[configuration.codec, level] for level, count in levels.items()) / levels.total(),
                shares if paced else "",
                f"{median(run.changes for run in repeated):g}" if paced else "",
            ]
        )
    headers = ["late", "tokens", "exited", "p95 ms", "bytes up a token", "KL", "levels", "changes"]
    formats = ("", "", "", "", ".1f", ".0f", ".4f", "", "")
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
    paced = Configuration("klt", 0, deadline_ms)
    shown = [Configuration("klt", 0), paced, replace(paced, exit_agreement=0.0)]
    last_s = 0.0
    for configuration, colour in zip(shown, ("#D55E00", "#56B4E9", "#0072B2"), strict=True):
        run = sorted(runs[configuration], key=lambda run: run.late(deadline_ms))[len(runs[configuration]) // 2]
        last_s = max(last_s, run.at_s[-1])
        above.plot(run.at_s, run.ms, ".", color=colour, markersize=4, label=str(configuration))
        if configuration.deadline_ms is not None:
            levels = [np.nan if token.level is None else token.level for token in run.tokens]
            below.step(run.at_s, levels, color=colour, where="post")
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
    parser.add_argument("--deadline", default="67ms", metavar="TIME[,TIME]")
    parser.add_argument("--rtt", default="40ms", metavar="TIME")
    parser.add_argument("--rates", default="10mbit,200kbit,10mbit", metavar="RATE,…")
    parser.add_argument("--seconds", default="6,12,6", metavar="N,…", help="of each rate")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where deadline.png goes")
    args = parser.parse_args()

    deadlines_ms = [1e3 * parse_duration_s(text) for text in args.deadline.split(",")]
    rates = [parse_rate_mbit_s(text) for text in args.rates.split(",")]
    *starts, seconds = np.cumsum([0.0, *map(float, args.seconds.split(","))]).tolist()
    trace = list(zip(starts, rates, strict=True))
    rtt_ms = 1e3 * parse_duration_s(args.rtt)
    chosen = configurations(deadlines_ms)

    cores = sorted(os.sched_getaffinity(0))
    here, there = ([cores[0]], cores[1:2]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, here)
    runs: dict[Configuration, list[Run]] = {configuration: [] for configuration in chosen}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.txt"
        file.write_text("".join(f"{start} {rate} {rtt_ms}\n" for start, rate in trace))
        listen = ("--listen", "127.0.0.1:0")
        served: Any = ("serve", args.bundle / "server", "--insecure", "--threads", 1, "--prefix-cache", 0, *listen)
        with serving(*served, cores=there) as (server, _):
            generate(args.bundle, server, chosen[1], 1.0)  # warms the server up
            order = [each for _ in range(args.repetitions) for each in chosen]
            for configuration in tqdm(order, disable=None):
                with serving("link", "--connect", server, "--trace", file, *listen, cores=here) as (link, _):
                    runs[configuration].append(generate(args.bundle, link, configuration, seconds))
    exact = runs[chosen[0]][0]
    kl = divergences(args.bundle, [token.id for token in exact.tokens])
    phases = ", ".join(f"{rate:g} Mbit/s from {start:g} s" for start, rate in trace)
    print(f"round trip {rtt_ms:g} ms; {phases}; {args.repetitions} repetitions: median (least–most) late\n")
    for deadline_ms in deadlines_ms:
        print(f"deadline {deadline_ms:g} ms\n\n{table(runs, deadline_ms, kl)}\n")
    if args.output is not None:
        plot(runs, deadlines_ms[0], trace, args.output / "deadline.png")


if __name__ == "__main__":
    main()
