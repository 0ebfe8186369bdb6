"""Profiles of devices: list them, show one, measure this machine, run a command as on a device.

A profile says how much memory a device has and how fast it reads weights and multiplies, each figure with its source.
NAME is one of `isthmus devices list` or the path of a TOML file.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..devices.kernels import ModelShape
    from ..devices.limits import Limits
    from ..devices.profile import DeviceProfile
    from ..runtime.bundle import Bundle
    from ..runtime.edge.link_probe import LinkMeasurement


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own commands and their arguments."""
    commands = parser.add_subparsers(dest="devices_command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="one line for each profile", description="One line for each profile.")
    listing.set_defaults(run_devices=_list)

    show = commands.add_parser(
        "show", help="one profile with its sources", description="One profile with the source of every figure."
    )
    show.add_argument("profile", metavar="NAME", help="of a profile, or the path of its TOML file")
    show.set_defaults(run_devices=_show)

    probe = commands.add_parser(
        "probe",
        help="measure this machine",
        description="Measure this machine with the runtime's own kernels, in less than a minute.",
    )
    probe.add_argument("-o", "--output", metavar="FILE", help="write the profile there, as TOML")
    probe.add_argument("--bundle", metavar="OUT/device", help="whose model's shapes to time (default: SmolLM2-135M's)")
    probe.add_argument("--threads", type=int, metavar="N", help="default: the processors at hand, at most 4")
    probe.add_argument(
        "--server", action="append", default=[], metavar="HOST:PORT", help="measure the link to it; repeatable"
    )
    trust = probe.add_mutually_exclusive_group()
    trust.add_argument("--tls-ca", metavar="FILE", help="certificate (authority) to trust instead of the system's")
    trust.add_argument("--insecure", action="store_true", help="plaintext, for trusted links only")
    probe.set_defaults(run_devices=_probe)

    for command in (listing, show, probe):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")

    emulate = commands.add_parser(
        "emulate",
        help="run a command as on a device",
        description="Run a command with a device's memory, processors and speed. What holds each limit, and what "
        "nothing holds, goes to stderr. The exit status is the command's.",
    )
    emulate.add_argument("profile", metavar="NAME", help="of a profile, or the path of its TOML file")
    emulate.add_argument(
        "--host-profile",
        metavar="FILE",
        help="of this machine, from probe: the command gets no more processor time than makes it as slow as the device",
    )
    emulate.add_argument("command", nargs="+", metavar="-- COMMAND", help="with its arguments")
    emulate.set_defaults(run_devices=_emulate)


def run(args: argparse.Namespace) -> int:
    """Run the command below ``devices``."""
    status: int = args.run_devices(args)
    return status


def _list(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from ..devices.profile import load_profile, profile_names

    profiles = [load_profile(name) for name in profile_names()]
    if args.json:
        print(json.dumps([profile.to_dict() for profile in profiles]))
        return 0
    rows = [
        [p.name, p.title, p.free_mb, p.total_mb, p.bandwidth_gb_s, p.decode_gb_s[4], p.prefill_gflops[4], p.link or ""]
        for p in profiles
    ]
    headers = ["name", "device", "free MB", "MB", "GB/s", "4-bit decode GB/s", "4-bit prefill GFLOP/s", "link"]
    print(tabulate(rows, headers, floatfmt="g"))
    return 0


def _show(args: argparse.Namespace) -> int:
    from ..devices.profile import load_profile

    profile = load_profile(args.profile)
    print(json.dumps(profile.to_dict(), indent=2) if args.json else profile_table(profile))
    return 0


def _probe(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..devices.probe import busy_processors, probe
    from ..devices.profile import write_profile
    from ..errors import RequestError
    from ..runtime.bundle import open_bundle
    from .progress import progress_bar

    if args.server and not args.bundle:
        raise RequestError("--server needs --bundle: a server answers only to the other half of its bundle")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise RequestError(f"--output {args.output}: there is no such folder; make it first")
    bundle = open_bundle(args.bundle, "device") if args.bundle else None
    stem = Path(args.output).stem.lower() if args.output else "this-machine"
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in stem)
    if (busy := busy_processors()) > 0.5:
        print(f"isthmus: other programs keep {busy:.1f} processors busy; the figures will be lower", file=sys.stderr)
    with progress_bar() as progress:
        profile = probe(name, shape=_shape(bundle), threads=args.threads, progress=progress)
    if args.output:
        write_profile(profile, args.output)
    links = [_measure(args, bundle, server) for server in args.server] if bundle else []
    if args.json:
        print(json.dumps({"profile": profile.to_dict(), "links": [link.to_dict() for link in links]}))
        return 0
    print(profile_table(profile))
    for link in links:
        print(
            f"\nlink to {link.server}: round trip {link.round_trip_ms:.2f} ms, up {link.up_mbit_s:.1f} Mbit/s "
            f"by a frame of {link.frame_bytes} bytes"
        )
    if args.output:
        print(f"\nwritten to {args.output}", file=sys.stderr)
    return 0


def _shape(bundle: Bundle | None) -> ModelShape | None:
    from ..devices.kernels import ModelShape

    if bundle is None:
        return None
    arch = bundle.manifest.architecture
    blocks = [segment.block_size for segment in bundle.segments("block") if segment.bits <= 8]
    return ModelShape(
        d_model=arch.d_model,
        d_ff=arch.d_ff,
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        block_size=blocks[0] if blocks else ModelShape.block_size,
    )


def _measure(args: argparse.Namespace, bundle: Bundle, server: str) -> LinkMeasurement:
    from pathlib import Path

    from ..runtime.edge.link_probe import measure_link
    from ..runtime.wire.security import ChannelSecurity

    security = ChannelSecurity(ca_file=Path(args.tls_ca) if args.tls_ca else None, insecure=args.insecure)
    return measure_link(bundle, server, security)


def _emulate(args: argparse.Namespace) -> int:
    from ..devices.limits import RLIMIT, run_limited
    from ..devices.profile import load_profile

    device = load_profile(args.profile)
    host = load_profile(args.host_profile) if args.host_profile else None
    cpu_time, speed = None, "the speed is this machine's, for there is no --host-profile"
    if host is not None:
        # Decode is what a user waits for, and both profiles have its rate.
        ratio = device.decode_gb_s[4] / host.decode_gb_s[4]
        cpu_time = ratio * host.threads if ratio < 1 else None
        speed = f"{100 * ratio:.0f} % of this machine's decode speed"
        speed += "" if ratio < 1 else ", which it cannot have"

    def ready(limits: Limits) -> None:
        parts = [f"{device.free_mb:g} MB of memory ({limits.memory})"]
        parts += [f"{len(limits.cpus)} processors"] if limits.cpus else []
        parts += [speed + (f" ({limits.time})" if limits.time else "")]
        for line in (f"as on {device.title}: {', '.join(parts)}", *limits.missing):
            print(f"isthmus: {line}", file=sys.stderr)

    done = run_limited(
        args.command,
        device.free_mb,
        cpus=sum(cores.count for cores in device.cores),
        cpu_time=cpu_time,
        ready=ready,
    )
    if done.killed_for_memory:
        print(f"isthmus: killed for memory at the limit of {device.free_mb:g} MB", file=sys.stderr)
    elif done.peak_mb is not None:
        print(f"isthmus: at most {done.peak_mb:.0f} MB of memory, cached files included", file=sys.stderr)
    elif done.status and done.limits.memory == RLIMIT:
        print("isthmus: an allocation beyond the limit fails, as the command may have said above", file=sys.stderr)
    return done.status


def profile_table(profile: DeviceProfile) -> str:
    """A profile as text: a heading and a table of figure, value and source."""
    from tabulate import tabulate

    def text(figure: str, value: object) -> str:
        if figure == "cores":
            return ", ".join(f"{c.count} × {c.kind}" + (f" {c.ghz:g} GHz" if c.ghz else "") for c in profile.cores)
        if isinstance(value, tuple):
            return " ".join(f"{speed:g}" for speed in (value if len(value) <= 8 else (*value[:3], *value[-1:])))
        return f"{value:g}"

    heading = f"{profile.title} ({profile.name}): {profile.threads} threads, "
    heading += f"predicted times to within {100 * profile.uncertainty:.0f} %"
    heading += f", link {profile.link}" if profile.link else ""
    rows = [[figure, text(figure, value), profile.source(figure)] for figure, value in profile.figures().items()]
    table = tabulate(rows, ["figure", "value", "source"], maxcolwidths=[None, None, 70], disable_numparse=True)
    return f"{heading}\n\n{table}"
