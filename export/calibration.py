"""Calibration text: windows of token ids like those that the model will read.

The user's own file, or text that the model writes itself, so that an export needs no data set. A model's own samples
follow the distribution that it learned: quantizers calibrated on them do as well as on real text or better (LLM-QAT,
arXiv 2305.17888, section 2; Williams et al., arXiv 2410.17170). Ours: samples at temperature 1 from whole documents'
starts and from a user's turn in alternation, and no end token stops a window, as documents follow each other in
training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from jinja2 import TemplateError
from jinja2.ext import loopcontrols as LoopControls  # noqa: N812
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import ExportError
from ..runtime.bundle import Architecture
from .batched import BatchedHead, BatchedLayers
from .catalog import cache_root
from .checkpoint import Checkpoint, TokenizerFiles
from .families.common import EMBEDDING
from .progress import Progress, silent
from .weights import Weights

CALIBRATION_TOKENS = 65536
WINDOW = 512
LEAST_WINDOWS = 8
BITS, BLOCK_SIZE = 8, 32  # of the weights that write text
CACHE_BYTES = 1 << 30  # of KV cache for the sequences that advance together
MAX_SEQUENCES = 64
FORMAT = 1  # of the cached windows: a change of how they are written must change it

# Begin a turn, not a document, though checkpoints declare them as BOS.
_TURN_MARKERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|assistant|>", "<|system|>")
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
_USER_WORDS = "the user's own words"

# By the SHA-256 of the checkpoint's files.
_SHIPPED = {
    frozenset({"b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}): "smollm2-135m-instruct.npz",
}

logger = logging.getLogger(__name__)


def calibration_windows(
    checkpoint: Checkpoint,
    family: ModuleType,
    arch: Architecture,
    source: Path | None,
    *,
    tokens: int = CALIBRATION_TOKENS,
    window: int = WINDOW,
    cache: Path | None = None,
    progress: Progress = silent,
) -> list[list[int]]:
    """Windows of ``window`` token ids each, from the file ``source`` or, without, the model's own.

    Args:
        checkpoint: the source model.
        family: its builder.
        arch: its numbers.
        source: a UTF-8 text, or None.
        tokens: how many in all, at most.
        window: at most the positions that the bundle will have.
        cache: folder of downloads and windows, see `isthmus.export.catalog.cache_root`.
        progress: called as the model writes.

    Raises:
        ExportError: too few tokens asked for, or the file does not serve.
    """
    if source is None:
        return self_written_windows(
            checkpoint, family, arch, tokens=tokens, window=window, cache=cache, progress=progress
        )
    return file_windows(source, checkpoint.tokenizer().tokenizer_json, tokens=tokens, window=window)


def file_windows(path: Path, tokenizer_json: str, *, tokens: int, window: int) -> list[list[int]]:
    """Consecutive windows of a UTF-8 text, at most ``tokens`` ids in all; line ends become LF.

    Raises:
        ExportError: the file cannot be read or decoded, or gives fewer than eight windows.
    """
    check_tokens(tokens, window)
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror or error}; give a readable text file to calibrate on") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: not UTF-8 at byte {error.start}; convert the calibration text") from error
    ids = Tokenizer.from_str(tokenizer_json).encode(text).ids
    if len(ids) < LEAST_WINDOWS * window:
        raise ExportError(
            f"{path}: {len(ids)} tokens where calibration needs at least {LEAST_WINDOWS * window}, {LEAST_WINDOWS} "
            f"windows of {window}; give a longer text, or none and the model writes its own"
        )
    count = min(len(ids), tokens) // window
    return [ids[first : first + window] for first in range(0, count * window, window)]


def self_written_windows(
    checkpoint: Checkpoint,
    family: ModuleType,
    arch: Architecture,
    *,
    tokens: int = CALIBRATION_TOKENS,
    window: int = WINDOW,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = silent,
) -> list[list[int]]:
    """``tokens // window`` windows that the model samples itself, the same for a seed; written once per model.

    Even windows begin with the document start, odd ones with the chat template's opening of a user's turn if there
    is one: the model then writes both sides of a chat. The start counts as part of a window. What the default model
    wrote, by this function with ``tokens=65536``, comes with the package.

    Args:
        checkpoint: the source model.
        family: its builder.
        arch: its numbers.
        tokens: how many in all, at most.
        window: ids of each.
        seed: of the sampling.
        cache: folder of downloads and windows, see `isthmus.export.catalog.cache_root`.
        progress: called as tokens are written.

    Raises:
        ExportError: fewer tokens than eight windows.
    """
    check_tokens(tokens, window)
    count = tokens // window
    shipped = _shipped(checkpoint) if seed == 0 else None
    if shipped is not None and shipped.shape[1] == window and count <= len(shipped):
        return shipped[:count].tolist()
    settings = [FORMAT, checkpoint.file_hashes(), count, window, seed]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = cache_root(cache) / "calibration" / f"{key}.npy"
    ids = _read_cached(path, (count, window), arch.vocab_size)
    if ids is None:
        starts = window_starts(checkpoint.tokenizer(), arch.vocab_size, window)
        ids = _write_text(
            checkpoint, family, arch, [starts[index % len(starts)] for index in range(count)], window, seed, progress
        )
        _keep(path, ids)
    windows: list[list[int]] = ids.tolist()
    return windows


def document_start(tokenizer: TokenizerFiles) -> int:
    """The token that documents begin with in training.

    The BOS token, unless the checkpoint has none or declares a turn marker as such: then a token that parts documents,
    else the turn marker, else a token that ends a generation.
    """
    backend = Tokenizer.from_str(tokenizer.tokenizer_json)
    bos = tokenizer.bos_token
    if bos is not None and backend.id_to_token(bos) not in _TURN_MARKERS:
        return bos
    ids = [*map(backend.token_to_id, _DOCUMENT_ENDS), bos, *tokenizer.end_tokens, 0]
    return next(token for token in ids if token is not None)


def window_starts(tokenizer: TokenizerFiles, vocab_size: int, window: int) -> list[list[int]]:
    """What windows begin with: the document start, and a user's turn if a chat template opens one in half a window."""
    starts = [[document_start(tokenizer)]]
    opening = chat_opening(tokenizer)
    if opening:
        ids = Tokenizer.from_str(tokenizer.tokenizer_json).encode(opening, add_special_tokens=False).ids
        if 0 < len(ids) <= window // 2 and max(ids) < vocab_size:
            starts.append(ids)
    return starts


def chat_opening(tokenizer: TokenizerFiles) -> str | None:
    """What the chat template writes before a user's first words; None without a template that can be rendered.

    Not rendered as a runtime does: a template may name the day, and windows must be the same on every day.
    """
    if not tokenizer.chat_template:
        return None
    try:
        text = render_chat(tokenizer, [{"role": "user", "content": _USER_WORDS}])
    # A template is a program: what it does to values of the wrong type ends in Python's own errors.
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        logger.warning("the chat template opens no user's turn (%s); calibrating on plain text only", error)
        return None
    opening, words, _ = text.partition(_USER_WORDS)
    return opening if words else None


def render_chat(
    tokenizer: TokenizerFiles, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """Messages in the chat template's form, the same on every day.

    Raises:
        TemplateError: there is no template, or it does not take them; Python's own errors if it is badly written.
    """
    if not tokenizer.chat_template:
        raise TemplateError("the model has no chat template")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda _format: "26 Jul 2024"  # the day that Llama 3's templates fall back on
    source = re.sub(r"{%-? *(end)?generation *-?%}", "", tokenizer.chat_template)  # only marks what is trained on
    return environment.from_string(source).render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def check_tokens(tokens: int, window: int) -> None:
    """Raise `ExportError` if so many tokens are fewer than the least number of windows."""
    if tokens < LEAST_WINDOWS * window:
        raise ExportError(
            f"calibration_tokens={tokens}: must be at least {LEAST_WINDOWS * window}, {LEAST_WINDOWS} windows of "
            f"{window}; 0 leaves calibration out"
        )


def _write_text(
    checkpoint: Checkpoint,
    family: ModuleType,
    arch: Architecture,
    starts: Sequence[Sequence[int]],
    window: int,
    seed: int,
    progress: Progress,
) -> NDArray[np.int32]:
    """Windows ``[len(starts), window]`` that begin with ``starts``, the rest sampled."""
    rng = np.random.default_rng(seed)
    done, total = 0, len(starts) * window
    progress("writing calibration text", done, total)
    with tempfile.TemporaryDirectory() as name:
        folder, layers = Path(name), range(arch.layers)
        weights = Weights.uniform(checkpoint, BITS, BLOCK_SIZE)
        stack = BatchedLayers(folder, weights, family, arch, layers, capacity=window)
        head = BatchedHead(folder, weights, arch)
        table = checkpoint.tensor(EMBEDDING)
        at_once = min(MAX_SEQUENCES, max(1, CACHE_BYTES // stack.sequence_bytes))
        ids = np.zeros((len(starts), window), np.int32)
        for row, start in enumerate(starts):
            ids[row, : len(start)] = start
        # Views: what is written into a group is written into the whole.
        for group in np.array_split(np.arange(len(starts)), -(-len(starts) // at_once)):
            text = ids[group[0] : group[-1] + 1]
            started = np.array([len(starts[row]) for row in group])
            session = stack.session(len(group))
            for position in range(window - 1):
                hidden = session.step(table[text[:, position]])
                rows = np.flatnonzero(started <= position + 1)
                if rows.size:
                    text[rows, position + 1] = _sample(head.logits(hidden[rows]), rng)
                progress("writing calibration text", done + len(group) * (position + 2), total)
            done += text.size
    return ids


def _sample(logits: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """A token of each row ``[rows, vocab_size]`` at temperature 1: the largest sum of a logit and Gumbel noise.

    Gumbel noise is ``-log E`` of an exponential ``E``, and that is ``-log(1 - u)`` of a uniform ``u``. A float32 ``u``
    is 0 once in 2^24 draws, too often for vocabularies of a hundred thousand: its ``E`` is the mean of that step.
    """
    noise = rng.random(logits.shape, np.float32)
    np.subtract(1, noise, out=noise)
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.maximum(noise, np.float32(2**-25), out=noise)
    np.log(noise, out=noise)
    np.subtract(logits, noise, out=noise)
    return noise.argmax(axis=1)


def _shipped(checkpoint: Checkpoint) -> NDArray[np.uint16] | None:
    """Windows ``[count, window]`` that come with the package, if the checkpoint wrote some."""
    name = _SHIPPED.get(frozenset(checkpoint.file_hashes().values()))
    if name is None:
        return None
    with np.load(Path(__file__).parent / "self-written" / name, allow_pickle=False) as file:
        windows: NDArray[np.uint16] = file["windows"]
        return windows


def _read_cached(path: Path, shape: tuple[int, int], vocab_size: int) -> NDArray[np.int32] | None:
    """Windows that were kept, or None if there are none or the file is not what it should be."""
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s cannot be read (%s); writing the calibration text again", path, error)
        return None
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.shape != shape:
        logger.warning("%s holds no windows of this form; writing the calibration text again", path)
        return None
    if ids.min() < 0 or ids.max() >= vocab_size:
        logger.warning("%s holds ids outside the vocabulary; writing the calibration text again", path)
        return None
    return ids


def _keep(path: Path, ids: NDArray[np.int32]) -> None:
    """Write the windows in one step; a cache that cannot be written to costs time later and nothing else."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, ids, allow_pickle=False)
        partial.replace(path)
    except OSError as error:
        logger.warning("%s: the calibration text is not kept (%s); the next export writes it again", path, error)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
