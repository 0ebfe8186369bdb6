"""Quantize a model, cut it in two and write a bundle.

MODEL is a folder with safetensors, a .gguf file, a catalog name (see `isthmus pull`) or a hub id. OUT/device
goes to the device, OUT/server to the server; neither holds the other's layers, unless the device is to have them all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

WEIGHT_BITS = (2, 4, 8, 16, 32)
WEIGHTS = ("rtn", "mse", "hqq", "gptq", "mixed", "auto")
WEIGHTS_HELP = (
    "how weights are rounded: to nearest (rtn, the default), with searched scales (mse), half-quadratic (hqq), or on a "
    "calibration text: gptq; mixed, with more bits where it usually matters; auto, with the same bytes spent where it "
    "does"
)
KV_BITS = (4, 8, 32)
DEVICE_LAYERS = ("front", "all")


def _split(text: str) -> int | str:
    if text == "all":
        return text  # not None: argparse takes an option's default for an option that was not given
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of layers, or all") from None


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file, catalog name or hub id")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder to create; must not exist")
    cut = parser.add_mutually_exclusive_group(required=True)
    cut.add_argument(
        "--split",
        type=_split,
        metavar="N|all",
        help="layers on the device; `all` keeps every layer there, 0 the whole model on the server, to which the "
        "device then sends token ids",
    )
    cut.add_argument(
        "--plan",
        metavar="FILE",
        help="take split, bits of weights and KV cache, and context from `isthmus plan -o FILE`",
    )
    parser.add_argument(
        "--device-layers",
        choices=DEVICE_LAYERS,
        help="`all` copies the server's layers to the device, which can then begin alone, hand over to the server, and "
        "go on if that is lost (default front)",
    )
    parser.add_argument("--front-bits", type=int, choices=WEIGHT_BITS, help="device layers (default 4)")
    parser.add_argument("--back-bits", type=int, choices=WEIGHT_BITS, help="server layers (default 8)")
    parser.add_argument("--embed-bits", type=int, choices=WEIGHT_BITS, help="default: 8, or the front's if higher")
    parser.add_argument("--head-bits", type=int, choices=WEIGHT_BITS, help="default: 8, or the back's if higher")
    parser.add_argument(
        "--block-size",
        type=int,
        choices=(16, 32, 64, 128),
        default=32,
        help="weights that share a scale (default 32); 16 not at 2 bits",
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="rtn", help=WEIGHTS_HELP)
    parser.add_argument("--asymmetric", action="store_true", help="a zero point for every block of weights")
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        help="KV cache on both sides (default 32, float32); 8 and 4 save memory and cost prefill speed",
    )
    parser.add_argument("--front-kv-bits", type=int, choices=KV_BITS, help="KV cache on the device")
    parser.add_argument("--back-kv-bits", type=int, choices=KV_BITS, help="KV cache on the server")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="UTF-8 text to calibrate on, never one to evaluate on; by default the model writes its own, once, and the "
        "cache keeps it",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=65536,
        metavar="N",
        help="tokens of calibration text (default 65536); 0 leaves calibration out",
    )
    parser.add_argument("--layers-per-block", type=int, default=10, metavar="N", help="layers in one file (default 10)")
    parser.add_argument(
        "--ffn-skip", action="store_true", help="graphs for `generate --ffn-skip`; a little slower without that"
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="context, prompt and new tokens (default 2048)")
    parser.add_argument(
        "--compare-transformers",
        action="store_true",
        help="validate against transformers' own model, too (needs torch)",
    )
    parser.add_argument(
        "--no-draft", dest="draft", action="store_false", help="leave out the trained draft that is shipped for a model"
    )
    parser.add_argument("--cache", metavar="DIR", help="where downloaded models and calibration texts are kept")
    parser.add_argument("--offline", action="store_true", help="use downloaded models only")
    parser.add_argument("--json", action="store_true", help="print the manifest instead of a table")


def run(args: argparse.Namespace) -> int:
    """Export and print what was written."""
    from ..export.export import export_bundle
    from ..runtime.bundle import open_bundle
    from ..runtime.draft_bundle import open_draft
    from .inspect import print_draft, print_manifest
    from .progress import progress_bar

    kv_bits = 32 if args.kv_bits is None else args.kv_bits
    options = {
        "split": None if args.split == "all" else args.split,
        "device_layers": args.device_layers or "front",
        "front_bits": 4 if args.front_bits is None else args.front_bits,
        "back_bits": 8 if args.back_bits is None else args.back_bits,
        "front_kv_bits": kv_bits if args.front_kv_bits is None else args.front_kv_bits,
        "back_kv_bits": kv_bits if args.back_kv_bits is None else args.back_kv_bits,
        "max_length": args.max_length,
    }
    if args.plan:
        options = _planned(args)
    with progress_bar() as progress:
        manifest = export_bundle(
            args.model,
            args.output,
            embed_bits=args.embed_bits,
            head_bits=args.head_bits,
            block_size=args.block_size,
            weights=args.weights,
            symmetric=not args.asymmetric,
            calibration=args.calibration,
            calibration_tokens=args.calibration_tokens,
            layers_per_block=args.layers_per_block,
            ffn_skip=args.ffn_skip,
            compare_transformers=args.compare_transformers,
            draft=args.draft,
            cache=args.cache,
            offline=args.offline,
            progress=progress,
            **options,
        )
    print_manifest(manifest, as_json=args.json)
    if not args.json and (Path(args.output) / "device").is_dir():
        draft = open_draft(open_bundle(args.output, "device", verify=False), verify=False)
        if draft is not None:
            print_draft(draft.record)
    return 0


def _planned(args: argparse.Namespace) -> dict[str, Any]:
    """Options from a plan, which none of the command line may contradict."""
    from ..errors import PlanError
    from ..export.planner import export_options

    for name in ("device_layers", "front_bits", "back_bits", "kv_bits", "front_kv_bits", "back_kv_bits", "max_length"):
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise PlanError(f"{option} and --plan: the plan tells that; leave {option} out, or plan with other limits")
    return export_options(args.plan, args.model, cache=args.cache, offline=args.offline)
