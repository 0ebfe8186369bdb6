"""Two drafts from the same front, trained for the same time on the same conversations: one layer, and M2R2's stream.

    isthmus distill OUT --minutes 1                       # or any earlier run: its conversations are what is needed
    python benchmarks/accelerated_draft.py --work OUT/distill --split 10 [--minutes 30] [--rank 32]

- ``layer``: what `isthmus distill` trains, a square map, one decoder layer and the trimmed head over the hidden states
  at the split, from its usual first weights.
- ``stream``: accelerated residual streams (M2R2, arXiv 2502.02040; no code is published, so by its text). A second
  residual stream runs through the front's own layers, from the embedding: ``p[i+1] = p[i] + layer_i(p[i])``, each
  matrix of the layer with a low-rank adapter, its queries over the keys and values of the real (slow) stream, so that
  there is no second cache. Behind the front a square map and the trimmed head, as with the layer. The front is frozen.
  Ours: there is one gate, the split, where it is aligned to the features after the last layer by the layer's own loss.

Prints, for both, steps, trained parameters and greedy agreement on the held-out group over the minutes; and, with
``--bundle OUT``, what a second row in the front takes, which is the least that a guess of the stream costs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from isthmus.export.checkpoint import Checkpoint, open_checkpoint
from isthmus.export.conversations import WINDOW, Conversations
from isthmus.export.distill import VOCABULARY, most_used, square_map
from isthmus.export.draft_costs import draft_d_ff
from isthmus.export.draft_model import DraftModel, DraftShape, initial_weights, load_weights
from isthmus.export.draft_training import Teacher, train
from isthmus.export.families import family_of
from isthmus.export.families.common import EMBEDDING, FINAL_NORM, HEAD
from isthmus.export.footprint import Footprint
from isthmus.export.rope import rope_tables
from isthmus.export.sources import resolve_model
from isthmus.runtime.bundle import Architecture
from isthmus.runtime.chain import Chain

ADAPTED = ("query", "attention_output", "gate", "up", "down")  # keys and values are the slow stream's


class AcceleratedDraft(nn.Module):  # type: ignore[misc]
    """See the module; it reads embedding rows and runs the front itself. Used like `DraftModel`."""

    def __init__(self, checkpoint: Checkpoint, split: int, vocabulary: Any, square: Any, rank: int) -> None:
        super().__init__()
        family = family_of(checkpoint.config)
        self.arch: Architecture = family.architecture(checkpoint.config)
        names = [family.tensors(self.arch, layer) for layer in range(split)]
        roles = ("input_norm", "query", "key", "value", "attention_output", "post_norm", "gate", "up", "down")
        self.front = [
            {role: torch.from_numpy(checkpoint.tensor(getattr(each, role)).copy()).bfloat16() for role in roles}
            for each in names
        ]
        weights: dict[str, Tensor] = {}
        for layer, frozen in enumerate(self.front):
            for role in ADAPTED:
                rows, columns = frozen[role].shape
                weights[f"{layer}_{role}_in"] = torch.randn(rank, columns) / columns**0.5
                weights[f"{layer}_{role}_out"] = torch.zeros(rows, rank)
        head = checkpoint.tensor(EMBEDDING if self.arch.tied_embeddings else HEAD)[vocabulary]
        for name, array in (("map", square), ("head", head), ("final_norm", checkpoint.tensor(FINAL_NORM))):
            weights[name] = torch.from_numpy(np.array(array, np.float32))
        self.weights = nn.ParameterDict(weights)
        cos, sin = rope_tables(self.arch, WINDOW)
        self.cos, self.sin = torch.from_numpy(cos), torch.from_numpy(sin)

    def forward(self, embedded: Tensor) -> Tensor:
        """Features ``[texts, tokens, d_model]``, normed for the head, of embedding rows of that shape."""
        slow = fast = embedded.bfloat16()
        for layer, frozen in enumerate(self.front):
            with torch.no_grad():
                normed = self._norm(slow, frozen["input_norm"])
                key = self._rotate(self._heads(functional.linear(normed, frozen["key"]), self.arch.kv_heads))
                value = self._heads(functional.linear(normed, frozen["value"]), self.arch.kv_heads)
            fast = self._layer(layer, fast, key, value, adapted=True)
            with torch.no_grad():
                slow = self._layer(layer, slow, key, value, adapted=False)
        return self._norm(functional.linear(fast, self.weights["map"]), self.weights["final_norm"])

    def logits(self, features: Tensor) -> Tensor:
        """Logits over the trimmed vocabulary of what `forward` gave."""
        return functional.linear(features, self.weights["head"])

    def arrays(self) -> dict[str, Any]:
        """Its trained weights by name."""
        return {name: value.detach().float().numpy() for name, value in self.weights.items()}

    def _layer(self, layer: int, residual: Tensor, key: Tensor, value: Tensor, *, adapted: bool) -> Tensor:
        frozen, weights = self.front[layer], self.weights

        def linear(values: Tensor, role: str) -> Tensor:
            product = functional.linear(values, frozen[role])
            if not adapted:
                return product
            narrow = functional.linear(values, weights[f"{layer}_{role}_in"])
            return product + functional.linear(narrow, weights[f"{layer}_{role}_out"])

        normed = self._norm(residual, frozen["input_norm"])
        query = self._rotate(self._heads(linear(normed, "query"), self.arch.heads))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        residual = residual + linear(attended.transpose(1, 2).flatten(2), "attention_output")
        normed = self._norm(residual, frozen["post_norm"])
        return residual + linear(functional.silu(linear(normed, "gate")) * linear(normed, "up"), "down")

    def _heads(self, values: Tensor, count: int) -> Tensor:
        return values.unflatten(2, (count, self.arch.head_dim)).transpose(1, 2)

    def _norm(self, values: Tensor, gamma: Tensor) -> Tensor:
        return functional.rms_norm(values, gamma.shape, gamma.to(values.dtype), self.arch.norm_epsilon)

    def _rotate(self, values: Tensor) -> Tensor:
        cos, sin = self.cos[: values.shape[2]], self.sin[: values.shape[2]]
        first, second = values.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(values.dtype)


def embedded(text: Conversations, table: Any) -> Conversations:
    """The same conversations, with embedding rows in place of the states at the split."""
    return Conversations(text.ids, text.written, table[text.ids].astype(np.float16), text.final)


def second_row(bundle: Path, rounds: int = 60) -> float:
    """What two rows in the front take more than one, as a share of one."""
    chain, times = Chain.open(bundle / "device", bundle / "server", threads=1), ([], [])
    chain.front(list(range(100, 164)))
    for number in range(rounds):
        for rows in (1, 2):
            started = perf_counter()
            chain.front([200 + number] * rows)
            times[rows - 1].append(perf_counter() - started)
    one, two = map(median, times)
    return two / one - 1


def main() -> None:
    """Train both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="with conversations-*.npz")
    parser.add_argument("--split", type=int, default=10, metavar="N", help="at which they were written")
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="NAME")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N", help="for each")
    parser.add_argument("--rank", type=int, default=32, metavar="N", help="of the adapters")
    parser.add_argument("--bundle", type=Path, metavar="OUT", help="to time a second row in its front")
    args = parser.parse_args()

    checkpoint = open_checkpoint(resolve_model(args.model))
    family = family_of(checkpoint.config)
    arch = family.architecture(checkpoint.config)
    held_out, *texts = [Conversations.load(path) for path in sorted(args.work.glob("conversations-*.npz"))]
    ids = most_used(texts, arch.vocab_size, VOCABULARY)
    table = checkpoint.tensor(EMBEDDING)
    head = (table if arch.tied_embeddings else checkpoint.tensor(HEAD))[ids]
    teacher = Teacher(checkpoint.tensor(FINAL_NORM), arch.norm_epsilon, head, ids)
    square = square_map(texts)
    torch.manual_seed(0)
    shape = DraftShape(arch, draft_d_ff(Footprint(arch), args.split, len(ids)), len(ids))
    layer = DraftModel(shape, WINDOW)
    use = np.linalg.norm(checkpoint.tensor(family.tensors(arch, arch.layers - 1).down), axis=0)
    load_weights(layer, initial_weights(checkpoint, family, shape, ids, square, use))
    stream = AcceleratedDraft(checkpoint, args.split, ids, square, args.rank)
    rows = []
    for name, model, data in (
        ("layer", layer, [held_out, *texts]),
        ("stream", stream, [embedded(text, table) for text in (held_out, *texts)]),
    ):
        with (
            tqdm(desc=name, total=round(60 * args.minutes), unit="s", disable=None) as bar,
            tempfile.TemporaryDirectory() as kept,
        ):

            def told(what: str, done: int, total: int, bar: Any = bar) -> None:
                bar.set_postfix_str(what)
                bar.update(done - bar.n)

            state = train(
                model,
                teacher,
                data[1:],
                data[0],
                minutes=args.minutes,
                seed=0,
                keep=Path(kept) / "state.pt",
                progress=told,
            )
        size = sum(value.numel() for value in model.parameters())
        curve = ", ".join(f"{point.seconds / 60:.0f}: {point.agreement:.3f}" for point in state.curve)
        best = state.best_measurement
        rows.append([name, state.step, f"{size / 1e6:.1f}", f"{best.agreement:.3f}", f"{best.overlap:.3f}", curve])
    print(
        tabulate(
            rows, ["draft", "steps", "M parameters", "agreement", "overlap", "minutes: agreement"], tablefmt="github"
        )
    )
    if args.bundle:
        print(f"a second row in the front takes {second_row(args.bundle):.0%} of the first one's time")


if __name__ == "__main__":
    main()
