"""Train a draft for a split bundle: a small layer on the device that guesses tokens for the server to verify.

The model writes conversations, and the draft learns to say what it says. OUT/device/draft is written; generations use
it from then on (`--draft`), with the same output in fewer round trips. An interrupted run goes on with --resume.
"""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="OUT", help="what `isthmus export` wrote")
    parser.add_argument("--model", metavar="MODEL", help="its checkpoint (default: what the manifest names)")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line (default: some hundred that are shipped)")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="X", help="of training (default 60)")
    parser.add_argument(
        "--groups", type=int, default=24, metavar="N", help="of conversations, 32,768 tokens each (default 24)"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=4608, metavar="N", help="ids that it can guess (default 4608)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--work", metavar="DIR", help="for conversations and training (default OUT/distill)")
    parser.add_argument("--cache", metavar="DIR", help="of downloaded models")
    parser.add_argument("--offline", action="store_true", help="use models on this machine only")
    parser.add_argument("--json", action="store_true", help="print the draft's record as JSON")


def run(args: argparse.Namespace) -> int:
    """Train, with progress on stderr."""
    from ..export.distill import distill
    from .progress import progress_bar

    with progress_bar() as progress:
        record = distill(
            args.bundle,
            model=args.model,
            prompts=args.prompts,
            minutes=args.minutes,
            groups=args.groups,
            vocabulary=args.vocabulary,
            seed=args.seed,
            resume=args.resume,
            work=args.work,
            cache=args.cache,
            offline=args.offline,
            progress=progress,
        )
    if args.json:
        print(record.to_json(), end="")
    else:
        told = record.training
        size = sum(entry.bytes for entry in record.files) / 1e6
        print(
            f"draft of {size:.1f} MB, {record.vocabulary} ids; agrees with the model on {100 * told['agreement']:.1f} "
            f"% of held-out tokens after {told['steps']} steps on {told['tokens']} tokens"
        )
    return 0
