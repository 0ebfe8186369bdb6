"""Serve from several workers behind one address.

Workers are Ray actors, on this machine or on a cluster's. SIGTERM drains. SIGHUP looks at OUT/server again: if it is
another bundle by now, new sessions go there, and the old workers end with their last session.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .serve import add_serving_options, server_security, serving_limits


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="OUT/server", type=Path, help="the server half that export wrote")
    parser.add_argument("--workers", type=int, metavar="N", help="exactly so many (default: 2)")
    parser.add_argument("--min-workers", type=int, metavar="N", help="as few as the load allows, down to these")
    parser.add_argument("--max-workers", type=int, metavar="N", help="as many as the load wants, up to these")
    parser.add_argument(
        "--pipeline", type=int, default=1, metavar="N", help="processes that share each worker's layers (default: 1)"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster (default: Ray is started on this machine)")
    add_serving_options(parser)
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of each worker (default: this machine's processors, shared out)"
    )
    parser.add_argument("--max-sessions", type=int, metavar="N", help="at once, of each worker (default: 64)")
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="of each worker, such as 2GB (default: what the machine has free, shared out)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT, or SIGTERM, which drains; one line on stdout says that clients may come."""
    import asyncio

    from ..devices.budget import parse_megabytes
    from ..runtime.fleet.front import FleetPlan, serve

    security = server_security(args)
    plan = FleetPlan.of(
        workers=args.workers,
        least=args.min_workers,
        most=args.max_workers,
        stages=args.pipeline,
        threads=args.threads,
        memory_limit_mb=parse_megabytes(args.memory_limit) if args.memory_limit else None,
        limits=serving_limits(args, max_sessions=args.max_sessions),
        ray_address=args.ray,
    )

    def serving(address: str) -> None:
        print(f"isthmus: fleet of {plan.least} workers on {address} ({security.describe()})", flush=True)

    asyncio.run(
        serve(
            args.bundle,
            args.listen,
            plan,
            security=security,
            metrics=args.metrics,
            audit=args.audit,
            drain_timeout=args.drain_timeout,
            serving=serving,
        )
    )
    return 0
