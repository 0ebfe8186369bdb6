"""Early exit: what it promises, what it keeps, and the round trips that it saves.

    python benchmarks/exits.py --bundle OUT [--prompts FILE ...] [--agreements 0.9,0.95,0.98] [--tokens 64]

Each prompt's answer is generated over a loopback link at each promised agreement, with `raw32` and nothing drafted.
Then the prompt and the answer are run through both halves in one process: a token agrees if the full model's likeliest
token after the same ids is that one. So agreement is measured on the text that the exits themselves made, token by
token; a text that once went another way than the full model's is not compared with it.

With --splits FILE, conversations that `isthmus distill --exits-only` keeps, it is measured how often the promise fails:
calibrated on a half of them, drawn 200 times, and tested on the other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.chain import Chain
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.prompt_bench import read_prompts
from isthmus.runtime.edge.stream import Generation
from isthmus.runtime.exit_measurement import ExitText, measure_exits
from isthmus.runtime.exits import ExitCurve
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

SPLITS = 200
PROMPTS = Path(__file__).parent / "prompts"


def agreeing(chain: Chain, result: Generation) -> int:
    """How many of a generation's tokens the full model would have chosen."""
    chain.truncate(0)
    ids = [*result.prompt_ids, *result.token_ids]
    final = chain.back(chain.front(ids[:-1]))[len(result.prompt_ids) - 1 :]
    chosen = [int(chain.logits(row[None])[0].argmax()) for row in final]
    return int(np.sum(np.array(chosen) == np.array(result.token_ids)))


def splits(bundle: Path, path: Path, agreements: list[float], threads: int) -> str:
    """How often a promise fails on the half of some texts that it was not calibrated on."""
    with np.load(path) as file:
        pairs = list(zip(file["ids"].tolist(), file["written"], strict=True))
    halves = (open_bundle(bundle / half, half) for half in ("device", "server"))
    with tqdm(total=len(pairs), desc="texts", leave=False) as bar:
        texts = measure_exits(
            *halves, [ExitText(*pair) for pair in pairs], threads=threads, progress=lambda *_: bar.update()
        )
    rng, rows = np.random.default_rng(0), []
    for agreement in agreements:
        thresholds, exited, kept = [], [], []
        for _ in range(SPLITS):
            order = rng.permutation(len(texts))
            threshold = ExitCurve.of([texts[at] for at in order[::2]]).threshold(agreement)
            if threshold is None:
                continue
            confidence, agreed = (np.concatenate(part) for part in zip(*(texts[at] for at in order[1::2]), strict=True))
            thresholds.append(threshold)
            exited.append((confidence >= threshold).mean())
            kept.append(1 - ((confidence >= threshold) & ~agreed).mean())
        failed = sum(share < agreement for share in kept)
        means = [f"{np.mean(values):.3f}" if values else "none" for values in (thresholds, exited, kept)]
        rows.append([f"{agreement:g}", *means, f"{failed} of {len(kept)}"])
    headers = ["promised", "threshold, mean", "exited", "agreement", "broken"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Measure and print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument("--prompts", nargs="+", type=Path, default=sorted(PROMPTS.glob("*.jsonl")))
    parser.add_argument("--agreements", default="0.9,0.95,0.98")
    parser.add_argument("--each", type=int, default=40, metavar="N", help="prompts of each file")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--splits", type=Path, metavar="FILE", help="measure this instead")
    args = parser.parse_args()
    agreements = [float(part) for part in args.agreements.split(",")]
    if args.splits is not None:
        print(splits(args.bundle, args.splits, agreements, args.threads))
        return

    device, rows, told = args.bundle / "device", [], []
    chain = Chain.open(device, args.bundle / "server", threads=args.threads)
    security = ServerSecurity(insecure=True)
    with BackServer.from_bundle(args.bundle / "server", threads=args.threads, security=security) as server:
        for agreement in agreements:
            model = EdgeModel(
                device,
                server=server.address,
                security=ChannelSecurity(insecure=True),
                codec="raw32",
                threads=args.threads,
                exit_agreement=agreement,
            )
            for path in args.prompts:
                figures = {"promised": agreement, "prompts": path.stem, "tokens": 0, "exited": 0, "round_trips": 0}
                layers, right = 0.0, 0
                for prompt in tqdm(read_prompts(path)[: args.each], desc=f"{agreement:g} {path.stem}", leave=False):
                    result = model.generate(prompt, max_new_tokens=args.tokens)
                    figures["tokens"] += result.new_tokens
                    figures["exited"] += result.exited
                    figures["round_trips"] += result.round_trips
                    layers += sum(token.layers for token in result.tokens)
                    right += agreeing(chain, result)
                figures |= {"agreement": right / figures["tokens"], "mean_layers": layers / figures["tokens"]}
                told.append(figures)
                rows.append(
                    [
                        f"{agreement:g}",
                        path.stem,
                        figures["tokens"],
                        f"{figures['exited'] / figures['tokens']:.3f}",
                        f"{figures['agreement']:.3f}",
                        f"{1 - figures['round_trips'] / figures['tokens']:.3f}",
                        f"{figures['mean_layers']:.1f}",
                    ]
                )
    headers = ["promised", "prompts", "tokens", "exited", "agreement", "round trips saved", "layers a token"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
