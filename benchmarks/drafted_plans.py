"""Drafts as the planner predicts them, and measured: time and bytes of a token by draft length and round trip.

    python benchmarks/drafted_plans.py --bundle OUT [--rtts 10ms,80ms] [--rate 10mbit] [--figures FILE]

The bundle is split where a draft is shipped. Server, link and device are processes of their own on this machine, one
thread each for server and device; the machine is probed first. Each length, 0 for none, generates after the same
prompts of `benchmarks/prompts`, in turns. With ``--figures``, what the longest drafts came to over each round trip is
written to a file such as `export/drafts` has, for `isthmus.export.draft_costs`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from processes import serving
from tabulate import tabulate
from tqdm import tqdm

from isthmus.devices.link import link_profile, parse_duration_s
from isthmus.devices.probe import probe
from isthmus.devices.profile import DeviceProfile
from isthmus.export.accuracy import find_accuracy
from isthmus.export.grid import Grid
from isthmus.export.limits import Limits
from isthmus.export.plan import Candidate
from isthmus.export.shipped_drafts import shipped_figures
from isthmus.runtime.bundle import Manifest
from isthmus.runtime.edge.model import EdgeModel, Prompt
from isthmus.runtime.edge.prompt_bench import read_prompts
from isthmus.runtime.edge.stream import Generation
from isthmus.runtime.wire.security import ChannelSecurity

PROMPTS = Path(__file__).parent / "prompts"
KINDS = ("chat", "summarise", "code")
LEVEL = 2  # of klt
PLACES = 6  # acceptance is told apart up to there


def measure(
    bundle: Path, address: str, lengths: list[int], prompts: list[Prompt], tokens: int
) -> tuple[dict[int, list[Generation]], EdgeModel]:
    """Generations of each draft length, and the model with the longest."""
    security = ChannelSecurity(insecure=True)
    options: Any = {"server": address, "security": security, "codec": "klt", "level": LEVEL, "threads": 1}
    models = {
        length: EdgeModel(bundle / "device", **options, draft="auto" if length else "off", draft_length=length or None)
        for length in lengths
    }
    for length, model in models.items():
        if length:  # always, also where it turns out not to pay: that is what is predicted
            pace: Any = model._pace
            pace.drafting, pace.emitted = True, lambda seconds, tokens: None
        model.generate(prompts[-1], max_new_tokens=48)  # the pace is learned
    results: dict[int, list[Generation]] = {length: [] for length in lengths}
    for prompt in tqdm(prompts, disable=None):
        for length, model in models.items():
            results[length].append(model.generate(prompt, max_new_tokens=tokens))
    return results, models[max(lengths)]


def predict(
    machine: DeviceProfile, manifest: Manifest, link: str, generations: list[Generation]
) -> dict[int, Candidate]:
    """The planner's candidates for this machine at both ends, by draft length."""
    files = manifest.source.files
    accuracy = find_accuracy(files)
    if accuracy is None:
        sys.exit("measure it first: isthmus eval MODEL --for-plan")
    prompt = round(sum(each.prompt_tokens for each in generations) / len(generations))
    length = prompt + round(sum(each.new_tokens for each in generations) / len(generations) / 2)
    limits = Limits(context=length, prompt_tokens=prompt, max_drop=None)
    grid = Grid(
        manifest.architecture,
        accuracy,
        machine,
        link_profile(link),
        machine,
        limits,
        modes=("split",),
        drafts=shipped_figures(files),
    )
    wanted = {"split": manifest.split, "front_bits": manifest.front_bits, "back_bits": manifest.back_bits}
    wanted |= {"kv_bits": 32, "codec": "klt", "level": LEVEL}
    found = (c for c in grid.candidates() if all(getattr(c, name) == value for name, value in wanted.items()))
    return {candidate.draft_length: candidate for candidate in found}


def rows(rtt: str, predicted: dict[int, Candidate], measured: dict[int, list[Generation]]) -> list[list[Any]]:
    """One line a draft length: predicted, measured, and the ratio."""
    lines = []
    for length, generations in measured.items():
        later = sum(each.new_tokens - 1 for each in generations)
        seconds = sum((each.new_tokens - 1) / each.decode_tokens_per_s for each in generations)
        trips = sum(each.round_trips for each in generations)
        ms, sent = 1e3 * seconds / later, sum(each.decode_bytes_up for each in generations) / later
        candidate = predicted[length]
        lines.append([rtt, length, candidate.ms_per_token, ms, candidate.ms_per_token / ms])
        lines[-1] += [candidate.bytes_per_token, sent, sum(each.new_tokens for each in generations) / trips]
    return lines


def wait(model: EdgeModel, generations: list[Generation]) -> dict[str, Any]:
    """A row of `isthmus.export.draft_costs.Wait`."""
    right, tried = [0] * PLACES, [0] * PLACES
    gaps = []
    for generation in generations:
        run = 0
        for token in generation.tokens[1:]:
            place = min(run, PLACES - 1)
            tried[place] += 1
            right[place] += token.source != "server"
            gaps += [token.total_s] if run else []  # else it waited for a round trip
            run = run + 1 if token.source != "server" else 0
    pace: Any = model._pace
    draft_s = pace._draft["draft"].mean_s
    wrong = sum(each.drafts.drafted - each.drafts.accepted for each in generations)
    waited = sum(token.source == "server" for each in generations for token in each.tokens)
    return {
        "drafts": round(pace._answer.mean_s / draft_s, 1),
        "wrong": round(wrong / waited, 1),
        "gap": round(sum(gaps) / len(gaps) / draft_s, 2),
        "acceptance": [round(yes / max(1, all_), 3) for yes, all_ in zip(right, tried, strict=True)],
    }


def main() -> None:
    """Probe, predict, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT")
    parser.add_argument("--rtts", default="10ms,80ms", metavar="TIME,…")
    parser.add_argument("--rate", default="10mbit", metavar="RATE")
    parser.add_argument("--lengths", default="0,1,2,4,8", metavar="N,…", help="0: no drafts")
    parser.add_argument("--each", type=int, default=4, metavar="N", help="prompts of each kind")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="after each prompt")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="write what the drafts came to")
    args = parser.parse_args()

    lengths = [int(text) for text in args.lengths.split(",")]
    rtts = sorted(args.rtts.split(","), key=parse_duration_s)
    prompts = [prompt for kind in KINDS for prompt in read_prompts(PROMPTS / f"{kind}.jsonl")[: args.each]]
    cores = sorted(os.sched_getaffinity(0))
    here, there = ([cores[0]], cores[1:2]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, here)
    machine = probe(threads=1)
    lines, waits = [], []
    served = ("serve", args.bundle / "server", "--insecure", "--threads", 1, "--listen", "127.0.0.1:0")
    with serving(*served, cores=there) as (server, _):
        manifest = EdgeModel(args.bundle / "device", server=server, draft="off", threads=1).manifest
        if manifest.split not in shipped_figures(manifest.source.files):
            sys.exit(f"no draft is shipped for split {manifest.split}")
        for rtt in rtts:
            shape = ("--rtt", rtt, "--rate", args.rate, "--listen", "127.0.0.1:0")
            with serving("link", "--connect", server, *shape, cores=cores) as (link, _):
                measured, model = measure(args.bundle, link, lengths, prompts, args.tokens)
            undrafted = measured[lengths[0]]
            lines += rows(rtt, predict(machine, manifest, f"rtt={rtt},rate={args.rate}", undrafted), measured)
            waits.append(wait(model, measured[max(lengths)]))
            print(rtt, json.dumps(waits[-1]))
    headers = [
        "round trip",
        "drafts",
        "predicted ms",
        "measured",
        "ratio",
        "predicted bytes",
        "measured",
        "tokens a trip",
    ]
    print(
        tabulate(
            lines,
            headers,
            tablefmt="github",
            floatfmt=("", "", ".1f", ".1f", ".2f", ".0f", ".0f", ".2f"),
        )
    )
    if args.figures is not None:
        draft = shipped_figures(manifest.source.files)[manifest.split]
        shape = {"d_ff": draft.d_ff, "vocabulary": draft.vocabulary, "waits": waits}
        args.figures.write_text(json.dumps(shape, indent=1) + "\n")


if __name__ == "__main__":
    main()
