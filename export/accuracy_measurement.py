"""Measuring an accuracy table (`isthmus.export.accuracy`) with the kernels that a bundle runs.

Everything is compared with the float32 model over windows of one text. The model is cut into groups of layers. One
group at a time gets the weights, or the KV cache, that an export gives it by default (rounded to nearest in symmetric
blocks of 32, or copied), and the hidden states that the float model has there; the other layers stay float; the
divergence of the final predictions is divided evenly among the group's layers. Embedding, head and codecs are measured
alike.

A packed weight is multiplied with int8 activations, and at 8 bits these are nearly all of the error. So the whole model
at 8 bits is measured once, as the table's ``activations``; a group's part at fewer bits is what it has more than at 8,
token by token, and no less than 0.

Codecs are fitted as an export fits them, to fewer tokens and to the float model's hidden states; their levels then code
the hidden states of the text that is measured on, which was not used for fitting.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .._version import __version__
from ..errors import AccuracyError
from ..quant.opsc import Recipe
from ..runtime.bundle import Architecture
from .accuracy import TABLE_BITS, AccuracyTable, CodecPoint, accuracy_path, write_whole
from .accuracy_codecs import CodecBench
from .calibration import CALIBRATION_TOKENS, WINDOW, self_written_windows
from .checkpoint import Checkpoint, open_checkpoint
from .families import family_of
from .families.common import check_tensors, weight_tensors
from .kv_scales import calibrate_kv
from .progress import Progress, silent
from .sources import resolve_model
from .validate import HEAD_ROWS, FloatModel, Hidden
from .weights import Weights, copies

TOKENS = 2048
LEAST_TOKENS = 256
GROUPS = 6
BLOCK_SIZE = 32  # export's default
SPLITS = 1 / 6, 1 / 3, 2 / 3, 5 / 6  # of the layers, where codecs are measured
CODEC_TOKENS = 16384  # that codecs are fitted to
KV_WINDOWS = 4  # that scales of KV caches are measured on
RUN = 64  # tokens that count as one sample: those near each other depend on each other

Divergences = NDArray[np.float64]  # [tokens]
Variant = list[Hidden]  # hidden states of every window
Result = dict[str, dict[str, Any]]


def measure_accuracy(
    model: str,
    *,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    cache: str | Path | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> AccuracyTable:
    """Measure a model's table and keep it in the cache folder, at `isthmus.export.accuracy.accuracy_path`.

    A killed measurement goes on at the part where it was.

    Args:
        model: a checkpoint folder, a ``.gguf`` file, a catalog name or a hub id.
        text: a UTF-8 file to measure on; by default what the model wrote itself.
        tokens: of it, at least 256.
        cache: the cache folder; by default the user's.
        offline: use models on this machine only.
        progress: called as the work goes on.

    Raises:
        ModelError: the checkpoint cannot be read or has no builder.
        AccuracyError: the text is too short or cannot be read, or the table cannot be written.
    """
    folder = Path(cache) if cache else None
    if tokens < LEAST_TOKENS:
        raise AccuracyError(f"tokens={tokens}: must be at least {LEAST_TOKENS}; fewer tell too little")
    checkpoint = open_checkpoint(resolve_model(model, cache=folder, offline=offline, progress=progress))
    family = family_of(checkpoint.config)
    arch: Architecture = family.architecture(checkpoint.config)
    if arch.layers < 2:
        raise AccuracyError(f"{checkpoint.name}: one layer cannot be split; there is nothing to plan")
    check_tensors(checkpoint, arch, (family.tensors(arch, layer) for layer in range(arch.layers)))
    windows, described = _windows(checkpoint, arch, text, tokens)
    written = self_written_windows(
        checkpoint,
        family,
        arch,
        tokens=CALIBRATION_TOKENS,
        window=min(WINDOW, arch.max_positions),
        cache=folder,
        progress=progress,
    )
    if not windows:
        count = -(-tokens // len(written[0]))
        if count > len(written) // 2:
            raise AccuracyError(
                f"tokens={tokens}: at most {len(written) // 2 * len(written[0])} of what the model wrote itself, the "
                "rest calibrates; choose fewer or give --text"
            )
        written, windows = written[:-count], written[-count:]
        windows[-1] = windows[-1][: tokens - (count - 1) * len(windows[-1])]
    hashes = checkpoint.file_hashes()
    path = accuracy_path(hashes, folder)
    with tempfile.TemporaryDirectory() as scratch:
        reference = FloatModel(checkpoint, family, arch, Path(scratch))
        measurement = _Measurement(reference, windows, written, progress)
        done = _Parts(path.with_suffix(".parts.json"), [hashes, windows, __version__, onnxruntime.__version__])
        results = {name: done.of(name, part) for name, part in measurement.parts().items()}
    table = _assemble(checkpoint.name, hashes, arch, sum(map(len, windows)), described, results)
    table.save(path)
    done.remove()
    return table


def _windows(
    checkpoint: Checkpoint, arch: Architecture, text: str | Path | None, tokens: int
) -> tuple[list[list[int]], str]:
    """Windows of the user's text, none without one, and what to call it."""
    if text is None:
        return [], "written by the model itself"
    try:
        content = Path(text).read_bytes().decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise AccuracyError(f"{text}: {error.strerror or error}; give a readable text file") from error
    except UnicodeDecodeError as error:
        raise AccuracyError(f"{text}: not UTF-8 at byte {error.start}; convert the text") from error
    ids = Tokenizer.from_str(checkpoint.tokenizer().tokenizer_json).encode(content, add_special_tokens=False).ids
    if len(ids) < tokens:
        raise AccuracyError(f"{text}: {len(ids)} tokens, {tokens} are needed; give a longer text or fewer --tokens")
    window = min(WINDOW, arch.max_positions)
    return [ids[first : min(first + window, tokens)] for first in range(0, tokens, window)], Path(text).name


class _Parts:
    """Results by part, kept in a file as they come, so that a killed measurement goes on."""

    def __init__(self, path: Path, subject: list[Any]) -> None:
        self._path = path
        self._key = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()
        self._results: dict[str, Result] = {}
        with suppress(OSError, ValueError, TypeError, KeyError):  # none, cut short or another's: measured again
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == self._key:
                self._results = dict(kept["results"])

    def of(self, name: str, measure: Callable[[], Result]) -> Result:
        """A part's result, measured if it is not there."""
        if name not in self._results:
            self._results[name] = measure()
            write_whole(self._path, json.dumps({"key": self._key, "results": self._results}))
        return self._results[name]

    def remove(self) -> None:
        """Delete the file: the table is written."""
        self._path.unlink(missing_ok=True)


class _Measurement:
    """Measures one model's parts.

    Args:
        reference: the float model.
        windows: token ids to measure on.
        written: token ids to calibrate on.
        progress: called as layers are done.
    """

    def __init__(
        self,
        reference: FloatModel,
        windows: Sequence[Sequence[int]],
        written: Sequence[Sequence[int]],
        progress: Progress,
    ) -> None:
        self._float, self._windows, self._written = reference, windows, written
        self._progress = progress
        self._layers = layers = reference.arch.layers
        cuts = np.unique(np.linspace(0, layers, min(GROUPS, layers) + 1).round().astype(int)).tolist()
        self.groups = [range(*span) for span in pairwise(cuts)]
        self.splits = sorted({min(max(round(share * layers), 1), layers - 1) for share in SPLITS})
        self._kept: dict[int, Variant] = {}
        self._kv: dict[int, FloatModel] = {}
        self._codecs: CodecBench | None = None

    def parts(self) -> dict[str, Callable[[], Result]]:
        """What is measured, by name."""
        parts: dict[str, Callable[[], Result]] = {"whole": self._whole, "embed": self._embed, "head": self._head}
        for group in self.groups:
            parts[f"group {group.start}"] = lambda group=group: self._group(group)  # type: ignore[misc]
        for split in self.splits:
            parts[f"split {split}"] = lambda split=split: self._split(split)  # type: ignore[misc]
        return parts

    def _whole(self) -> Result:
        start = self._states(0)
        variants = {f"weights {bits}": self._run(self._model(bits), range(self._layers), start) for bits in (8, 16)}
        return _summaries(self._divergences(variants, self._layers))

    def _embed(self) -> Result:
        variants = {str(bits): [self._model(bits).embed(ids) for ids in self._windows] for bits in TABLE_BITS[:-1]}
        return _summaries(self._divergences(variants, 0))

    def _head(self) -> Result:
        final = np.concatenate(self._states(self._layers))
        results = {}
        for bits in TABLE_BITS[:-1]:
            self._progress(f"head at {bits} bits", TABLE_BITS.index(bits), len(TABLE_BITS) - 1)
            results[str(bits)] = _divergences(self._float, self._model(bits), final, [final])[0]
        return _summaries(results)

    def _group(self, group: range) -> Result:
        start = self._states(group.start)
        variants = {f"weights {bits}": self._run(self._model(bits), group, start) for bits in (2, 4, 8)}
        variants |= {f"kv {bits}": self._run(self._kv_model(bits), group, start) for bits in (8, 4)}
        found = self._divergences(variants, group.stop)
        added = {f"weights {bits}": found[f"weights {bits}"] - found["weights 8"] for bits in (2, 4)}
        return _summaries(added | {name: found[name] for name in ("kv 8", "kv 4")})

    def _split(self, split: int) -> Result:
        if self._codecs is None:
            self._codecs = CodecBench(self._float, self._written[: CODEC_TOKENS // WINDOW], self.splits, self._progress)
        coded = self._codecs.code(split, self._states(split), self._windows)
        found = _summaries(
            self._divergences({name: each.received for name, each in coded.items() if not each.like}, split)
        )
        return {
            name: found[each.like or name] | {"bits": each.bits, "decode_bits": each.decode_bits}
            for name, each in coded.items()
        }

    def _states(self, layer: int) -> Variant:
        """The float model's hidden states of the windows at the input of a layer."""
        if not self._kept:
            wanted = {0, self._layers, *(group.start for group in self.groups), *self.splits}
            states = [self._float.embed(ids) for ids in self._windows]
            for index in range(self._layers + 1):
                self._progress("float reference", index, self._layers)
                if index in wanted:
                    self._kept[index] = states
                if index < self._layers:
                    states = self._float.layer_of_texts(index, states)
        return self._kept[layer]

    def _model(self, bits: int) -> FloatModel:
        """The model with weights of so many bits, as an export packs or copies them."""
        checkpoint, arch, layers = self._float.checkpoint, self._float.arch, self._layers
        recipe = _recipe(layers, bits)
        tensors = weight_tensors(arch, [self._float.family.tensors(arch, layer) for layer in range(layers)])
        recipe = replace(recipe, exceptions=copies(recipe, checkpoint, tensors))
        return replace(self._float, weights=Weights(checkpoint, recipe.precision))

    def _kv_model(self, bits: int) -> FloatModel:
        """The float model with a KV cache of so many bits."""
        if bits not in self._kv:
            arch = self._float.arch
            recipe = replace(_recipe(self._layers, 32), front_kv_bits=bits)
            longest = max(map(len, [*self._windows, *self._written]))
            scales = calibrate_kv(self._float, recipe, self._written[:KV_WINDOWS], longest, self._progress)
            assert len(scales) == arch.layers
            self._kv[bits] = replace(self._float, kv_scales=scales, kv_bits=bits)
        return self._kv[bits]

    def _run(self, model: FloatModel, layers: range, texts: Variant) -> Variant:
        for layer in layers:
            texts = model.layer_of_texts(layer, texts)
        return texts

    def _divergences(self, variants: dict[str, Variant], layer: int) -> dict[str, Divergences]:
        """KL of each variant's predictions, by name, once it went through the float model from ``layer`` on."""
        windows = len(self._windows)
        texts = [text for variant in variants.values() for text in variant]
        for index in range(layer, self._layers):
            self._progress(f"{len(variants)} variants from layer {layer} on", index - layer, self._layers - layer)
            texts = self._float.layer_of_texts(index, texts)
        finals = [np.concatenate(texts[first : first + windows]) for first in range(0, len(texts), windows)]
        expected = np.concatenate(self._states(self._layers))
        return dict(zip(variants, _divergences(self._float, self._float, expected, finals), strict=True))


def _recipe(layers: int, bits: int) -> Recipe:
    """The whole model at so many bits."""
    return Recipe(layers, layers, bits, bits, bits, bits, BLOCK_SIZE)


def _divergences(
    reference: FloatModel, head: FloatModel, expected: Hidden, finals: Sequence[Hidden]
) -> list[Divergences]:
    """KL of every token, in nats, between predictions from the reference's last hidden states and from others.

    Args:
        reference: gives the head of ``expected``.
        head: gives the head of ``finals``.
        expected: ``[tokens, d_model]``.
        finals: like it.
    """
    found = [np.empty(len(expected)) for _ in finals]
    with reference.head() as of_reference, head.head() as of_finals:
        for first in range(0, len(expected), HEAD_ROWS):
            rows = slice(first, first + HEAD_ROWS)
            logits = of_reference(expected[rows])
            shifted = logits - logits.max(axis=1, keepdims=True)
            weights = np.exp(shifted)
            total = weights.sum(axis=1, dtype=np.float64)
            for result, final in zip(found, finals, strict=True):
                other = of_finals(final[rows])
                other -= other.max(axis=1, keepdims=True)
                mean = np.einsum("tv,tv->t", weights, shifted - other, dtype=np.float64) / total
                # Rounding makes a KL of equal logits about 1e-8, of either sign.
                result[rows] = mean - np.log(total) + np.log(np.exp(other).sum(axis=1, dtype=np.float64))
    return found


def _summaries(found: dict[str, Divergences]) -> Result:
    """Mean and standard error of each, no mean below 0; the error is that of a mean over runs of tokens."""
    result = {}
    for name, values in found.items():
        runs = np.array([part.mean() for part in np.array_split(values, max(2, len(values) // RUN))])
        error = runs.std(ddof=1) / np.sqrt(len(runs))
        result[name] = {"kl": max(0.0, float(values.mean())), "kl_se": float(error)}
    return result


def _assemble(
    model: str, hashes: dict[str, str], arch: Architecture, tokens: int, text: str, results: dict[str, Result]
) -> AccuracyTable:
    """The table, from the parts' results."""
    layers = arch.layers
    groups = {int(name.split()[1]): result for name, result in results.items() if name.startswith("group")}
    ends = [*sorted(groups)[1:], layers]
    sizes = dict(
        zip(sorted(groups), (end - start for start, end in zip(sorted(groups), ends, strict=True)), strict=True)
    )

    def per_layer(name: str) -> tuple[float, ...]:
        return tuple(groups[start][name]["kl"] / size for start, size in sizes.items() for _ in range(size))

    def relative(name: str) -> float:
        total = sum(result[name]["kl"] for result in groups.values())
        error = float(np.sqrt(sum(result[name]["kl_se"] ** 2 for result in groups.values())))
        return min(1.0, error / total) if total else 0.0

    whole16 = results["whole"]["weights 16"]["kl"]
    nothing = (0.0,) * layers
    points = []
    for name, result in results.items():
        if name.startswith("split"):
            split = int(name.split()[1])
            points.append(CodecPoint(split, "raw32", None, 32.0, 32.0, 0.0, 0.0))
            for key, figures in result.items():
                codec, _, level = key.partition(" ")
                points.append(CodecPoint(split, codec, int(level) if level else None, **figures))
    return AccuracyTable(
        model=model,
        hashes=hashes,
        layers=layers,
        tokens=tokens,
        text=text,
        activations=results["whole"]["weights 8"]["kl"],
        weights={
            2: per_layer("weights 2"),
            4: per_layer("weights 4"),
            8: nothing,
            16: (whole16 / layers,) * layers,
            32: nothing,
        },
        weights_se={2: relative("weights 2"), 4: relative("weights 4"), 8: 0.0, 16: 0.0, 32: 0.0},
        embed={int(bits): figures["kl"] for bits, figures in results["embed"].items()} | {32: 0.0},
        head={int(bits): figures["kl"] for bits, figures in results["head"].items()} | {32: 0.0},
        kv={4: per_layer("kv 4"), 8: per_layer("kv 8"), 32: nothing},
        codecs=tuple(points),
    )
