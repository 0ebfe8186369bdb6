"""Train a draft for a split bundle: a small layer on the device that guesses tokens for the server to verify.

The model writes conversations, and the draft learns to say what it says. OUT/device/draft is written; generations use
it from then on (`--draft`), with the same output in fewer round trips. An interrupted run goes on with --resume.
At the end it is measured, where OUT/server is there, how often the draft is right when it is how sure: what
`--exit-agreement` promises rests on that. --exits-only measures the draft that is there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.exits import ExitCurve


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
    parser.add_argument("--draft-layers", type=int, default=1, metavar="N", help="of the draft: 1 (default)")
    parser.add_argument(
        "--exits", type=int, metavar="LAYER", help="where tokens may exit with the draft: the split (default)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--exits-only", action="store_true", help="train nothing: measure the exits of the draft in OUT/device"
    )
    parser.add_argument("--work", metavar="DIR", help="for conversations and training (default OUT/distill)")
    parser.add_argument("--cache", metavar="DIR", help="of downloaded models")
    parser.add_argument("--offline", action="store_true", help="use models on this machine only")
    parser.add_argument("--json", action="store_true", help="print the draft's record as JSON")


def run(args: argparse.Namespace) -> int:
    """Train and measure, with progress on stderr."""
    from pathlib import Path

    from ..export.distill import distill, exit_conversations
    from ..runtime.exit_measurement import ExitText, calibrate_exits
    from .progress import progress_bar

    common = {name: getattr(args, name) for name in ("model", "prompts", "exits", "seed", "work", "cache", "offline")}
    record = curve = None
    with progress_bar() as progress:
        if not args.exits_only:
            record = distill(
                args.bundle,
                **common,
                minutes=args.minutes,
                groups=args.groups,
                vocabulary=args.vocabulary,
                draft_layers=args.draft_layers,
                resume=args.resume,
                progress=progress,
            )
        if args.exits_only or (Path(args.bundle) / "server").is_dir():
            texts = exit_conversations(args.bundle, **common, progress=progress)
            text = f"conversations about {args.prompts or 'the default prompts'}, seed {args.seed}"
            pairs = [ExitText(ids.tolist(), written) for ids, written in zip(texts.ids, texts.written, strict=True)]
            curve = calibrate_exits(args.bundle, pairs, text, progress=progress)
            if record is not None:
                record = replace(record, exits=curve)
    if args.json:
        print(record.to_json() if record is not None else json.dumps(asdict(curve) if curve else None))
        return 0
    if record is not None:
        told = record.training
        size = sum(entry.bytes for entry in record.files) / 1e6
        print(
            f"draft of {size:.1f} MB, {record.vocabulary} ids; agrees with the model on {100 * told['agreement']:.1f} "
            f"% of held-out tokens after {told['steps']} steps on {told['tokens']} tokens"
        )
    if curve is not None:
        print(_exit_line(curve))
    return 0


def _exit_line(curve: ExitCurve) -> str:
    thresholds = {agreement: curve.threshold(agreement) for agreement in (0.9, 0.95, 0.99)}
    shares = [
        f"{100 * curve.share(threshold):.0f} % at {agreement:g}" if threshold is not None else f"none at {agreement:g}"
        for agreement, threshold in thresholds.items()
    ]
    return f"tokens that can be exited, by promised agreement: {', '.join(shares)}"
