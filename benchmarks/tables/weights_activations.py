"""Weights and activations in few bits, everywhere, against one precision change and a codec at the split.

    python benchmarks/tables/weights_activations.py --text FILE --data FOLDER --calibration FILE [--limit 100]

Perplexity of a text and accuracy on four tasks of lm-evaluation-harness for the float model, for published schemes
that round weights and activations of every layer (simulated, see schemes.py for what is simplified), and for a split
model as Isthmus exports it, simulated in the same way, with `tabq` at 4 bits for the hidden states at the split.

The default model's file holds 4-bit weights (Q4_1) itself: "float" means that file, dequantized, and every other row
rounds once more what was rounded already. FOLDER is searched for the tasks' files (docs/eval.md). What is done is kept
in a journal: a killed run goes on where it was, and the same command again prints the table at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from lm_eval.models.huggingface import HFLM
from schemes import (
    Scheme,
    apply,
    atom_style,
    block_inputs,
    block_weight,
    calibrate,
    isthmus,
    omniquant_style,
    round_to_nearest,
    smooth_quant,
)
from schemes import __file__ as schemes_file
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from isthmus.cli.progress import progress_bar
from isthmus.devices.backend import default_threads
from isthmus.errors import IsthmusError, RequestError
from isthmus.export.calibration import file_windows
from isthmus.export.catalog import cache_root
from isthmus.export.checkpoint import Checkpoint, open_checkpoint
from isthmus.export.progress import Progress
from isthmus.export.sources import resolve_model
from isthmus.export.transformers_reference import transformers_model
from isthmus.quant.tabq import TabQ
from isthmus.runtime.chain import CodecChoice
from isthmus.runtime.evaluate import ids_key, mean_and_error, read_text, text_windows
from isthmus.runtime.harness import item_scores
from isthmus.runtime.journal import Journal, subject_key, versions
from isthmus.runtime.tasks import Doc, read_docs
from isthmus.runtime.text import Tokenizer

FILES = {  # by task, where its file lies below the folder
    "hellaswag": "**/hellaswag*.txt*",
    "piqa": "**/piqa/valid*.jsonl*",
    "arc_easy": "**/arc_easy*.jsonl*",
    "openbookqa": "**/openbook*qa*.jsonl*",
}
# With a tolerance that no remainder misses, every token takes exactly 4 bits beside its outliers.
CODEC = CodecChoice("tabq", None, TabQ(tolerance=0.99, q_min=4, q_max=4))
BATCH = 8


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        scheme: of the linear maps; None leaves them in float32.
        inputs: what the table says of activations.
        split: layer before which hidden states pass the codec; embedding and head then have 8 bits, as in a bundle.
    """

    name: str
    scheme: Scheme | None
    inputs: str
    split: int | None = None


def entries(split: int, front_bits: int, back_bits: int) -> list[Entry]:
    """The table's lines."""
    return [
        Entry("float", None, "32"),
        Entry("RTN W4A4", round_to_nearest(4), "4, per token"),
        Entry("SmoothQuant W8A8", smooth_quant(8), "8, per token"),
        Entry("SmoothQuant W4A4", smooth_quant(4), "4, per token"),
        Entry("OmniQuant-style W4A4", omniquant_style(4), "4, per token"),
        Entry("Atom-style W4A4", atom_style(4), "4 in groups of 128, 32 channels 8"),
        Entry(
            f"Isthmus, {front_bits} | {back_bits}, split {split}",
            isthmus(split, front_bits, back_bits),
            "8 in blocks of 32; tabq 4 at the split",
            split,
        ),
    ]


class SplitCodec:
    """Hidden states before a layer, through a codec and back.

    Attributes:
        sent_bits: of all payloads.
        elements: that they hold.
    """

    def __init__(self) -> None:
        self.sent_bits = self.elements = 0

    def __call__(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The layer's positional arguments, the first of which are hidden states ``[..., tokens, d_model]``."""
        hidden, *rest = arguments
        rows = hidden.reshape(-1, hidden.shape[-1]).numpy()
        received, sent = CODEC.send(rows, [0] * len(rows))  # tabq does not need the tokens
        self.sent_bits += 8 * sent
        self.elements += rows.size
        return (torch.from_numpy(received).view_as(hidden), *rest)


class Rows:
    """Builds each entry's model when something of it is not in the journal yet, and measures."""

    def __init__(
        self, checkpoint: Checkpoint, calibration: list[list[int]], journal: Journal, progress: Progress
    ) -> None:
        self._checkpoint, self._calibration = checkpoint, calibration
        self._journal, self._progress = journal, progress
        self._inputs: dict[str, Tensor] | None = None
        self._built: tuple[str, Any, float, SplitCodec] | None = None

    def measure(self, entry: Entry, what: str, compute: Callable[[Any, float, SplitCodec], Any]) -> Any:
        """A result from the journal, or ``compute(model, weight bits, codec)``, which then goes there."""
        name = f"{entry.name}: {what}"
        result = self._journal.get(name)
        if result is None:
            if self._built is None or self._built[0] != entry.name:
                self._built = None  # one model in memory at a time
                self._built = (entry.name, *self._build(entry))
            _, model, bits, codec = self._built
            with torch.no_grad():
                result = compute(model, bits, codec)
            self._journal.put(name, result)
        return result

    def _build(self, entry: Entry) -> tuple[Any, float, SplitCodec]:
        model, bits, codec = transformers_model(self._checkpoint), 32.0, SplitCodec()
        if entry.scheme:
            if self._inputs is None:
                self._progress("calibration", 0, 1)
                self._inputs = calibrate(model, self._calibration)
            bits = apply(
                model,
                entry.scheme,
                self._inputs,
                lambda done, total: self._progress(f"layers, {entry.name}", done, total),
            )
        if entry.split is not None:
            embedding, head = model.model.embed_tokens, model.lm_head
            head.weight = nn.Parameter(block_weight(head.weight.detach(), 8), requires_grad=False)
            embedding.weight = nn.Parameter(block_weight(embedding.weight.detach(), 8), requires_grad=False)
            head.register_forward_pre_hook(lambda _, arguments: (block_inputs(arguments[0]),))
            model.model.layers[entry.split].register_forward_pre_hook(codec)
        return model, bits, codec


def losses(model: Any, windows: list[list[int]], progress: Callable[[int, int], None]) -> list[float]:
    """Summed loss of each window's tokens but the first, in nats."""
    sums = []
    for index, ids in enumerate(windows):
        progress(index, len(windows))
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        sums.append(float(cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")))
    progress(len(windows), len(windows))
    return sums


def text_result(
    model: Any, bits: float, codec: SplitCodec, windows: list[list[int]], progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """What the journal keeps of a text."""
    codec.sent_bits = codec.elements = 0
    sums = losses(model, windows, progress)
    sent = codec.sent_bits / codec.elements if codec.elements else None
    return {"losses": sums, "weight_bits": bits, "codec_bits_per_element": sent}


def task_result(model: Any, tokenizer: Any, task: str, docs: list[Doc]) -> dict[str, list[float]]:
    """Each item's scores, through the harness' own model class."""
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=2048, batch_size=BATCH, device="cpu")
    return {metric: values.tolist() for metric, values in item_scores(harness, task, docs).items()}


def summary(
    entry: Entry,
    text: dict[str, Any],
    tasks: dict[str, dict[str, list[float]]],
    reference: dict[str, dict[str, list[float]]],
    windows: list[list[int]],
) -> dict[str, Any]:
    """A line as ``--json`` prints it; errors are standard errors over windows, or over items."""
    counts = np.array([len(ids) - 1 for ids in windows], float)
    loss, loss_se = mean_and_error(np.array(text["losses"]), counts)
    perplexity = float(np.exp(loss))
    row: dict[str, Any] = {
        "scheme": entry.name,
        "weight_bits": text["weight_bits"],
        "activations": entry.inputs,
        "codec_bits_per_element": text["codec_bits_per_element"],
        "perplexity": perplexity,
        "perplexity_se": None if loss_se is None else loss_se * perplexity,
    }
    for task, scores in tasks.items():
        for metric, values in scores.items():
            row[f"{task}_{metric}"], row[f"{task}_{metric}_se"] = _mean(values)
    # The mean over tasks weighs them equally; items are independent, so that variances add.
    accuracies = [_mean(scores["acc"]) for scores in tasks.values()]
    differences = [_mean(np.subtract(tasks[task]["acc"], reference[task]["acc"])) for task in tasks]
    for name, parts in (("mean_acc", accuracies), ("difference", differences)):
        row[name] = float(np.mean([mean for mean, _ in parts]))
        spread = [error for _, error in parts if error is not None]
        row[f"{name}_se"] = float(np.sqrt(np.square(spread).sum()) / len(parts)) if len(spread) == len(parts) else None
    return row


def _mean(values: Any) -> tuple[float, float | None]:
    return mean_and_error(np.asarray(values, float), np.ones(len(values)))


def find_task_files(folder: Path) -> dict[str, Path]:
    """The one file of each task below a folder.

    Raises:
        RequestError: none or several.
    """
    found = {task: sorted(path for path in folder.glob(pattern)) for task, pattern in FILES.items()}
    for task, paths in found.items():
        if len(paths) != 1:
            raise RequestError(f"--data {folder}: {len(paths)} files of {task} ({FILES[task]}); there must be one")
    return {task: paths[0] for task, paths in found.items()}


def table(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    """What is printed without ``--json``."""

    def number(row: dict[str, Any], name: str, digits: int) -> str:
        error = row[f"{name}_se"]
        return f"{row[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    lines = [
        [
            row["scheme"],
            f"{row['weight_bits']:.2f}",
            row["activations"],
            number(row, "perplexity", 2),
            *(number(row, f"{task}_acc", 3) for task in tasks),
            number(row, "mean_acc", 3),
            number(row, "difference", 3) if at else "",
        ]
        for at, row in enumerate(rows)
    ]
    headers = ["scheme", "bits/weight", "activation bits", "perplexity", *tasks, "mean", "against float"]
    return tabulate(lines, headers, disable_numparse=True)


@contextmanager
def open_journal(path: Path | None, subject: dict[str, Any]) -> Iterator[Journal]:
    """The journal of this run, kept when it is done."""
    journal = Journal(path or cache_root() / "evaluations" / f"{subject_key(subject)}.jsonl", subject)
    try:
        yield journal
    finally:
        journal.close()


def run(args: argparse.Namespace) -> str:
    """Measure what is not in the journal, and give the table or its JSON."""
    threads = default_threads() if args.threads is None else args.threads
    torch.set_num_threads(threads)
    paths = find_task_files(args.data)
    docs = {task: read_docs(task, path, limit=args.limit) for task, path in paths.items()}
    checkpoint = open_checkpoint(resolve_model(args.model))
    if not 1 <= args.split < checkpoint.config["num_hidden_layers"]:
        raise RequestError(f"--split {args.split}: must lie between 1 and the model's layers less one")
    files = checkpoint.tokenizer()
    backend = tokenizers.Tokenizer.from_str(files.tokenizer_json)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=backend.id_to_token(min(files.end_tokens)))
    text, converted = read_text(args.text)
    if converted:
        print(f"{args.text}: {converted} CRLF line ends read as LF", file=sys.stderr)
    ours = Tokenizer(tokenizers.Tokenizer.from_str(files.tokenizer_json), special_tokens=files.special_tokens)
    windows = text_windows(ours, text, window=args.window, tokens=args.tokens)
    calibration = file_windows(
        args.calibration, files.tokenizer_json, tokens=args.calibration_tokens, window=min(args.window, 256)
    )
    chosen = entries(args.split, args.front_bits, args.back_bits)
    subject = {
        "kind": "weights and activations",
        "model": checkpoint.file_hashes(),
        "split": [args.split, args.front_bits, args.back_bits],
        "windows": ids_key(windows),
        "calibration": ids_key(calibration),
        "docs": {task: ids_key([list(repr(doc).encode()) for doc in items]) for task, items in docs.items()},
        "schemes": hashlib.sha256(Path(schemes_file).read_bytes()).hexdigest(),
        "harness": version("lm_eval"),
        "torch": version("torch"),
        "transformers": version("transformers"),
    } | versions()
    results: list[dict[str, Any]] = []
    reference: dict[str, dict[str, list[float]]] = {}
    with open_journal(args.journal, subject) as journal, progress_bar() as progress:
        rows = Rows(checkpoint, calibration, journal, progress)
        for entry in chosen:

            def told(done: int, total: int, entry: Entry = entry) -> None:
                progress(f"text, {entry.name}", done, total)

            measured = rows.measure(entry, "text", lambda *built, told=told: text_result(*built, windows, told))
            tasks = {}
            for task, items in docs.items():
                progress(f"{task}, {entry.name}", 0, 1)
                tasks[task] = rows.measure(
                    entry,
                    task,
                    lambda model, *_, task=task, items=items: task_result(model, tokenizer, task, items),
                )
            reference = reference or tasks
            results.append(summary(entry, measured, tasks, reference, windows))
    if args.json:
        return json.dumps(results)
    sent = results[-1]["codec_bits_per_element"]
    items = ", ".join(f"{len(items)} of {task}" for task, items in docs.items())
    return (
        f"{table(results, list(docs))}\n\n"
        f"{checkpoint.name}; perplexity of {sum(map(len, windows))} tokens in {len(windows)} windows of {args.window} "
        f"(± over windows); items: {items} (± over items; against float item by item); lm_eval {version('lm_eval')}; "
        f"hidden states at the split: {sent:.2f} bits per element; calibrated on {sum(map(len, calibration))} tokens"
    )


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as `isthmus export` takes it")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="whose perplexity is measured")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text (default 8192)")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window (default 512)")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="that holds the tasks' files")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="first N items of each task (default 100)")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="other text, for the schemes")
    parser.add_argument("--calibration-tokens", type=int, default=2048, help="of it (default 2048)")
    parser.add_argument("--split", type=int, default=10, help="of the last row (default 10)")
    parser.add_argument("--front-bits", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--back-bits", type=int, default=8, choices=(2, 4, 8))
    parser.add_argument("--journal", type=Path, metavar="FILE", help="what is done (default: in the cache folder)")
    parser.add_argument("--threads", type=int, help="default: the processors at hand, at most 4")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is for its own users
    try:
        print(run(args))
    except IsthmusError as error:
        print(f"weights_activations: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
