"""Measure speed and memory of a bundle, alone or with its server.

pp<N> is the prefill of N tokens, tg<N> the generation of N tokens one by one; both in tokens/s, mean and
standard deviation over the repetitions. With a server, a table shows where a token's time goes. With --prompts, the
speed of real generations, drafted and undrafted. With --sessions, what a server gives many sessions at once.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .generate import accept_distance, add_draft_options, add_server_options, channel_security, open_model

if TYPE_CHECKING:
    from ..runtime.edge.bench import BenchReport
    from ..runtime.edge.load import LoadReport
    from ..runtime.edge.prompt_bench import PromptReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="DIR", help="OUT/device")
    parser.add_argument("--prompt-tokens", metavar="N[,N]", help="prefill lengths (default 128)")
    parser.add_argument("--new-tokens", metavar="N[,N]", help="generation lengths (default 128)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="of each test (default 5)")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='generate after these instead, one a line: text, {"prompt": …} or {"messages": […]}; --new-tokens at most',
    )
    parser.add_argument(
        "--vs-undrafted",
        action="store_true",
        help="with --prompts: generate without drafts, too, in turns, and compare tokens and speed",
    )
    parser.add_argument(
        "--sessions",
        type=int,
        metavar="N",
        help="load the server instead: record generations of --prompt-tokens (default then 16) and --new-tokens (64), "
        "and replay them from N sessions at once",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_draft_options(parser)
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, with progress on stderr and the result on stdout."""
    from ..errors import RequestError
    from ..runtime.edge.bench import bench
    from .progress import progress_bar

    prompt_default, new_default = ("16", "64") if args.sessions is not None else ("128", "128")
    prompt_tokens = _lengths("--prompt-tokens", args.prompt_tokens or prompt_default)
    new_tokens = _lengths("--new-tokens", args.new_tokens or new_default)
    if args.sessions is not None:
        return _load(args, prompt_tokens, new_tokens)
    if args.prompts:
        return _bench_prompts(args, new_tokens)
    if args.vs_undrafted:
        raise RequestError("--vs-undrafted needs --prompts FILE: the other tests are undrafted")
    model = open_model(args)
    with progress_bar() as progress:
        report = bench(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repetitions=args.repetitions,
            progress=progress,
        )
    print(json.dumps(report.to_dict()) if args.json else _table(report))
    return 0


def _load(args: argparse.Namespace, prompt_tokens: list[int], new_tokens: list[int]) -> int:
    from ..errors import RequestError
    from ..runtime.edge.load import load_test
    from .progress import progress_bar

    if not args.server or len(args.server) > 1:
        raise RequestError("--sessions needs one --server HOST:PORT: it is the server that is loaded")
    if len(new_tokens) != 1:
        raise RequestError(f"--new-tokens {args.new_tokens}: with --sessions one number, of each session")
    with progress_bar() as progress:
        report = load_test(
            args.bundle,
            args.server[0],
            sessions=args.sessions,
            new_tokens=new_tokens[0],
            prompt_tokens=prompt_tokens,
            codec=args.codec,
            security=channel_security(args),
            threads=args.threads,
            progress=progress,
        )
    print(json.dumps(report.to_dict()) if args.json else _load_table(report))
    return 0 if report.identical else 1


def _load_table(report: LoadReport) -> str:
    from tabulate import tabulate

    summary = report.to_dict()
    rows: list[list[object]] = [
        ["sessions finished", f"{summary['finished']} of {report.sessions}"],
        ["tokens/s, all together", f"{report.tokens_per_s:.1f}"],
    ]
    for name, label in (("ms_per_token", "ms per token"), ("first_token_ms", "ms to the first token")):
        if summary[name] is not None:
            rows.append([f"{label}: p50, p95, max", ", ".join(f"{value:.1f}" for value in summary[name].values())])
    rows += [
        ["errors", ", ".join(f"{count} {code}" for code, count in summary["errors"].items()) or "none"],
        ["same tokens as alone", "yes" if report.identical else "NO"],
    ]
    return tabulate(rows, colalign=("left", "right"))


def _bench_prompts(args: argparse.Namespace, new_tokens: list[int]) -> int:
    from ..errors import RequestError
    from ..runtime.edge.prompt_bench import bench_prompts, read_prompts
    from ..runtime.sampling import Sampling
    from .progress import progress_bar

    if len(new_tokens) != 1:
        raise RequestError(f"--new-tokens {args.new_tokens}: with --prompts one number, the most after each prompt")
    sampling = Sampling(accept_distance=accept_distance(args))
    prompts = read_prompts(args.prompts)
    model = open_model(args)
    with progress_bar() as progress:
        report = bench_prompts(
            model,
            prompts,
            max_new_tokens=new_tokens[0],
            sampling=sampling,
            vs_undrafted=args.vs_undrafted,
            progress=progress,
        )
    print(json.dumps(report.to_dict()) if args.json else _prompt_table(report))
    promised = not sampling.accept_distance and args.exit_agreement is None
    return 0 if report.identical is not False or not promised else 1


def _prompt_table(report: PromptReport) -> str:
    from tabulate import tabulate

    summary = report.to_dict()
    places = [f"{share:.0%}" for share in summary["acceptance_by_place"][:8] if share is not None]
    rows: list[list[object]] = [
        ["prompts", len(report.runs)],
        ["tokens/s, median", f"{report.tokens_per_s:.1f}"],
        ["tokens per round trip", _number(report.tokens_per_round_trip)],
        ["drafts accepted", f"{summary['accepted']} of {summary['drafted']}"],
        ["right by place", ", ".join(places) or "none drafted"],
    ]
    if summary["exited"]:
        rows.append(["tokens exited", f"{summary['exited']} of {sum(run.new_tokens for run in report.runs)}"])
    if report.identical is not None:
        rows += [
            ["undrafted tokens/s, median", _number(report.undrafted_tokens_per_s)],
            ["ratio, median", _number(report.ratio)],
            ["same tokens undrafted", "yes" if report.identical else "NO"],
        ]
    return tabulate(rows, colalign=("left", "right"))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _lengths(option: str, text: str) -> list[int]:
    from ..errors import RequestError

    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RequestError(f"{option} {text!r}: must be numbers with commas, as in 128,512") from None


def _table(report: BenchReport) -> str:
    from dataclasses import asdict

    from tabulate import tabulate

    speeds = [
        [result.test, result.threads, f"{result.tokens_per_s:.1f} ± {result.sd:.1f}", len(result.samples)]
        for result in report.results
    ]
    memory = [
        [name, "unknown" if value is None else f"{value:.0f} MB"]
        for name, value in (("peak resident", report.peak_rss_mb), ("peak anonymous", report.peak_anon_mb))
    ]
    tables = [
        tabulate(speeds, ["test", "threads", "tokens/s", "repetitions"], colalign=("left", "right", "right", "right")),
        tabulate(memory, ["memory of this process", ""], colalign=("left", "right")),
    ]
    if report.breakdown is not None:
        parts = [[name.removesuffix("_ms"), value] for name, value in asdict(report.breakdown).items()]
        tables.append(tabulate(parts, ["decoded token", "median ms"], floatfmt=".2f"))
    if report.codec:
        costs = [list(asdict(cost).values()) for cost in report.codec]
        headers = ["codec", "bytes up per token", "encode, % of front", "decode, % of back"]
        tables.append(tabulate(costs, headers, floatfmt=".1f"))
    return "\n\n".join(tables)
