"""Profiles of devices: list them, show one.

A profile says how much memory a device has and how fast it reads weights and multiplies, each figure with its source.
NAME is one of `isthmus devices list` or the path of a TOML file.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..devices.profile import DeviceProfile


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

    for command in (listing, show):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")


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
