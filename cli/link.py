"""Emulate a link: a TCP proxy that delays, throttles, loses, stalls and drops like a real one.

Put it between `isthmus generate` and `isthmus serve`. A preset or --trace gives the link; options beside it change it.
Loss shows as TCP shows it: a retransmission timeout's delay. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..devices.link import LinkProfile


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--list", action="store_true", help="print the presets instead")
    parser.add_argument("--json", action="store_true", help="with --list: as JSON, an unlimited rate as null")
    parser.add_argument(
        "--listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="address; port 0 picks a free one (default: %(default)s)",
    )
    parser.add_argument("--connect", metavar="HOST:PORT", help="the target, such as isthmus serve's address")
    parser.add_argument("--preset", default="loopback", metavar="NAME", help="see --list (default: %(default)s)")
    parser.add_argument("--rtt", metavar="TIME", help="round trip, as in 80ms; half of it each way")
    parser.add_argument("--rate", metavar="RATE", help="both ways, as in 10mbit or 200kbit (a second)")
    parser.add_argument("--rate-up", metavar="RATE", help="towards the target alone")
    parser.add_argument("--rate-down", metavar="RATE", help="from the target alone")
    parser.add_argument("--jitter", metavar="TIME", help="each way's delay varies by it; at most half of --rtt")
    parser.add_argument("--loss", metavar="SHARE", help="of packets, as in 1%% or 0.01")
    parser.add_argument(
        "--stall",
        metavar="AT,FOR[,EVERY]",
        help="nothing passes for a time, as in 20s,3s: from 20 s after the first connection, for 3 s",
    )
    parser.add_argument(
        "--drop-after", metavar="TIME|SIZE", help="reset each connection then, as in 20s or 500kB (both ways together)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="rates and round trip over time (docs/link.md)")
    parser.add_argument("--loop", action="store_true", help="begin the trace anew at its last line's time")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of jitter and loss (default 0)")
    parser.add_argument("--no-check", action="store_true", help="start although the target is down")


def run(args: argparse.Namespace) -> int:
    """Run the proxy until SIGINT or SIGTERM; one line on stdout says that clients may come."""
    import signal

    from ..devices.channel import Trace
    from ..devices.proxy import DropAfter, LinkProxy
    from ..devices.signals import Signals
    from ..errors import LinkError
    from ..runtime.wire.transport import split_address

    if args.list:
        print(_presets(as_json=args.json))
        return 0
    if args.json:
        raise LinkError("--json needs --list: the proxy itself prints one line")
    if args.connect is None:
        raise LinkError("no target: give its address with --connect HOST:PORT")
    if args.loop and args.trace is None:
        raise LinkError("--loop needs --trace: a steady link has nothing to repeat")
    steady = [f"--{name}" for name in ("rtt", "rate", "rate-up", "rate-down") if getattr(args, name.replace("-", "_"))]
    if args.trace is not None and steady:
        raise LinkError(f"--trace with {', '.join(steady)}: the trace gives rates and round trip; leave one out")
    proxy = LinkProxy(
        split_address(args.listen),
        split_address(args.connect),
        _link(args),
        trace=Trace.read(args.trace, loop=args.loop) if args.trace is not None else None,
        drop=DropAfter.parse(args.drop_after) if args.drop_after is not None else None,
        seed=args.seed,
        check=not args.no_check,
    )
    signals = Signals(signal.SIGINT, signal.SIGTERM)
    with proxy:
        shown = f"trace {args.trace}" if args.trace is not None else _describe(proxy.link)
        print(f"isthmus: link on {proxy.address} to {args.connect} ({shown})", flush=True)
        if signals.wait(proxy) is None:
            return 1  # it ended by itself, and its thread has said why
    return 0


def _link(args: argparse.Namespace) -> LinkProfile:
    """The preset with the changes that the options ask for."""
    from dataclasses import replace

    from ..devices.link import Stall, link_profile

    options = {
        "rtt": args.rtt,
        "rate": args.rate,
        "up": args.rate_up,
        "down": args.rate_down,
        "jitter": args.jitter,
        "loss": args.loss,
    }
    link = link_profile(
        ",".join([args.preset, *(f"{key}={value}" for key, value in options.items() if value is not None)])
    )
    return link if args.stall is None else replace(link, stall=Stall.parse(args.stall))


def _describe(link: LinkProfile) -> str:
    """The parts of a link that do something, in words."""
    parts = [f"{link.rtt_ms:g} ms"]
    parts += [f"{rate:g} Mbit/s {way}" for rate, way in _rates(link)]
    parts += [f"± {link.jitter_ms:g} ms"] if link.jitter_ms else []
    parts += [f"{100 * link.loss:g} % lost"] if link.loss else []
    parts += [f"stalls {_stall(link)}"] if link.stall else []
    return ", ".join(parts)


def _rates(link: LinkProfile) -> list[tuple[float, str]]:
    import math

    return [(rate, way) for rate, way in ((link.up_mbit_s, "up"), (link.down_mbit_s, "down")) if rate != math.inf]


def _stall(link: LinkProfile) -> str:
    stall = link.stall
    if stall is None:
        return ""
    every = f", every {stall.every_s:g} s" if stall.every_s else ""
    return f"{stall.for_s:g} s at {stall.at_s:g} s{every}"


def _presets(*, as_json: bool) -> str:
    from tabulate import tabulate

    from ..devices.link import LINKS

    if as_json:
        return json.dumps([link.to_dict() for link in LINKS.values()], indent=2)
    rows = [
        [link.name, link.rtt_ms, link.up_mbit_s, link.down_mbit_s, link.jitter_ms, 100 * link.loss, _stall(link)]
        for link in LINKS.values()
    ]
    headers = ["preset", "round trip ms", "up Mbit/s", "down Mbit/s", "jitter ms", "loss %", "stalls"]
    return tabulate(rows, headers, floatfmt="g")
