"""Show what a bundle holds: precision, segments, sizes, validation.

DIR is one half (OUT/device or OUT/server) or the folder above both. Every file is checked against the manifest.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.bundle import Manifest, Segment
    from ..runtime.draft_bundle import DraftRecord


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(args: argparse.Namespace) -> int:
    """Check the files and print the manifest."""
    from ..runtime.bundle import MANIFEST_NAME, open_bundle
    from ..runtime.draft_bundle import open_draft

    folder = Path(args.bundle)
    halves = [] if (folder / MANIFEST_NAME).exists() else [folder / half for half in ("device", "server")]
    opened = [open_bundle(half) for half in halves if half.is_dir()] or [open_bundle(folder)]
    print_manifest(opened[0].manifest, as_json=args.json)
    draft = open_draft(opened[0]) if opened[0].half == "device" else None
    if draft is not None and not args.json:
        print_draft(draft.record)
    return 0


def print_draft(record: DraftRecord) -> None:
    """Print what a draft is."""
    size = sum(entry.bytes for entry in record.files) / 1e6
    line = f"draft: {size:.2f} MB, guesses {record.vocabulary} ids"
    if "agreement" in record.training:
        line += f", agrees with the model on {100 * record.training['agreement']:.1f} % of held-out tokens"
    print(line)


def print_manifest(manifest: Manifest, *, as_json: bool) -> None:
    """Print a manifest as tables, or as the JSON it is stored in."""
    from tabulate import tabulate

    if as_json:
        print(json.dumps(json.loads(manifest.to_json()), indent=2))
        return
    arch, report = manifest.architecture, manifest.validation
    differences, influence = report.get("segments", {}), report.get("influence", {})
    if manifest.device_only or manifest.server_only:
        where = f"the whole model on the {'device' if manifest.device_only else 'server'}"
    else:
        where = f"layers 0–{manifest.split - 1} on the device, {manifest.split}–{arch.layers - 1} on the server"
    if manifest.whole_on_device and not manifest.device_only:
        where += ", which the device has, too"
    print(f"{manifest.source.name} ({arch.family}, {arch.layers} layers, d_model {arch.d_model}): {where}")
    sizes = {(half, file.name): file.bytes for half, files in manifest.files.items() for file in files}
    rows = []
    for segment in manifest.segments:
        layers = f"{segment.first_layer}–{segment.last_layer - 1}" if segment.kind == "block" else ""
        bytes_ = sum(sizes[segment.half, name] for name in (segment.graph_file, segment.data_file) if name)
        shared = segment.kind == "embed" and segment.data_file != "embed.data"
        size = f"in {segment.data_file}" if shared else f"{bytes_ / 1e6:.2f}"
        drift = differences.get(segment.name, {})
        rows.append(
            [
                segment.half,
                segment.name,
                layers,
                segment.bits,
                _methods(segment),
                size,
                drift.get("max_abs"),
                drift.get("relative"),
                influence.get(segment.name),
            ]
        )
    headers = ["half", "segment", "layers", "bits", "weights", "MB", "max |Δ|", "relative Δ", "KL without"]
    print(tabulate(rows, headers=headers, floatfmt=".3g"))
    totals = [[half, sum(f.bytes for f in files) / 1e6, len(files)] for half, files in manifest.files.items()]
    print()
    print(tabulate(totals, headers=["half", "MB", "files"], floatfmt=".2f"))
    print(f"bits per weight: {bits_per_weight(manifest):.2f} (scales included)   context: {manifest.max_length}")
    cached = [
        f"{half} {spec.token_bytes(manifest.half_layers(half))} bytes ({spec.bits} bit)"
        for half, spec in manifest.kv.items()
        if manifest.half_layers(half)
    ]
    if manifest.whole_on_device and len(manifest.kv) > 1:
        both = sum(spec.token_bytes(manifest.half_layers(half)) for half, spec in manifest.kv.items())
        cached.append(f"the device alone {both} bytes")
    print(f"KV cache for each token of context: {', '.join(cached)}")
    if report:
        print(
            f"validation on {report['tokens']} tokens against {report['reference']}: "
            f"top-1 agreement {report['top1_agreement']:.4f}, KL {report['kl']:.5f}, "
            f"perplexity {report['perplexity']:.3f} (reference {report['reference_perplexity']:.3f}), "
            f"max |Δ logit| {report['logits_max_abs']:.3g}"
        )
        print(f"same bits in chunks of any length: {'yes' if report['chunking_exact'] else 'NO'}")
    if manifest.skips_ffn:
        print("feed-forward networks may be left out: generate --ffn-skip")
    if outside := report.get("transformers"):
        print(
            f"against transformers: top-1 agreement {outside['top1_agreement']:.4f}, KL {outside['kl']:.3g}, "
            f"max |Δ logit| {outside['logits_max_abs']:.3g}"
        )


def bits_per_weight(manifest: Manifest) -> float:
    """Stored bits per weight over embedding, layers and head; tied ones on the same half count once."""
    arch = manifest.architecture
    attention = arch.d_model * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    layers = arch.layers * (attention + 3 * arch.d_model * arch.d_ff)
    vocabulary = arch.vocab_size * arch.d_model
    shared = _embedding_is_shared(manifest)
    counted = [segment for segment in manifest.segments if not (shared and segment.kind == "embed")]
    stored = sum(record.bytes for segment in counted for record in segment.tensors.values())
    return 8 * stored / (layers + vocabulary * (1 if shared else 2))


def _embedding_is_shared(manifest: Manifest) -> bool:
    return any(segment.kind == "embed" and segment.data_file != "embed.data" for segment in manifest.segments)


def _methods(segment: Segment) -> str:
    """How a segment's weights were found, with the precisions that are not the segment's own: ``gptq, 2 at 8 bits``."""
    counts = Counter(record.method for record in segment.tensors.values())
    parts = [method if len(counts) == 1 else f"{count} {method}" for method, count in counts.most_common()]
    others = Counter(
        (record.bits, record.block_size)
        for record in segment.tensors.values()
        if segment.bits <= 8 and (record.bits, record.block_size) != (segment.bits, segment.block_size)
    )
    parts += [f"{count} at {bits}/{block_size}" for (bits, block_size), count in sorted(others.items())]
    return ", ".join(parts)
