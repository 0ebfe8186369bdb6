"""How often a bundle's draft says what the model says, on the model's greedy answers to prompts, and what it takes.

    python benchmarks/draft_agreement.py --bundle OUT [--prompts FILE ...] [--limit N] [--tokens 96]

Each prompt's answer is generated over a loopback link with `raw32` and nothing drafted; then prompt and answer run
through both halves and the draft in one process. ``guessable`` is the share of the answers' tokens that are among the
draft's ids, and ``agreement`` the share that it guesses. Prompt files are those of `isthmus bench`, or MT-Bench's, of
whose questions the first turn is asked. Then tokens go through the front and the draft in turns, one thread, as they do
when they are generated: medians of both, three times over.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from isthmus.runtime.bundle import Bundle, open_bundle
from isthmus.runtime.draft_bundle import Draft, open_draft
from isthmus.runtime.edge.model import EdgeModel, Prompt
from isthmus.runtime.edge.prompt_bench import read_prompts
from isthmus.runtime.edge.trained_draft import TrainedDraft
from isthmus.runtime.exit_measurement import ExitText, measure_exits
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.segments import Embedding, LayerStack
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

PROMPTS = Path(__file__).parent / "prompts"
STEPS = 200


def prompts_of(path: Path) -> list[Prompt]:
    """Of a prompt file, or the first turns of MT-Bench's questions."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if '"turns"' not in lines[0]:
        return read_prompts(path)
    return [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]


def guess_times(device: Bundle, draft: Draft) -> tuple[float, float]:
    """Median ms of a token in the front, and of a guess right after it."""
    embedding, ids = Embedding(device), list(range(100, 100 + STEPS))
    front = LayerStack(device, 1).session(STEPS)
    guessing = TrainedDraft(draft, 1).session(STEPS, Sampling(), [])
    times: list[tuple[float, float]] = []
    for position in range(STEPS):
        rows = embedding.rows(ids[position : position + 1])
        started = perf_counter()
        hidden = front.forward(rows)
        between = perf_counter()
        guessing.observe(hidden.copy())
        guessing.guesses(ids[: position + 1], 1)
        times.append((1e3 * (between - started), 1e3 * (perf_counter() - between)))
    in_front, guess = zip(*times[STEPS // 4 :], strict=True)
    return median(in_front), median(guess)


def main() -> None:
    """Generate, measure and print a line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT", help="split, with a draft")
    parser.add_argument("--prompts", type=Path, nargs="+", metavar="FILE", default=sorted(PROMPTS.glob("*.jsonl")))
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts of each file only")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="of an answer, at most")
    args = parser.parse_args()

    device, server = (open_bundle(args.bundle / half, half) for half in ("device", "server"))
    draft = open_draft(device)
    if draft is None:
        parser.error(f"{args.bundle} holds no draft")
    rows = []
    with BackServer.from_bundle(args.bundle / "server", security=ServerSecurity(insecure=True)) as running:
        model = EdgeModel(
            args.bundle / "device",
            server=running.address,
            security=ChannelSecurity(insecure=True),
            codec="raw32",
            draft="off",
        )
        for path in args.prompts:
            texts = []
            for prompt in tqdm(prompts_of(path)[: args.limit], desc=path.stem, disable=None):
                answer = model.generate(prompt, max_new_tokens=args.tokens)
                ids = [*answer.prompt_ids, *answer.token_ids]
                texts.append(ExitText(ids, np.arange(len(ids)) >= len(answer.prompt_ids)))
            agreed = np.concatenate([text.agreed for text in measure_exits(device, server, texts)])
            written = np.concatenate([np.array(text.ids)[text.written] for text in texts])
            guessable = np.isin(written, draft.vocabulary).mean()
            error = np.sqrt(agreed.mean() * (1 - agreed.mean()) / len(agreed))
            rows.append([path.stem, len(texts), len(agreed), guessable, f"{agreed.mean():.3f} ± {error:.3f}"])
    print(tabulate(rows, ["prompts", "number", "tokens", "guessable", "agreement"], tablefmt="github", floatfmt=".3f"))
    for _ in range(3):
        in_front, guess = guess_times(device, draft)
        print(f"a guess takes {guess:.2f} ms, {guess / in_front:.1%} of the {in_front:.2f} ms in the front")


if __name__ == "__main__":
    main()
