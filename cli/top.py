"""Show what a server does, live: its sessions, tokens, times and refusals.

ADDRESS is that of `isthmus serve --metrics`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

_CLEAR = "\x1b[H\x1b[2J"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("address", metavar="HOST:PORT", help="where the server's metrics are")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default 1)")
    parser.add_argument("--once", action="store_true", help="print one table, with means since the server's start")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Look until Ctrl-C, or once."""
    before = _scrape(args.address)
    if args.json:
        print(json.dumps(before))
        return 0
    if args.once:
        print(_table(before, {}, 0.0))
        return 0
    try:
        while True:
            time.sleep(args.interval)
            now = _scrape(args.address)
            print((_CLEAR if sys.stdout.isatty() else "") + _table(now, before, args.interval), flush=True)
            before = now
    except KeyboardInterrupt:
        return 0


def _scrape(address: str) -> dict[str, float]:
    from urllib.error import URLError
    from urllib.request import urlopen

    from ..errors import LinkError
    from ..runtime.server.metrics import parse_metrics
    from ..runtime.wire.transport import split_address

    split_address(address)
    try:
        with urlopen(f"http://{address}/metrics", timeout=5) as answer:
            return parse_metrics(answer.read().decode("utf-8"))
    except (URLError, OSError, ValueError) as error:
        raise LinkError(
            f"{address}: no metrics there ({error}); give the address of `isthmus serve --metrics`"
        ) from error


def _table(now: dict[str, float], before: dict[str, float], seconds: float) -> str:
    from tabulate import tabulate

    def gained(name: str) -> float:
        return now.get(name, 0.0) - before.get(name, 0.0)

    def mean_ms(part: str) -> str:
        count = gained(f"step_seconds_count{{part={part}}}")
        return f"{1e3 * gained(f'step_seconds_sum{{part={part}}}') / count:.2f}" if count else "–"

    runs, asked = gained("runs"), gained("prefix_tokens_asked")
    reused = f"{100 * gained('prefix_tokens_reused') / asked:.0f} %" if asked else "–"
    rows: list[list[object]] = [
        ["sessions, carried by a stream", f"{now.get('sessions', 0):.0f}, {now.get('sessions_carried', 0):.0f}"],
        ["KV cache", f"{now.get('kv_bytes', 0) / 1e6:.1f} of {now.get('kv_budget_bytes', 0) / 1e6:.0f} MB"],
        ["prefix cache, prompt rows from it", f"{now.get('prefix_cache_bytes', 0) / 1e6:.1f} MB, {reused}"],
        ["tokens" + ("/s" if seconds else ""), f"{gained('tokens_total') / (seconds or 1):.1f}"],
        ["steps in a run", f"{gained('steps_run') / runs:.2f}" if runs else "–"],
        ["ms a step: decode, queue, compute", ", ".join(map(mean_ms, ("decode", "queue", "compute")))],
        ["sessions opened, attached again", f"{now.get('sessions_opened_total', 0):.0f}, "
         f"{now.get('sessions_attached_total', 0):.0f}"],
        ["peers refused, failed connections", f"{now.get('peers_refused_total', 0):.0f}, "
         f"{now.get('connections_failed_total', 0):.0f}"],
    ]  # fmt: skip
    rows += [
        [name.replace("faults_total{code=", "refused: ").rstrip("}"), f"{value:.0f}"]
        for name, value in sorted(now.items())
        if name.startswith("faults_total")
    ]
    rows += [
        [name.replace("payload_bytes_total{codec=", "MB received, ").rstrip("}"), f"{value / 1e6:.2f}"]
        for name, value in sorted(now.items())
        if name.startswith("payload_bytes_total")
    ]
    return tabulate(rows, tablefmt="plain")
