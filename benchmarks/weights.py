"""What each way to round the weights costs: KL, top-1 and perplexity against the float model, at which bytes.

    python benchmarks/weights.py --text wiki.test.raw --calibration wiki.valid.txt --results weights.jsonl

The weights are rounded, dequantized and run by the float model in NumPy: no export, and no rounding of activations.
Rows that the results file holds already are not measured again. Embedding and head stay as they are in every row. A
GGUF source is not copied: its weights count as the float ones.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tokenizers import Tokenizer

from isthmus.export.calibration import WINDOW, file_windows
from isthmus.export.checkpoint import Checkpoint, open_checkpoint
from isthmus.export.families import family_of
from isthmus.export.families.common import EMBEDDING, ROLES
from isthmus.export.float_layer import FloatHead, FloatLayer
from isthmus.export.gptq import CalibratedWeights
from isthmus.export.sensitivity import auto
from isthmus.export.sources import resolve_model
from isthmus.export.validate import log_softmax
from isthmus.quant.allocation import mixed
from isthmus.quant.grids import quantize
from isthmus.quant.nbits import PackedWeight, dequantize
from isthmus.quant.opsc import CALIBRATED, Recipe

HEAD_ROWS = 128


@dataclass(frozen=True)
class Row:
    """Front bits, back bits, block size, how the codes are found, and where precision changes (``--split`` if None)."""

    front_bits: int
    back_bits: int
    block_size: int
    weights: str
    symmetric: bool = True
    split: int | None = None

    @property
    def name(self) -> str:
        """``4/8 bits, blocks of 32, gptq``."""
        bits = str(self.front_bits) if self.front_bits == self.back_bits else f"{self.front_bits}/{self.back_bits}"
        split = "" if self.split is None else f" from layer {self.split}"
        form = "" if self.symmetric else ", asymmetric"
        return f"{bits} bits{split}, blocks of {self.block_size}{form}, {self.weights}"


ROWS = [
    *(Row(4, 4, 128, weights) for weights in ("rtn", "auto", "gptq", "mixed", "mse", "hqq")),
    *(Row(2, 2, 64, weights) for weights in ("rtn", "auto", "gptq", "mse", "hqq")),
    *(Row(4, 4, 32, weights) for weights in ("rtn", "gptq", "mse", "hqq")),
    Row(8, 8, 32, "rtn"),
    *(Row(4, 8, 32, weights) for weights in ("rtn", "gptq")),
    *(Row(4, 16, 32, weights) for weights in ("rtn",)),
    *(Row(2, 8, 64, weights) for weights in ("rtn", "gptq", "auto")),
    Row(4, 4, 64, "rtn"),
    Row(4, 4, 64, "gptq", symmetric=False),
    # Of equal bytes in thirty layers: 2/8 from layer 20 and 4 everywhere; 8/4 from 20 and 4/8 from 10. Two percent
    # apart: 4/16 from 20 and 8 everywhere.
    *(Row(2, 8, 64, weights, split=20) for weights in ("rtn", "hqq", "gptq")),
    *(Row(4, 4, 64, weights) for weights in ("hqq", "gptq")),
    *(Row(8, 4, 32, weights, split=20) for weights in ("rtn", "gptq")),
    Row(4, 8, 32, "auto"),
    Row(4, 16, 64, "rtn", split=20),
    Row(8, 8, 64, "rtn"),
]


class Uncopied:
    """A checkpoint that gives its tensors as floats only, so that nothing is copied from it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensor = checkpoint.tensor
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer


class Bench:
    """A checkpoint's float layers, the text to measure on, and what the float model makes of it."""

    def __init__(
        self, model: Path, text: Path, windows: int, calibration: Path, calibration_windows: int, split: int
    ) -> None:
        self.checkpoint: Any = Uncopied(open_checkpoint(model))
        self.family = family_of(self.checkpoint.config)
        self.arch = self.family.architecture(self.checkpoint.config)
        self.split = split
        given = file_windows(calibration, self.checkpoint.tokenizer().tokenizer_json, tokens=sys.maxsize, window=WINDOW)
        self.calibration = given[:: max(1, len(given) // calibration_windows)][:calibration_windows]
        self.layers = [FloatLayer.read(self.checkpoint, self.family, self.arch, i) for i in range(self.arch.layers)]
        self.head = FloatHead.read(self.checkpoint, self.arch)
        self._embedding = self.checkpoint.tensor(EMBEDDING)
        tokenizer = Tokenizer.from_str(self.checkpoint.tokenizer().tokenizer_json)
        ids = tokenizer.encode(text.read_bytes().decode().replace("\r\n", "\n"), add_special_tokens=False).ids
        self.windows = [ids[WINDOW * i : WINDOW * (i + 1)] for i in range(windows)]
        self._expected = self._run(self.layers)

    def measure(self, row: Row) -> dict[str, Any]:
        """Bytes of the layers' weights, KL, top-1 agreement and both perplexities."""
        recipe = Recipe(
            layers=self.arch.layers,
            split=self.split if row.split is None else row.split,
            front_bits=row.front_bits,
            back_bits=row.back_bits,
            embed_bits=8,
            head_bits=8,
            block_size=row.block_size,
            weights=row.weights,
            symmetric=row.symmetric,
        )
        if row.weights == "mixed":
            recipe = replace(recipe, exceptions=mixed(recipe))
        elif row.weights == "auto":
            chosen = auto(recipe, self.checkpoint, self.family, self.arch, self.calibration, _say)
            recipe = replace(recipe, exceptions=chosen)
        packed: Callable[[str], PackedWeight] | None = None
        if row.weights in CALIBRATED:
            packed = CalibratedWeights(
                self.checkpoint, self.family, self.arch, recipe.precision, self.calibration, _say
            )
        stored = 0
        layers = []
        for index, layer in enumerate(self.layers):
            changes: dict[str, Any] = {}
            for role in ROLES:
                name, weight = f"layers.{index}.{role}", getattr(layer, role)
                precision = recipe.precision(name)
                stored += precision.bytes_for(*weight.shape)
                if precision.packed and packed:
                    changes[role] = dequantize(packed(name))
                elif precision.packed:
                    bits, size = precision.bits, precision.block_size
                    rounded = quantize(weight, bits, size, precision.method, symmetric=precision.symmetric)
                    changes[role] = dequantize(rounded)
                elif precision.bits == 16:
                    changes[role] = weight.astype(np.float16).astype(np.float32)
            layers.append(replace(layer, **changes))
        return {"row": row.name, "bytes": stored, **self._compare(self._run(layers))}

    def _run(self, layers: list[FloatLayer]) -> list[np.ndarray]:
        texts = [self._embedding[window] for window in self.windows]
        for layer in layers:
            texts = [layer.forward(hidden)[0] for hidden in texts]
        return texts

    def _compare(self, texts: list[np.ndarray]) -> dict[str, float]:
        kl, agreeing, tokens, losses, targets = 0.0, 0, 0, np.zeros(2), 0
        for window, actual, expected in zip(self.windows, texts, self._expected, strict=True):
            for first in range(0, len(window), HEAD_ROWS):
                rows = slice(first, first + HEAD_ROWS)
                log_p, log_q = (log_softmax(self.head.logits(hidden[rows])) for hidden in (expected, actual))
                kl += float((np.exp(log_p) * (log_p - log_q)).sum())
                agreeing += int((log_p.argmax(1) == log_q.argmax(1)).sum())
                tokens += len(log_p)
                following = np.asarray(window[first + 1 : first + 1 + HEAD_ROWS])
                at = np.arange(len(following)), following
                losses -= log_p[at].sum(), log_q[at].sum()
                targets += len(following)
        return {
            "kl": kl / tokens,
            "top1": agreeing / tokens,
            "perplexity": math.exp(losses[1] / targets),
            "reference_perplexity": math.exp(losses[0] / targets),
            "tokens": tokens,
        }


def _say(what: str, done: int, total: int) -> None:
    print(f"\r{what} ({done}/{total})    ", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Measure the rows that are not there yet, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, required=True, help="measured on its first tokens")
    parser.add_argument("--calibration", type=Path, required=True, help="another text")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens each, measured on (default 8)")
    parser.add_argument("--calibration-windows", type=int, default=16, help="of 512 tokens each (default 16)")
    parser.add_argument("--split", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("weights.jsonl"), help="rows are added to this file")
    parser.add_argument("--rows", default="", help="measure only rows with this regular expression in their name")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    lines = args.results.read_text().splitlines() if args.results.is_file() else []
    results = {line["row"]: line for line in map(json.loads, lines)}
    wanted = [row for row in ROWS if re.search(args.rows, row.name) and row.name not in results]
    if wanted:
        model = resolve_model(args.model, cache=None, offline=False, progress=_say)
        bench = Bench(model, args.text, args.windows, args.calibration, args.calibration_windows, args.split)
        for row in wanted:
            results[row.name] = bench.measure(row)
            with args.results.open("a") as file:
                file.write(json.dumps(results[row.name]) + "\n")
            print(f"\r{results[row.name]}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(list(results.values()), indent=1))
        return
    table = [
        [r["row"], r["bytes"] / 1e6, r["kl"], r["top1"], r["perplexity"]]
        for r in results.values()
        if r["row"] in {row.name for row in ROWS}
    ]
    print(tabulate(table, headers=["layers' weights", "MB", "KL", "top-1", "perplexity"], floatfmt=".4g"))


if __name__ == "__main__":
    main()
