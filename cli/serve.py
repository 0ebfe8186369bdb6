"""Run the server half of a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.server.limits import ServerLimits
    from ..runtime.wire.security import ServerSecurity


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="OUT/server", type=Path, help="the server half that export wrote")
    add_serving_options(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="default: the processors at hand, at most 4")
    parser.add_argument("--max-sessions", type=int, metavar="N", help="sessions at once (default: 64)")
    parser.add_argument(
        "--device-sessions",
        type=int,
        metavar="N",
        help="sessions at once of one device, where they show certificates or tokens (default: 16)",
    )
    parser.add_argument("--device-kv", metavar="SIZE", help="such as 500MB: KV caches of one device (default: 4GiB)")
    parser.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help="sessions that advance together in one run; 1 serves one step at a time (default: 32)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: one object a line, with session and step where it is about one (default %(default)s)",
    )
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help="such as 2GB: refuse what does not fit, and hold KV caches below it"
    )


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """Declare where a server listens, what it shows, whom it lets in and how it ends, for every command that is one."""
    parser.add_argument(
        "--listen",
        default="127.0.0.1:7070",
        metavar="HOST:PORT",
        help="address; port 0 picks a free one (default: %(default)s)",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate chain, with --tls-key")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM private key, without a password")
    parser.add_argument("--insecure", action="store_true", help="plaintext instead of TLS")
    parser.add_argument(
        "--client-ca", type=Path, metavar="FILE", help="only devices with a certificate of this authority may connect"
    )
    parser.add_argument(
        "--revoked",
        type=Path,
        metavar="FILE",
        help="that authority's list of revoked certificates, read anew when it changes",
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="only devices that show a token of this file may come in, see `isthmus certs token`; read anew when it "
        "changes",
    )
    parser.add_argument(
        "--lease",
        type=float,
        metavar="SECONDS",
        help="how long a session outlives its connection (default: 30)",
    )
    parser.add_argument(
        "--device-frames",
        type=float,
        metavar="N",
        help="frames a second of one device, where they show certificates or tokens; those above wait (default: 1000)",
    )
    parser.add_argument(
        "--prefix-cache",
        metavar="SIZE",
        help="memory for keys and values that later sessions with the same beginning need not compute; 0 keeps none "
        "(default: 64MB)",
    )
    parser.add_argument(
        "--prefix-cache-shared",
        action="store_true",
        help="devices that certificates or tokens tell apart use each other's, too: one can then find out by the time "
        "of an answer what another has asked",
    )
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="where Prometheus and `isthmus top` may ask for metrics (default: nowhere)",
    )
    parser.add_argument(
        "--audit",
        metavar="FILE",
        help="append a line of JSON for each device that comes, opens, returns, leaves or is turned away",
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="that running sessions have after SIGTERM, before they are told to move (default: %(default)g)",
    )


def serving_limits(args: argparse.Namespace, **chosen: int | None) -> ServerLimits:
    """By the options of `add_serving_options`, and what else was chosen."""
    from ..devices.budget import parse_megabytes
    from ..runtime.server.limits import ServerLimits

    cache = args.prefix_cache
    given = {
        "lease_s": args.lease,
        "frames_per_s_per_device": args.device_frames,
        "prefix_cache_bytes": None if cache is None else int(1e6 * parse_megabytes(cache)) if cache != "0" else 0,
        "prefixes_shared": args.prefix_cache_shared,
    }
    return ServerLimits(**{name: value for name, value in (given | chosen).items() if value is not None})


def server_security(args: argparse.Namespace) -> ServerSecurity:
    """By the options of `add_serving_options`."""
    from ..runtime.wire.security import ServerSecurity

    return ServerSecurity(
        insecure=args.insecure,
        cert_file=args.tls_cert,
        key_file=args.tls_key,
        client_ca=args.client_ca,
        revoked=args.revoked,
        tokens=args.tokens,
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT, or SIGTERM, which drains; one line on stdout says that clients may come."""
    import logging
    import signal

    from ..devices.budget import parse_megabytes
    from ..devices.limits import enforce_memory_limit
    from ..devices.signals import Signals
    from ..runtime.server.logs import JsonFormatter
    from ..runtime.server.server import BackServer

    if args.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    security = server_security(args)
    chosen = {
        "max_sessions": args.max_sessions,
        "max_sessions_per_device": args.device_sessions,
        "kv_bytes_per_device": int(1e6 * parse_megabytes(args.device_kv)) if args.device_kv else None,
        "max_batch": args.max_batch,
    }
    limits = serving_limits(args, **chosen)
    limit_mb = parse_megabytes(args.memory_limit) if args.memory_limit else None
    if limit_mb is not None:
        enforce_memory_limit(limit_mb)
    server = BackServer.from_bundle(
        args.bundle,
        args.listen,
        threads=args.threads,
        security=security,
        limits=limits,
        memory_limit_mb=limit_mb,
        metrics=args.metrics,
        audit=args.audit,
    )
    signals = Signals(signal.SIGINT, signal.SIGTERM)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: server.reload())
    with server:
        layers = f"{server.manifest.split}–{server.manifest.architecture.layers - 1}"
        print(f"isthmus: serving layers {layers} on {server.address} ({security.describe()})", flush=True)
        came = signals.wait(server)
        if came is None:
            return 1  # it ended by itself, and its thread has said why
        if came == signal.SIGTERM:
            for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends it at once
                signal.signal(number, lambda *_: server.end())
            server.drain(args.drain_timeout)
    return 0
