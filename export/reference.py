"""The float model's predictions of a text's windows, computed once and kept on disk.

What is kept are the hidden states before the head, in float32: a row of logits is 85 times larger (at 49,152 tokens
and d_model 576), and the head gives the same logits again at a fraction of the model's cost. So nothing is rounded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..devices.backend import default_threads
from ..errors import ModelError, RequestError
from ..runtime.bundle import Source
from .catalog import CATALOG
from .checkpoint import Checkpoint, open_checkpoint
from .families import family_of
from .progress import Progress, silent
from .sources import resolve_model
from .validate import FloatModel

Hidden = NDArray[np.float32]

logger = logging.getLogger(__name__)


def find_source(source: Source, *, cache: Path | None = None, progress: Progress = silent) -> Path:
    """The checkpoint that a bundle was made from, if the catalog, the hub's cache or this machine has it.

    Args:
        source: the manifest's; what is found has the same hashes.
        cache: where downloaded models are kept, see `isthmus.export.catalog.cache_root`.
        progress: called while a catalog model is downloaded.

    Raises:
        ModelError: it is not found.
    """
    hashes = set(source.files.values())
    for name, entry in CATALOG.items():
        if entry.member_sha256 in hashes:
            return resolve_model(name, cache=cache, progress=progress)
    try:
        # Nothing but the hub's own cache: what lies there under the name may also be a later version.
        path = resolve_model(source.name, cache=cache, offline=True)
        if open_checkpoint(path).file_hashes() == source.files:
            return path
    except ModelError:
        pass
    raise ModelError(
        f"no reference: this bundle was made from {source.name} ({', '.join(source.files)}), which is not found here; "
        "give --reference, the checkpoint (folder, .gguf file, catalog name or hub id) or a bundle to compare with"
    )


class FloatReference:
    """The unsplit model in float32 over windows of token ids; satisfies `isthmus.runtime.evaluate.Reference`.

    A context manager; nothing is computed before the first logits are asked for. Layer by layer over all windows, so
    that weights are read once; a killed computation goes on at the layer where it was.

    Args:
        path: what `isthmus.export.checkpoint.open_checkpoint` takes.
        windows: token ids of texts of their own.
        folder: where results are kept.
        vocab_size: of the bundle that is compared.
        threads: of onnxruntime; by default the processors at hand, at most four.
        progress: called as layers are done.

    Raises:
        ModelError: the checkpoint cannot be read, has no builder or another vocabulary.
    """

    def __init__(
        self,
        path: Path,
        windows: Sequence[Sequence[int]],
        folder: Path,
        *,
        vocab_size: int,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> None:
        checkpoint = open_checkpoint(path)
        family = family_of(checkpoint.config)
        arch = family.architecture(checkpoint.config)
        if arch.vocab_size != vocab_size:
            raise ModelError(
                f"reference {path}: its vocabulary has {arch.vocab_size} tokens, the bundle's {vocab_size}; give the "
                "checkpoint that the bundle was made from, or one with the same tokenizer"
            )
        self.name = f"{checkpoint.name}, float32"
        self.key = _key(checkpoint, windows)
        self._windows = windows
        self._starts = np.cumsum([0, *map(len, windows)])
        self._folder = folder / self.key
        self._progress = progress
        self._open = ExitStack()
        scratch = self._open.enter_context(tempfile.TemporaryDirectory())
        self._model = FloatModel(checkpoint, family, arch, Path(scratch), threads or default_threads())
        self._head: Callable[[Hidden], Hidden] | None = None
        self._hidden: Hidden = np.empty((0, arch.d_model), np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def logits(self, window: int, rows: slice) -> Hidden:
        """Logits ``[tokens, vocab_size]`` of some rows of a window."""
        if self._head is None:
            self._hidden = self._compute()
            self._head = self._open.enter_context(self._model.head())
        return self._head(self._hidden[self._starts[window] : self._starts[window + 1]][rows])

    def _compute(self) -> Hidden:
        """Hidden states ``[all windows' tokens, d_model]`` after the last layer, from disk as far as they are there."""
        layers = self._model.arch.layers
        loaded = ((layer, kept) for layer in range(layers, 0, -1) if (kept := self._load(layer)) is not None)
        done, hidden = next(loaded, (0, np.empty((0, 0), np.float32)))
        if not done:
            hidden = self._model.embed([token for ids in self._windows for token in ids])
        for layer in range(done, layers):
            self._progress("reference layers", layer, layers)
            hidden = np.concatenate(self._model.layer_of_texts(layer, np.split(hidden, self._starts[1:-1])))
            self._save(layer + 1, hidden)
        self._progress("reference layers", layers, layers)
        return hidden

    def _load(self, layers: int) -> Hidden | None:
        path = self._path(layers)
        try:
            hidden: Hidden = np.load(path, mmap_mode="r")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); computing it again", path, error)
            return None
        return hidden if hidden.shape == (self._starts[-1], self._model.arch.d_model) else None

    def _save(self, layers: int, hidden: Hidden) -> None:
        path = self._path(layers)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.save(file, hidden)
            os.replace(temporary, path)
            self._path(layers - 1).unlink(missing_ok=True)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise RequestError(
                f"reference: cannot write to {self._folder} ({error}); make room or set ISTHMUS_CACHE"
            ) from error

    def _path(self, layers: int) -> Path:
        return self._folder / f"after-layer-{layers}.npy"


def _key(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> str:
    # onnxruntime: another version may sum in another order.
    subject = [checkpoint.file_hashes(), list(map(list, windows)), onnxruntime.__version__]
    return hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:32]
