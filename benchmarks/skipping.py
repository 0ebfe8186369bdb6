"""Skip decoding: what a budget of layers does to speed, perplexity and tasks.

    isthmus export smollm2-135m-instruct -o OUT --split 10 --layers-per-block 2
    python benchmarks/skipping.py --bundle OUT --text FILE [--task NAME FILE ...] [--schedules 28:28:1,30:24:96]

- Text: windows whose first `PROMPT` tokens are the prompt and run at full depth; what is predicted after the others
  counts. KL and top-1 agreement are with the same bundle at full depth.
- Tasks: an item's context runs at full depth, its answers by the schedule; the difference is taken item by item.
- Speed: tokens after a prompt over a loopback link, nothing drafted, schedules in turns; ``x`` is the median ratio to
  full depth in the same round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from isthmus.export.validate import log_softmax
from isthmus.runtime.chain import HEAD_ROWS, Chain, chunks
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.evaluate import read_text, text_windows
from isthmus.runtime.harness import BundleLM, item_scores
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.skipping import NO_BYPASS, Bypass, SkipSchedule, bypass_order
from isthmus.runtime.tasks import read_docs
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

WINDOW, PROMPT = 256, 128


class SkippingLM(BundleLM):
    """A bundle whose answers, but not their contexts, leave blocks out."""

    def __init__(self, chain: Chain, schedule: SkipSchedule | None, **options: Any) -> None:
        super().__init__(chain, **options)
        self._schedule = schedule

    def _score(self, context: list[int], following: list[int]) -> tuple[float, bool]:
        self._chain.leave_out(bypass(self._chain, self._schedule, len(context)))
        return super()._score(context, following)


def bypass(chain: Chain, schedule: SkipSchedule | None, prompt_tokens: int) -> Bypass:
    """The blocks that a schedule leaves out after a prompt."""
    if schedule is None:
        return NO_BYPASS
    manifest = chain.manifest
    return schedule.bypass(bypass_order(manifest), manifest.architecture.layers, prompt_tokens)


def on_text(chain: Chain, windows: list[list[int]], schedule: SkipSchedule | None) -> dict[str, float]:
    """Perplexity behind the prompts, and KL and agreement with full depth there."""
    losses, kls, agreed = [], [], []
    for ids in tqdm(windows, desc=str(schedule or "all layers"), leave=False, disable=None):
        final = []
        for each in (None, schedule):
            chain.truncate(0)
            chain.leave_out(bypass(chain, each, PROMPT))
            final.append(chain.back(chain.front(ids[:-1]))[PROMPT:])
        targets = np.array(ids[PROMPT + 1 :])
        for rows in chunks(len(targets), HEAD_ROWS):
            full, skipped = (log_softmax(chain.logits(hidden[rows])) for hidden in final)
            losses.append(-skipped[np.arange(len(skipped)), targets[rows]])
            kls.append((np.exp(full) * (full - skipped)).sum(1))
            agreed.append(full.argmax(1) == skipped.argmax(1))
    loss, kl, same = (float(np.concatenate(parts).mean()) for parts in (losses, kls, agreed))
    return {"perplexity": float(np.exp(loss)), "kl": kl, "top1": same}


def on_tasks(chain: Chain, schedule: SkipSchedule | None, tasks: list[tuple[str, list[Any]]]) -> dict[str, Any]:
    """Each item's score, by task."""
    scores = {}
    for name, docs in tasks:
        with tqdm(desc=f"{name}, {schedule or 'all layers'}", leave=False, disable=None) as bar:
            model = SkippingLM(chain, schedule, progress=lambda what, done, total, bar=bar: bar.update())
            scores[name] = item_scores(model, name, docs)["acc"]
    return scores


def speeds(bundle: Path, schedules: list[SkipSchedule | None], tokens: int, rounds: int) -> dict[Any, Any]:
    """Tokens/s of each schedule, round by round, and the mean layers of a token."""
    security = ServerSecurity(insecure=True)
    found: dict[Any, list[float]] = {schedule: [] for schedule in schedules}
    layers: dict[Any, float] = {}
    with BackServer.from_bundle(bundle / "server", "127.0.0.1:0", threads=1, security=security) as server:
        models = {
            schedule: EdgeModel(
                bundle / "device",
                server=server.address,
                security=ChannelSecurity(insecure=True),
                codec="raw16",
                threads=1,
                draft="off",
                skip_schedule=schedule,
            )
            for schedule in schedules
        }
        ids = models[None].prompt_ids("Once upon a time, in a small village by the sea,")
        for _ in tqdm(range(rounds), desc="speed", leave=False, disable=None):
            for schedule, model in models.items():
                with model.stream(ids, max_new_tokens=tokens) as stream:
                    for _piece in stream:
                        pass
                found[schedule].append(stream.result.decode_tokens_per_s)
                layers[schedule] = stream.result.mean_layers or 0.0
    return {schedule: (found[schedule], layers[schedule]) for schedule in schedules}


def main() -> None:
    """Measure and print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, metavar="OUT")
    parser.add_argument("--schedules", default="28:28:1,26:26:1,24:24:1,30:26:96,30:20:96", metavar="A:B:N,…")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--windows", type=int, default=24, metavar="N")
    parser.add_argument("--task", nargs=2, action="append", default=[], metavar=("NAME", "FILE"))
    parser.add_argument("--items", type=int, default=400, metavar="N", help="of each task")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="generated for the speed")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    schedules = [None, *map(SkipSchedule.parse, args.schedules.split(","))]
    measured = speeds(args.bundle, schedules, args.tokens, args.rounds)
    chain = Chain.open(args.bundle / "device", args.bundle / "server")
    windows = text_windows(
        chain.tokenizer, read_text(args.text)[0], window=WINDOW + 1, tokens=args.windows * (WINDOW + 1)
    )
    tasks = [(name, list(read_docs(name, path))[: args.items]) for name, path in args.task]
    results, rows, whole = {}, [], None
    for schedule in schedules:
        text, scores = on_text(chain, windows, schedule), on_tasks(chain, schedule, tasks)
        whole = scores if whole is None else whole
        rates, layers = measured[schedule]
        ratio = median(own / full for own, full in zip(rates, measured[None][0], strict=True))
        row = [str(schedule or "all layers"), f"{layers:.1f}", f"{median(rates):.1f}", f"{ratio:.2f}"]
        row += [f"{text['perplexity']:.2f}", f"{text['kl']:.3f}", f"{text['top1']:.3f}"]
        each: dict[str, Any] = {"layers": layers, "tokens_per_s": median(rates), "ratio": ratio} | text
        for name, values in scores.items():
            drop = values - whole[name]
            error = float(drop.std(ddof=1) / len(drop) ** 0.5)
            each[name] = {"accuracy": float(values.mean()), "difference": float(drop.mean()), "difference_se": error}
            row.append(f"{100 * values.mean():.1f} ({100 * drop.mean():+.1f} ± {100 * error:.1f})")
        results[str(schedule or "all")] = each
        rows.append(row)
    headers = ["schedule", "layers a token", "tokens/s", "x", "perplexity", "KL", "top-1", *(name for name, _ in tasks)]
    print(json.dumps(results) if args.json else tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
