"""Measure how well a bundle predicts a text or answers a task, and what its codec sends for it.

DIR is OUT/device; a split bundle needs --back OUT/server as well. Both run in this process with the codec between
them. --text reports perplexity, and KL divergence and top-1 agreement against a reference: the float model that the
bundle was made from, or what --reference names. --task reports the accuracy of a multiple-choice task of
lm-evaluation-harness over a file of yours. A killed evaluation goes on where it was when it is started again.
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
    from ..runtime.chain import Chain, CodecChoice
    from ..runtime.evaluate import Progress, Reference, TextResult
    from ..runtime.harness import TaskResult
    from ..runtime.journal import Journal


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="DIR", help="OUT/device")
    parser.add_argument("--back", metavar="DIR", help="OUT/server; needed if the model is split")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="UTF-8 text to predict")
    what.add_argument("--task", metavar="NAME", help="hellaswag, piqa, arc_easy, boolq or openbookqa")
    parser.add_argument("--data", metavar="FILE", help="the task's items, see docs/eval.md; may be .bz2 or .gz")
    parser.add_argument("--labels", metavar="FILE", help="of piqa (default: the *-labels*.lst beside its data)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N items (default: all)")
    parser.add_argument("--tokens", type=int, metavar="N", help="read that many tokens (default: the whole text)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens in a window (default 512)")
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

    names = None if args.codec is None else _names(args.codec)
    levels = _levels(args.level)
    _check_options(args)
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

    mode, others = ("--text", ("data", "labels", "limit")) if args.text else ("--task", ("tokens",))
    for name in others:
        if getattr(args, name) is not None:
            raise RequestError(f"--{name} has no meaning with {mode}; leave it out")
    if args.task and not args.data:
        raise RequestError(f"--task {args.task}: the items come from a file; give it with --data")


def _text(
    args: argparse.Namespace, chain: Chain, codecs: Sequence[CodecChoice], progress: Progress
) -> tuple[list[dict[str, Any]], str]:
    from ..runtime.evaluate import evaluate_text, read_text, text_subject, text_windows

    text, converted = read_text(args.text)
    if converted:
        print(f"isthmus: {args.text}: {converted} CRLF line ends read as LF", file=sys.stderr)
    windows = text_windows(chain.tokenizer, text, window=args.window, tokens=args.tokens)
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
