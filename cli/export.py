"""Quantize a model, cut it in two and write a bundle.

MODEL is a folder with safetensors, a .gguf file, a catalog name (see `isthmus pull`) or a hub id. OUT/device
goes to the device, OUT/server to the server; neither ever holds the other's layers.
"""

from __future__ import annotations

import argparse

WEIGHT_BITS = (2, 4, 8, 16, 32)


def _split(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of layers, or all") from None


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file, catalog name or hub id")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder to create; must not exist")
    parser.add_argument(
        "--split",
        type=_split,
        required=True,
        metavar="N|all",
        help="layers on the device; `all` keeps every layer there",
    )
    parser.add_argument("--front-bits", type=int, choices=WEIGHT_BITS, default=4, help="device layers (default 4)")
    parser.add_argument("--back-bits", type=int, choices=WEIGHT_BITS, default=8, help="server layers (default 8)")
    parser.add_argument("--embed-bits", type=int, choices=WEIGHT_BITS, help="default: 8, or the front's if higher")
    parser.add_argument("--head-bits", type=int, choices=WEIGHT_BITS, help="default: 8, or the back's if higher")
    parser.add_argument(
        "--block-size",
        type=int,
        default=32,
        metavar="N",
        help="weights that share a scale (default 32); 16 or 32 at 4 bits, up to 64 at 8, 32 to 128 at 2",
    )
    parser.add_argument("--layers-per-block", type=int, default=10, metavar="N", help="layers in one file (default 10)")
    parser.add_argument("--max-length", type=int, metavar="N", help="context, prompt and new tokens (default 2048)")
    parser.add_argument(
        "--compare-transformers",
        action="store_true",
        help="validate against transformers' own model, too (needs torch)",
    )
    parser.add_argument("--cache", metavar="DIR", help="where downloaded models are kept")
    parser.add_argument("--offline", action="store_true", help="use downloaded models only")
    parser.add_argument("--json", action="store_true", help="print the manifest instead of a table")


def run(args: argparse.Namespace) -> int:
    """Export and print what was written."""
    from ..export.export import export_bundle
    from .inspect import print_manifest
    from .progress import progress_bar

    with progress_bar() as progress:
        manifest = export_bundle(
            args.model,
            args.output,
            split=args.split,
            front_bits=args.front_bits,
            back_bits=args.back_bits,
            embed_bits=args.embed_bits,
            head_bits=args.head_bits,
            block_size=args.block_size,
            layers_per_block=args.layers_per_block,
            max_length=args.max_length,
            compare_transformers=args.compare_transformers,
            cache=args.cache,
            offline=args.offline,
            progress=progress,
        )
    print_manifest(manifest, as_json=args.json)
    return 0
