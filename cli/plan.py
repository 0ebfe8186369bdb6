"""Plan how a model is cut and quantized for a device, a link and a server.

Searches split, precisions, codec level and mode for the fastest way that keeps every limit, and says what would have to
change if none does. Times come from device profiles (`isthmus devices`), the drop in accuracy from a table that
`isthmus eval MODEL --for-plan` measures once; the default model brings its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..export.plan import Candidate
    from ..export.planner import PlanReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, a catalog name or a hub id")
    parser.add_argument("--device", required=True, metavar="PROFILE", help="name or file, see `isthmus devices list`")
    parser.add_argument(
        "--link", required=True, metavar="LINK", help="a preset (`isthmus link --list`) or rtt=80ms,rate=10mbit"
    )
    parser.add_argument("--server", metavar="PROFILE", help="the server's; without it only the device alone is planned")
    parser.add_argument(
        "--memory", metavar="SIZE", help="of the device's process; by default what its profile has free"
    )
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="positions of a generation (default 1024)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="of them, the prompt's (default 128)"
    )
    parser.add_argument("--deadline", metavar="TIME", help="of each token but the first, such as 100ms")
    parser.add_argument("--first-token", metavar="TIME", help="until the first, such as 2s")
    parser.add_argument("--max-drop", default="5%", metavar="P", help="expected increase in perplexity (default 5%%)")
    parser.add_argument(
        "--sessions", type=int, default=1, metavar="N", help="generations that share the server (default 1)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the device (default: all)")
    parser.add_argument("--mode", metavar="A,B", help="device-only, split, server-only, hand-over (default: all)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the plan, for export and generate --plan"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=".png or .svg: speed over accuracy, and a token's time"
    )
    parser.add_argument("--cache", metavar="DIR", help="where models and accuracy tables are kept")
    parser.add_argument("--offline", action="store_true", help="use models on this machine only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Plan; exit status 1 if nothing fits."""
    from ..devices.budget import parse_megabytes
    from ..devices.link import parse_duration_s
    from ..devices.profile import load_profile
    from ..export.limits import Limits
    from ..export.plan import MODES
    from ..export.planner import make_plan
    from .plot import check_plot, plot_plan
    from .progress import progress_bar

    def milliseconds(text: str | None) -> float | None:
        return None if text is None else 1e3 * parse_duration_s(text)

    if args.plot:
        check_plot(args.plot)
    device = load_profile(args.device)
    server = load_profile(args.server) if args.server else None
    limits = Limits(
        memory_mb=parse_megabytes(args.memory) if args.memory else device.free_mb,
        context=args.context,
        prompt_tokens=args.prompt_tokens,
        deadline_ms=milliseconds(args.deadline),
        first_token_ms=milliseconds(args.first_token),
        max_drop=_percent(args.max_drop),
        server_memory_mb=server.free_mb if server else None,
        sessions=args.sessions,
    )
    with progress_bar() as progress:
        planned = make_plan(
            args.model,
            args.device,
            args.link,
            server=args.server,
            limits=limits,
            threads=args.threads,
            modes=tuple(args.mode.split(",")) if args.mode else MODES,
            cache=args.cache,
            offline=args.offline,
            progress=progress,
        )
    report = planned.report
    if args.plot:
        plot_plan(report, args.plot)
    if planned.plan is not None and args.output:
        planned.plan.write(args.output)
    print(json.dumps(report.to_dict(), indent=2) if args.json else _tables(report))
    return 0 if report.chosen else 1


def _percent(text: str) -> float:
    from ..errors import PlanError

    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise PlanError(f"--max-drop {text!r}: must be a number of percent, as in 5%") from None


def _tables(report: PlanReport) -> str:
    from tabulate import tabulate

    headers = ["mode", "split", "bits", "KV", "codec", "drafts", "MB", "first ms", "ms/token", "bytes/token", "drop %"]
    best = tabulate([_row(candidate) for candidate in report.candidates], headers, disable_numparse=True)
    lines = [f"{report.searched} candidates"]
    if report.chosen is None:
        lines += ["nothing keeps all limits; those that miss by least:", best, ""]
        rows = [
            [name, "no value helps" if value is None else f"{value:.4g}"] for name, value in report.relaxations.items()
        ]
        lines += [tabulate(rows, ["if only this limit changed", "it would have to be"], disable_numparse=True)]
        return "\n".join(lines)
    slack = [[name, value, limit, limit - value] for name, (value, limit) in report.slack.items()]
    lines += ["the best that keep all limits, the chosen one first:", best, ""]
    lines += [tabulate(slack, ["limit", "value", "limit", "left"], floatfmt=".4g"), ""]
    lines += [tabulate(list(report.time_parts.items()), ["one token at full context", "ms"], floatfmt=".2f")]
    if report.chosen.mode == "server-only":
        lines += [
            "",
            "Sending token ids to a server with the whole model beats every cut here. `isthmus export --plan FILE`, or",
            "--split 0, makes it a bundle whose device half holds no weights; serve and generate run it as any other.",
        ]
    return "\n".join(lines)


def _row(candidate: Candidate) -> list[str]:
    error = candidate.time_uncertainty
    bits = f"{candidate.front_bits}/{candidate.back_bits}"
    codec = candidate.codec if candidate.level < 0 else f"{candidate.codec} {candidate.level}"
    mode = candidate.mode
    if candidate.hand_over_at:
        mode += f" at {candidate.hand_over_at} ({candidate.send})"
    return [
        mode,
        str(candidate.split),
        bits,
        str(candidate.kv_bits),
        codec,
        str(candidate.draft_length or ""),
        f"{candidate.memory_mb:.0f}",
        f"{candidate.ttft_ms:.0f} ± {error * candidate.ttft_ms:.0f}",
        f"{candidate.ms_per_token:.1f} ± {error * candidate.ms_per_token:.1f}",
        f"{candidate.bytes_per_token:.0f}",
        f"{candidate.drop:.2f} ± {candidate.drop_se:.2f}",
    ]
