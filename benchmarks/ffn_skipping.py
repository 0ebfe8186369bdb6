"""What FFN skipping would cost and save: feed-forward networks left out by similarity, in transformers' float model.

    python benchmarks/ffn_skipping.py --text FILE [--model NAME] [--thresholds 0.99,0.98,0.95] [--windows 8]

FFN-SkipLLM (arXiv 2404.03865): in the layers between a cold start and a cold end, where the cosine of a token's hidden
state before and after the feed-forward network reaches a threshold, the next layer's network is left out for that
token; attention always runs. Here the first `PROMPT` tokens of each window are warm-up. ``saved`` is the share of all
feed-forward networks that do not run: it bounds what could be gained before the similarities themselves are paid for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from isthmus.export.calibration import file_windows
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.sources import resolve_model
from isthmus.export.transformers_reference import transformers_model

WINDOW, PROMPT = 256, 128


@dataclass
class Skipping:
    """Leaves networks out of a model whose layers it was attached to.

    Attributes:
        threshold: that a similarity must reach; None runs all.
        middle: layers whose networks may be left out.
        shares: of the tokens behind the prompt that left a network out, by layer and window.
    """

    middle: range
    threshold: float | None = None
    shares: list[float] = field(default_factory=list)
    _before: Any = None
    _next: Any = None

    def attach(self, layers: Sequence[Any]) -> None:
        """Stand between a model's layers and their networks."""
        for index, layer in enumerate(layers):
            layer.post_attention_layernorm.register_forward_pre_hook(self._keep)
            layer.mlp.register_forward_hook(lambda _, __, output, index=index: self._after(index, output))

    def _keep(self, _norm: Any, arguments: tuple[Any, ...]) -> None:
        (self._before,) = arguments

    def _after(self, index: int, output: Any) -> Any:
        if self.threshold is None:
            return output
        similar = cosine_similarity(self._before, self._before + output, dim=-1) >= self.threshold
        if index == 0:
            self._next = torch.zeros_like(similar)
        skip = self._next & (index in self.middle)
        skip[:, :PROMPT] = False
        self._next = similar & ~skip & (index in self.middle)
        self.shares.append(float(skip[:, PROMPT:].float().mean()))
        return torch.where(skip[..., None], 0.0, output)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="NAME")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--thresholds", default="0.999,0.995,0.99,0.98,0.97,0.95", metavar="X,…")
    parser.add_argument("--cold", default="3,3", metavar="N,N", help="first and last layers that always run whole")
    parser.add_argument("--windows", type=int, default=8, metavar="N")
    args = parser.parse_args()

    checkpoint = open_checkpoint(resolve_model(args.model))
    windows = file_windows(
        args.text, checkpoint.tokenizer().tokenizer_json, tokens=args.windows * WINDOW, window=WINDOW
    )
    model = transformers_model(checkpoint)
    layers = model.model.layers
    start, end = map(int, args.cold.split(","))
    skipping = Skipping(range(start, len(layers) - end))
    skipping.attach(layers)

    def predictions(threshold: float | None) -> tuple[Any, float]:
        """Log probabilities behind the prompts, and the share of networks that were left out."""
        skipping.threshold, skipping.shares = threshold, []
        with torch.no_grad():
            logits = [
                model(torch.tensor([ids])).logits[0, PROMPT:-1] for ids in tqdm(windows, leave=False, disable=None)
            ]
        saved = sum(skipping.shares) / len(skipping.shares) if skipping.shares else 0.0
        return torch.cat(logits).log_softmax(-1), saved

    targets = torch.tensor([token for ids in windows for token in ids[PROMPT + 1 :]])
    full, _ = predictions(None)
    rows = []
    for threshold in (None, *map(float, args.thresholds.split(","))):
        own, saved = predictions(threshold)
        perplexity = float((-own[torch.arange(len(targets)), targets]).mean().exp())
        kl = float((full.exp() * (full - own)).sum(-1).mean())
        same = float((full.argmax(-1) == own.argmax(-1)).float().mean())
        name = "all" if threshold is None else f"{threshold:g}"
        rows.append([name, f"{saved:.1%}", f"{perplexity:.2f}", f"{kl:.3f}", f"{same:.3f}"])
    print(tabulate(rows, ["threshold", "saved", "perplexity", "KL", "top-1"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
