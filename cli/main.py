"""Entry point: one sub-command per file of this folder."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from types import ModuleType

from .._version import __version__
from ..errors import IsthmusError
from . import (
    bench,
    certs,
    devices,
    distill,
    eval,
    export,
    fleet,
    generate,
    inspect,
    install,
    link,
    plan,
    pull,
    serve,
    top,
)

COMMANDS: dict[str, ModuleType] = {
    "pull": pull,
    "export": export,
    "distill": distill,
    "inspect": inspect,
    "install": install,
    "serve": serve,
    "fleet": fleet,
    "certs": certs,
    "top": top,
    "generate": generate,
    "bench": bench,
    "eval": eval,
    "devices": devices,
    "link": link,
    "plan": plan,
}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command's module docstring is its help."""
    parser = argparse.ArgumentParser(prog="isthmus", description="Run a language model cut in two: device and server.")
    parser.add_argument("--version", action="version", version=f"isthmus {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens to stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=summary.splitlines()[0],
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status. Expected errors become one line on stderr."""
    args = build_parser().parse_args(arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core would log to stderr what our errors say better
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if args.verbose:
        logging.getLogger("isthmus").setLevel(logging.DEBUG)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except IsthmusError as error:
        print(f"isthmus: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extras = {"eval": "eval", "distill": "distill", "fleet": "fleet"} | dict.fromkeys(("export", "plan"), "export")
        extras |= dict.fromkeys(("certs", "serve", "top"), "server")
        if args.command not in extras or (error.name or "").startswith("isthmus"):
            raise
        extra = extras[args.command]
        print(
            f"isthmus: error: {args.command} needs {error.name}; install it with pip install 'isthmus[{extra}]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("isthmus: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left, for example `| head`. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
