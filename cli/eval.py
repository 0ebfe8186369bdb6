"""Measure how well a bundle predicts a text or answers a task, and what its codec sends for it.

DIR is OUT/device; a split bundle needs --back OUT/server as well. Both run in this process with the codec between
them. --text reports perplexity, and KL divergence and top-1 agreement against a reference: the float model that the
bundle was made from, or what --reference names. --task reports the accuracy of a multiple-choice task of
lm-evaluation-harness over a file of yours. A killed evaluation goes on where it was when it is started again.

With --for-plan the argument is a checkpoint instead (folder, .gguf file, catalog name or hub id; of a bundle, the one
that it was made from): the accuracy table that `isthmus plan` reads is measured, once per model, and kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..export.accuracy import AccuracyTable
    from ..runtime.chain import Chain, CodecChoice
    from ..runtime.evaluate import Progress, Reference, TextResult
    from ..runtime.harness import TaskResult
    from ..runtime.journal import Journal


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "bundle", metavar="DIR", help="OUT/device; with --for-plan a model as `isthmus export` takes it"
    )
    parser.add_argument("--back", metavar="DIR", help="OUT/server; needed if the model is split")
    parser.add_argument("--for-plan", action="store_true", help="measure the accuracy table that `isthmus plan` reads")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", metavar="FILE", help="UTF-8 text to predict (--for-plan: default what the model wrote)")
    what.add_argument("--task", metavar="NAME", help="hellaswag, piqa, arc_easy, boolq or openbookqa")
    parser.add_argument("--data", metavar="FILE", help="the task's items, see docs/eval.md; may be .bz2 or .gz")
    parser.add_argument("--labels", metavar="FILE", help="of piqa (default: the *-labels*.lst beside its data)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N items (default: all)")
    parser.add_argument("--tokens", type=int, metavar="N", help="read so many tokens (default: all; --for-plan: 2048)")
    parser.add_argument("--window", type=int, metavar="N", help="tokens in a window (default 512)")
    parser.add_argument(
        "--reference",
        metavar="MODEL|DIR",
        help="a checkpoint as `isthmus export` takes it, or a bundle (default: the bundle's checkpoint; a task: none)",
    )
    parser.add_argument(
        "--codec",
        metavar="NAME[,NAME]",
        help="raw32, raw16, tabq, klt (default tabq; of a bundle of --split 0 ids, all that it has)",
    )
    parser.add_argument("--level", metavar="N[,N]|all", help="of the codec, from 0, the finest (default 2)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what is kept over what is sent: .png or .svg")
    parser.add_argument(
        "--journal", metavar="FILE", help="keep what is done in this file (default: in the cache folder)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: the processors at hand, at most 4")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="cache folder (default: $ISTHMUS_CACHE, or the user's)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print an object, or a list of them for several codecs or levels"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, with progress on stderr and the result on stdout."""
    from ..runtime.chain import Chain
    from .plot import check_plot, plot_task, plot_text
    from .progress import progress_bar

    _check_options(args)
    if args.for_plan:
        return _for_plan(args)
    names = None if args.codec is None else _names(args.codec)
    levels = _levels(args.level)
    chain = Chain.open(args.bundle, args.back, threads=args.threads)
    if args.plot:
        check_plot(args.plot, device_only=chain.manifest.device_only)
    names = names or ["ids" if chain.manifest.server_only else "tabq"]
    codecs = chain.codecs(names, levels)
    with progress_bar() as progress:
        measure = _text if args.text else _task
        rows, table = measure(args, chain, codecs, progress)
    if args.plot:
        (plot_text if args.text else plot_task)(rows, args.plot)
    several = len(names) > 1 or levels is None or len(levels) > 1
    print(json.dumps(rows if several else rows[0]) if args.json else table)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what would have no effect."""
    from ..errors import RequestError

    if args.for_plan:
        mode, others = "--for-plan", ["task", "data", "labels", "limit", "back", "reference", "codec", "level"]
        others += ["plot", "journal", "threads", "window"]
    elif args.text:
        mode, others = "--text", ["data", "labels", "limit"]
    elif args.task:
        mode, others = "--task", ["tokens"]
    else:
        raise RequestError("nothing to measure: give --text FILE, --task NAME or --for-plan")
    for name in others:
        if getattr(args, name) is not None:
            raise RequestError(f"--{name} has no meaning with {mode}; leave it out")
    if args.task and not args.data:
        raise RequestError(f"--task {args.task}: the items come from a file; give it with --data")


def _for_plan(args: argparse.Namespace) -> int:
    """Measure an accuracy table, and print where it lies and what it says."""
    from ..export.accuracy import accuracy_path
    from ..export.accuracy_measurement import TOKENS, measure_accuracy
    from ..export.reference import find_source
    from ..runtime.bundle import open_bundle
    from ..runtime.evaluate import is_bundle
    from .progress import progress_bar

    model = args.bundle
    with progress_bar() as progress:
        if is_bundle(model):
            root = Path(model) / "device"
            manifest = open_bundle(root if root.is_dir() else model, "device").manifest
            model = str(find_source(manifest.source, cache=args.cache, progress=progress))
        table = measure_accuracy(
            model,
            text=args.text,
            tokens=TOKENS if args.tokens is None else args.tokens,
            cache=args.cache,
            progress=progress,
        )
    path = accuracy_path(table.hashes, args.cache)
    print(json.dumps(json.loads(table.to_json()) | {"path": str(path)}) if args.json else _accuracy_table(table, path))
    return 0


def _accuracy_table(table: AccuracyTable, path: Path) -> str:
    from itertools import groupby, pairwise

    from tabulate import tabulate

    from ..export.accuracy import drop_percent

    rows = [(what, bits, row) for what in ("weights", "kv") for bits, row in sorted(getattr(table, what).items())]
    # Layers that were measured together have the same figures.
    groups = groupby(range(table.layers), key=lambda layer: [row[layer] for _, _, row in rows])
    starts = [*(next(group) for _, group in groups), table.layers]
    spans = [slice(first, last) for first, last in pairwise(starts)]
    layers = [
        [what, bits, *(f"{sum(row[span]):.5f}" for span in spans), f"{sum(row):.5f}", f"{drop_percent(sum(row)):.2f} %"]
        for what, bits, row in rows
        if bits < 32
    ]
    others: list[tuple[str, int | None, float]] = [("int8 activations", None, table.activations)]
    others += [("embedding", bits, kl) for bits, kl in sorted(table.embed.items()) if bits < 32]
    others += [("head", bits, kl) for bits, kl in sorted(table.head.items()) if bits < 32]
    order = table.codec_levels()
    codecs = [
        [
            point.codec if point.level is None else f"{point.codec} {point.level}",
            point.split,
            f"{point.bits:.2f}",
            f"{point.decode_bits:.2f}",
            _number(point.kl, point.kl_se, 5),
            f"{drop_percent(point.kl):.2f} %",
        ]
        for point in sorted(table.codecs, key=lambda point: order.index((point.codec, point.level)))
    ]
    tables = [
        (layers, ["layers", "bits", *(f"{span.start}–{span.stop - 1}" for span in spans), "all", "perplexity"]),
        (
            [[what, bits, f"{kl:.5f}", f"{drop_percent(kl):.2f} %"] for what, bits, kl in others],
            ["part", "bits", "KL", "perplexity"],
        ),
        (codecs, ["codec", "split", "bits/element", "decoding", "KL", "perplexity"]),
    ]
    shown = (tabulate(content, headers, disable_numparse=True) for content, headers in tables)
    return "\n\n".join(
        [
            *shown,
            f"{table.model}: {table.tokens} tokens, {table.text}; KL in nats per token that a part adds to the float "
            f"model's\nwritten to {path}",
        ]
    )


def _text(
    args: argparse.Namespace, chain: Chain, codecs: Sequence[CodecChoice], progress: Progress
) -> tuple[list[dict[str, Any]], str]:
    from ..runtime.evaluate import DEFAULT_WINDOW, evaluate_text, read_text, text_subject, text_windows

    text, converted = read_text(args.text)
    if converted:
        print(f"isthmus: {args.text}: {converted} CRLF line ends read as LF", file=sys.stderr)
    windows = text_windows(
        chain.tokenizer, text, window=DEFAULT_WINDOW if args.window is None else args.window, tokens=args.tokens
    )
    with ExitStack() as opened:
        reference = _reference(args, chain, windows, progress, opened)
        journal = _journal(args, text_subject(chain, windows, codecs, reference))
        opened.callback(journal.close)
        results = evaluate_text(chain, windows, codecs, reference, journal=journal, progress=progress)
        if not args.journal:
            journal.remove()
    return [result.to_dict() for result in results], _text_table(results)


def _task(
    args: argparse.Namespace, chain: Chain, codecs: Sequence[CodecChoice], progress: Progress
) -> tuple[list[dict[str, Any]], str]:
    from ..errors import RequestError
    from ..runtime.evaluate import is_bundle, open_whole
    from ..runtime.tasks import read_docs

    docs = read_docs(args.task, args.data, labels=args.labels, limit=args.limit)
    if args.reference and not is_bundle(args.reference):
        raise RequestError(
            f"--reference {args.reference}: a task is compared with a bundle; make one of the float model with "
            "`isthmus export MODEL -o OUT --split all --front-bits 32`"
        )
    reference = None
    if args.reference:
        reference = open_whole(args.reference, chain.manifest, threads=args.threads)
    from ..runtime.harness import evaluate_task, task_subject

    journal = _journal(args, task_subject(chain, args.task, docs, codecs, reference))
    try:
        results = evaluate_task(chain, args.task, docs, codecs, reference=reference, journal=journal, progress=progress)
    finally:
        journal.close()
    if not args.journal:
        journal.remove()
    return [result.to_dict() for result in results], _task_table(results)


def _reference(
    args: argparse.Namespace, chain: Chain, windows: list[list[int]], progress: Progress, opened: ExitStack
) -> Reference:
    from ..export.catalog import cache_root
    from ..export.reference import FloatReference, find_source
    from ..export.sources import resolve_model
    from ..runtime.evaluate import BundleReference, is_bundle, open_whole

    if args.reference and is_bundle(args.reference):
        return BundleReference(open_whole(args.reference, chain.manifest, threads=args.threads), windows)
    if args.reference:
        path = resolve_model(args.reference, cache=args.cache, progress=progress)
    else:
        path = find_source(chain.manifest.source, cache=args.cache, progress=progress)
    return opened.enter_context(
        FloatReference(
            path,
            windows,
            cache_root(args.cache) / "evaluations" / "references",
            vocab_size=chain.manifest.architecture.vocab_size,
            threads=args.threads,
            progress=progress,
        )
    )


def _journal(args: argparse.Namespace, subject: dict[str, Any]) -> Journal:
    from ..export.catalog import cache_root
    from ..runtime.journal import Journal, subject_key

    folder = cache_root(args.cache) / "evaluations"
    return Journal(Path(args.journal) if args.journal else folder / f"{subject_key(subject)}.jsonl", subject)


def _names(text: str) -> list[str]:
    from ..errors import RequestError

    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RequestError(f"--codec {text!r}: name at least one, as in raw16,tabq")
    return names


def _levels(text: str | None) -> list[int | None] | None:
    from ..errors import RequestError

    if text is None:
        return [None]
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--level {text!r}: must be numbers with commas, as in 0,2, or all") from None


def _text_table(results: Sequence[TextResult]) -> str:
    from tabulate import tabulate

    rows = [
        [
            _codec(result),
            _number(result.bits_per_element, digits=2),
            _number(result.decode_bytes_per_token, digits=1),
            _number(result.kl, result.kl_se, 5),
            _number(result.top1, result.top1_se),
            _number(result.perplexity, result.perplexity_se, 3),
            _number(result.perplexity_ratio, result.perplexity_ratio_se),
        ]
        for result in results
    ]
    first = results[0]
    headers = ["codec", "bits/element", "bytes/decoded token", "KL", "top-1", "perplexity", "ratio"]
    return (
        f"{tabulate(rows, headers, disable_numparse=True)}\n\n"
        f"{first.tokens} tokens in {first.windows} windows of {first.window}; reference {first.reference}: perplexity "
        f"{first.reference_perplexity:.3f}; ± is a standard error over windows"
    )


def _task_table(results: Sequence[TaskResult]) -> str:
    from tabulate import tabulate

    rows = [
        [
            _codec(result),
            _number(result.bits_per_element, digits=2),
            _number(result.accuracy, result.accuracy_se),
            _number(result.accuracy_norm, result.accuracy_norm_se),
            _number(result.accuracy_difference, result.accuracy_difference_se),
        ]
        for result in results
    ]
    first = results[0]
    headers = ["codec", "bits/element", "accuracy", "by answer bytes", "difference"]
    compared = "" if first.reference_accuracy is None else f"; reference accuracy {first.reference_accuracy:.4f}"
    return (
        f"{tabulate(rows, headers, disable_numparse=True)}\n\n"
        f"{first.items} items of {first.task}, lm_eval {first.harness}{compared}; ± is a standard error over items"
    )


def _codec(result: TextResult | TaskResult) -> str:
    return result.codec if result.level is None else f"{result.codec} {result.level}"


def _number(value: float | None, error: float | None = None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
