"""Export: from a checkpoint to a bundle, written to one side and moved into place when it is whole."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, get_args

from tokenizers import Tokenizer

from .._version import __version__
from ..devices.backend import MINIMUM_ONNXRUNTIME
from ..errors import ExportError
from ..quant.allocation import mixed
from ..quant.ids import Ids
from ..quant.kv import KVScales
from ..quant.opsc import CALIBRATED, Recipe
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
)
from .calibration import CALIBRATION_TOKENS, WINDOW, check_tokens
from .calibration import calibration_windows as windows_of
from .checkpoint import Checkpoint, TokenizerFiles, open_checkpoint
from .codec_calibration import UNCALIBRATED, calibrate_codecs
from .draft_segment import write_draft
from .families import family_of
from .families.common import check_tensors, weight_tensors
from .feed_forward import skippable_layers
from .gptq import CalibratedWeights
from .kv_scales import calibrate_kv
from .progress import Progress, silent
from .segments import SegmentWriter, block_ranges
from .sensitivity import auto
from .shipped_drafts import shipped_draft
from .sources import resolve_model
from .validate import FloatModel, Validator, validation_text
from .weights import Weights, copies

DEFAULT_MAX_LENGTH = 2048
DEFAULT_LAYERS_PER_BLOCK = 10  # a block costs about 60 µs a token: with 10 layers, a twentieth of a small model's time
VALIDATION_TOKENS = 512
WEIGHT_TOKENS = 16384  # of the calibration text, for weights: 8192 take three minutes of one core for 135M parameters
KV_TOKENS = 8192  # of the calibration text, for the scales of a KV cache: the float model reads them, and is slow


DeviceLayers = Literal["front", "all"]


def export_bundle(
    model: str,
    out: str | Path,
    *,
    split: int | None,
    device_layers: DeviceLayers = "front",
    front_bits: int = 4,
    back_bits: int = 8,
    embed_bits: int | None = None,
    head_bits: int | None = None,
    block_size: int = 32,
    weights: str = "rtn",
    symmetric: bool = True,
    front_kv_bits: int = 32,
    back_kv_bits: int = 32,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    calibration_windows: Sequence[Sequence[int]] | None = None,
    layers_per_block: int = DEFAULT_LAYERS_PER_BLOCK,
    ffn_skip: bool = False,
    max_length: int | None = None,
    compare_transformers: bool = False,
    draft: bool = True,
    cache: str | Path | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Quantize a checkpoint, cut it at ``split`` and write the bundle ``out``.

    Args:
        model: a checkpoint folder, a ``.gguf`` file, a catalog name or a hub id.
        out: folder to create; it must not exist.
        split: layers on the device; None keeps the whole model there, 0 on the server.
        device_layers: ``all`` gives the device a copy of the server's layers and of the head, so that it can generate
            alone and move a session to the server and back (`isthmus.runtime.edge.handover`); needs both halves.
        front_bits: weight bits of the device's layers: 2, 4, 8, 16 or 32; not looked at where it has none.
        back_bits: weight bits of the server's layers; likewise.
        embed_bits: bits of the embedding table; by default 8, or more if the front has more.
        head_bits: bits of the vocabulary head; by default 8, or more if the back has more.
        block_size: weights that share a scale: 16, 32, 64 or 128, see `isthmus.quant.opsc.BLOCK_SIZES`.
        weights: how the layers' codes are found, a key of `isthmus.quant.opsc.RECIPES`.
        symmetric: whether zero is the middle code of every block; else each block gets a zero point.
        front_kv_bits: of the KV cache on the device: 32 (float32), 8 or 4.
        back_kv_bits: of the KV cache on the server.
        calibration: a UTF-8 text like those that will be read, to calibrate on; by default the model writes its own
            where something is to be calibrated, and ``cache`` keeps it.
        calibration_tokens: how much of it, at least eight windows of 512 or of ``max_length``; 0 leaves calibration
            out: scales of a quantized KV cache are then measured on the text that validation reads.
        calibration_windows: token ids of texts to calibrate on, in place of the two.
        layers_per_block: most layers in one ONNX file.
        ffn_skip: whether generations may leave feed-forward networks out, see `isthmus.export.feed_forward`. Graphs
            that can are a little slower where nothing is left out.
        max_length: most positions of a session; by default 2048 or the model's own limit if that is lower.
        draft: give the device half the trained draft that comes with the package, if there is one for this model and
            split; `isthmus.export.distill` trains others.
        compare_transformers: also validate against transformers' own model (needs torch and transformers).
        cache: where downloaded models and what they wrote themselves are kept; by default the user's cache folder.
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
    cache_folder = Path(cache) if cache else None
    checkpoint = open_checkpoint(resolve_model(model, cache=cache_folder, offline=offline, progress=progress))
    family = family_of(checkpoint.config)
    arch: Architecture = family.architecture(checkpoint.config)
    check_tensors(checkpoint, arch, (family.tensors(arch, layer) for layer in range(arch.layers)))
    split = arch.layers if split is None else split
    if split == 0:
        front_bits, front_kv_bits = back_bits, back_kv_bits
    elif split == arch.layers:
        back_bits, back_kv_bits = front_bits, front_kv_bits
    recipe = Recipe(
        layers=arch.layers,
        split=split,
        front_bits=front_bits,
        back_bits=back_bits,
        embed_bits=max(8, front_bits) if embed_bits is None else embed_bits,
        head_bits=max(8, back_bits) if head_bits is None else head_bits,
        block_size=block_size,
        weights=weights,
        symmetric=symmetric,
        front_kv_bits=front_kv_bits,
        back_kv_bits=back_kv_bits,
    )
    if device_layers not in get_args(DeviceLayers):
        raise ExportError(f"device_layers={device_layers!r}: must be one of {', '.join(get_args(DeviceLayers))}")
    if device_layers == "all" and not split:
        raise ExportError("device_layers=all with split 0: there is no front to hand over from; choose a split from 1")
    if layers_per_block < 1:
        raise ExportError(f"layers_per_block={layers_per_block}: must be at least 1")
    spans = [span for _, span in block_ranges(split, arch.layers, layers_per_block)]
    if ffn_skip and not any(skippable_layers(span, arch.layers) for span in spans):
        raise ExportError(
            f"ffn_skip with {arch.layers} layers in blocks of {max(map(len, spans))}: the first network of a block "
            "always runs, and so do those of the model's first and last layers; choose larger blocks"
        )
    max_length = min(DEFAULT_MAX_LENGTH, arch.max_positions) if max_length is None else max_length
    if not 2 <= max_length <= arch.max_positions:
        raise ExportError(
            f"max_length={max_length}: must lie between 2 and {arch.max_positions}, the model's positions"
        )

    window = min(WINDOW, max_length)
    if calibration_tokens:
        check_tokens(calibration_tokens, window)
    elif calibration is not None:
        raise ExportError(f"calibration={calibration} with calibration_tokens=0: leave out one of them")
    elif weights in CALIBRATED and calibration_windows is None:
        raise ExportError(
            f"weights={weights} with calibration_tokens=0: needs a calibration text; choose rtn, mse or hqq"
        )

    @functools.cache
    def windows() -> Sequence[Sequence[int]]:
        """Texts to calibrate on, made when they are first asked for; empty without calibration."""
        if calibration_windows is not None:
            return calibration_windows
        if not calibration_tokens:
            return []
        return windows_of(
            checkpoint,
            family,
            arch,
            None if calibration is None else Path(calibration),
            tokens=calibration_tokens,
            window=window,
            cache=cache_folder,
            progress=progress,
        )

    if calibration is not None:
        windows()  # a file that does not serve is told of before anything is written

    def weight_windows() -> Sequence[Sequence[int]]:
        """Those of them that weights are calibrated on."""
        return windows() if calibration_windows is not None else windows()[: max(1, WEIGHT_TOKENS // window)]

    if weights == "mixed":
        recipe = replace(recipe, exceptions=mixed(recipe))
    elif weights == "auto":
        recipe = replace(recipe, exceptions=auto(recipe, checkpoint, family, arch, weight_windows(), progress))
    tensors = weight_tensors(arch, [family.tensors(arch, layer) for layer in range(arch.layers)])
    recipe = replace(recipe, exceptions={**recipe.exceptions, **copies(recipe, checkpoint, tensors)})

    def build(root: Path) -> Manifest:
        tokenizer = checkpoint.tokenizer()
        ids = (
            Tokenizer.from_str(tokenizer.tokenizer_json)
            .encode(validation_text())
            .ids[: min(VALIDATION_TOKENS, max_length)]
        )
        reference = FloatModel(checkpoint, family, arch, root)
        kv_scales: dict[int, KVScales] = {}
        if min(recipe.front_kv_bits, recipe.back_kv_bits) < 32:
            texts = windows()
            if calibration_windows is None:
                texts = texts[: max(1, KV_TOKENS // window)] or [ids]
            kv_scales = calibrate_kv(reference, recipe, texts, max_length, progress)
        source = Weights(checkpoint, recipe.precision)
        if weights in CALIBRATED:
            calibrated = CalibratedWeights(checkpoint, family, arch, recipe.precision, weight_windows(), progress)
            source = replace(source, calibrated=calibrated)
        writer = SegmentWriter(
            root,
            source,
            family,
            arch,
            recipe,
            layers_per_block,
            max_length,
            kv_scales,
            whole_on_device=device_layers == "all",
            ffn_skip=ffn_skip,
        )
        segments = writer.write(progress)
        codecs = UNCALIBRATED if recipe.split else (Ids.name,)
        if 0 < recipe.split < recipe.layers:
            codecs = calibrate_codecs(root, segments, checkpoint, family, arch, recipe, windows(), progress)
        manifest = _manifest(root, checkpoint, tokenizer, arch, recipe, segments, max_length, codecs)
        outside = None
        if compare_transformers:
            from .transformers_reference import transformers_logits

            outside = transformers_logits(checkpoint, ids)
        validator = Validator(root, reference, recipe, source)
        report = validator.report(segments, ids, progress, outside)
        manifest = replace(manifest, validation=report)
        for half in manifest.files:
            (root / half / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        shipped = shipped_draft(checkpoint.file_hashes(), split) if draft and device_layers == "front" else None
        if shipped is not None:
            write_draft(root / "device", manifest, *shipped)
        return manifest

    return _staged(out, build)


def _manifest(
    root: Path,
    checkpoint: Checkpoint,
    tokenizer: TokenizerFiles,
    arch: Architecture,
    recipe: Recipe,
    segments: list[Segment],
    max_length: int,
    codecs: tuple[str, ...],
) -> Manifest:
    """Write the tokenizer and describe everything below ``root``; the validation report is still empty."""
    (root / "device" / "tokenizer.json").write_text(tokenizer.tokenizer_json, encoding="utf-8")
    halves: list[Half] = [half for half in ("device", "server") if (root / half).is_dir()]
    precision = asdict(recipe)
    for name in ("layers", "exceptions", "front_kv_bits", "back_kv_bits"):  # told elsewhere
        del precision[name]
    kv_bits: dict[Half, int] = {"device": recipe.front_kv_bits, "server": recipe.back_kv_bits}
    return Manifest(
        schema=SCHEMA,
        isthmus=__version__,
        source=Source(checkpoint.name, checkpoint.format, checkpoint.file_hashes()),
        architecture=arch,
        max_length=max_length,
        segments=tuple(segments),
        kv={half: KVSpec(kv_bits[half], arch.kv_heads, arch.head_dim) for half in halves},
        codecs=codecs,
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
    return tuple(FileEntry.of(path) for path in sorted(folder.iterdir()))


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
