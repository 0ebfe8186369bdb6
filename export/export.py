"""Export: from a checkpoint to a bundle, written to one side and moved into place when it is whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from tokenizers import Tokenizer

from .._version import __version__
from ..devices.backend import MINIMUM_ONNXRUNTIME
from ..errors import ExportError
from ..quant.codec import CODECS
from ..quant.opsc import Recipe
from ..runtime.bundle import (
    MANIFEST_NAME,
    SCHEMA,
    Architecture,
    FileEntry,
    Half,
    KVSpec,
    Manifest,
    Segment,
    Source,
    sha256_file,
)
from .checkpoint import Checkpoint, open_checkpoint
from .families import family_of
from .families.common import check_tensors
from .progress import Progress, silent
from .segments import SegmentWriter
from .sources import resolve_model
from .validate import FloatModel, Validator, validation_text

DEFAULT_MAX_LENGTH = 2048
DEFAULT_LAYERS_PER_BLOCK = 10  # a block costs about 60 µs a token: with 10 layers, a twentieth of a small model's time
VALIDATION_TOKENS = 512


def export_bundle(
    model: str,
    out: str | Path,
    *,
    split: int | None,
    front_bits: int = 4,
    back_bits: int = 8,
    embed_bits: int | None = None,
    head_bits: int | None = None,
    block_size: int = 32,
    layers_per_block: int = DEFAULT_LAYERS_PER_BLOCK,
    max_length: int | None = None,
    compare_transformers: bool = False,
    cache: str | Path | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Quantize a checkpoint, cut it at ``split`` and write the bundle ``out``.

    Args:
        model: a checkpoint folder, a ``.gguf`` file, a catalog name or a hub id.
        out: folder to create; it must not exist.
        split: layers on the device, from 1; None keeps the whole model there.
        front_bits: weight bits of the device's layers: 2, 4, 8, 16 or 32.
        back_bits: weight bits of the server's layers.
        embed_bits: bits of the embedding table; by default 8, or more if the front has more.
        head_bits: bits of the vocabulary head; by default 8, or more if the back has more.
        block_size: weights that share a scale: 16, 32, 64 or 128, see `isthmus.quant.opsc.BLOCK_SIZES`.
        layers_per_block: most layers in one ONNX file.
        max_length: most positions of a session; by default 2048 or the model's own limit if that is lower.
        compare_transformers: also validate against transformers' own model (needs torch and transformers).
        cache: where downloaded models are kept; by default the user's cache folder.
        offline: use models on this machine only.
        progress: called as the work goes on.

    Returns:
        The manifest that was written, its validation report included.

    Raises:
        ModelError: the checkpoint cannot be read or has no builder.
        ExportError: options out of range, ``out`` exists, no space, or validation failed. Nothing is left behind.
    """
    out = Path(out)
    if out.exists():
        raise ExportError(f"{out} exists; export never overwrites: remove it or choose another folder")
    checkpoint = open_checkpoint(
        resolve_model(model, cache=Path(cache) if cache else None, offline=offline, progress=progress)
    )
    family = family_of(checkpoint.config)
    arch: Architecture = family.architecture(checkpoint.config)
    check_tensors(checkpoint, arch, (family.tensors(arch, layer) for layer in range(arch.layers)))
    split = arch.layers if split is None else split
    recipe = Recipe(
        layers=arch.layers,
        split=split,
        front_bits=front_bits,
        back_bits=back_bits if split < arch.layers else front_bits,
        embed_bits=max(8, front_bits) if embed_bits is None else embed_bits,
        head_bits=max(8, back_bits if split < arch.layers else front_bits) if head_bits is None else head_bits,
        block_size=block_size,
    )
    if layers_per_block < 1:
        raise ExportError(f"layers_per_block={layers_per_block}: must be at least 1")
    max_length = min(DEFAULT_MAX_LENGTH, arch.max_positions) if max_length is None else max_length
    if not 2 <= max_length <= arch.max_positions:
        raise ExportError(
            f"max_length={max_length}: must lie between 2 and {arch.max_positions}, the model's positions"
        )

    def build(root: Path) -> Manifest:
        writer = SegmentWriter(root, checkpoint, family, arch, recipe, layers_per_block, max_length)
        segments = writer.write(progress)
        manifest = _manifest(root, checkpoint, arch, recipe, segments, max_length)
        ids = Tokenizer.from_file(str(root / "device" / "tokenizer.json")).encode(validation_text()).ids
        ids = ids[: min(VALIDATION_TOKENS, max_length)]
        outside = None
        if compare_transformers:
            from .transformers_reference import transformers_logits

            outside = transformers_logits(checkpoint, ids)
        validator = Validator(root, FloatModel(checkpoint, family, arch, root), recipe)
        report = validator.report(segments, ids, progress, outside)
        manifest = replace(manifest, validation=report)
        for half in manifest.files:
            (root / half / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    return _staged(out, build)


def _manifest(
    root: Path,
    checkpoint: Checkpoint,
    arch: Architecture,
    recipe: Recipe,
    segments: list[Segment],
    max_length: int,
) -> Manifest:
    """Write the tokenizer and describe everything below ``root``; the validation report is still empty."""
    tokenizer = checkpoint.tokenizer()
    (root / "device" / "tokenizer.json").write_text(tokenizer.tokenizer_json, encoding="utf-8")
    halves: list[Half] = [half for half in ("device", "server") if (root / half).is_dir()]
    precision = asdict(recipe)
    del precision["layers"]
    return Manifest(
        schema=SCHEMA,
        isthmus=__version__,
        source=Source(checkpoint.name, checkpoint.format, checkpoint.file_hashes()),
        architecture=arch,
        max_length=max_length,
        segments=tuple(segments),
        kv=KVSpec("float32", arch.kv_heads, arch.head_dim),
        codecs=CODECS,
        end_tokens=tokenizer.end_tokens,
        bos_token=tokenizer.bos_token,
        chat_template=tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens,
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        files={half: _files(root / half) for half in halves},
        validation={},
        **precision,
    )


def _files(folder: Path) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(path.name, path.stat().st_size, sha256_file(path)) for path in sorted(folder.iterdir()))


def _staged(out: Path, build: Callable[[Path], Manifest]) -> Manifest:
    """Build in a hidden neighbour of ``out`` and rename it when done; on any error remove it."""
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        staging.mkdir()
        manifest = build(staging)
        staging.rename(out)
        return manifest
    except OSError as error:
        raise ExportError(
            f"{out}: {error.strerror or error}; nothing was kept, free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    """Remove what exports to the same place left when they were killed."""
    for path in out.parent.glob(f".{out.name}.partial-*"):
        pid = re.fullmatch(r".*\.partial-(\d+)", path.name)
        if pid and not _alive(int(pid[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
