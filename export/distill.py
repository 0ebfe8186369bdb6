"""Distillation: from an exported bundle to a draft in its device half.

Data first, then training; both leave what they did in a work folder, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import ExportError, ModelError
from ..runtime.bundle import Bundle, Manifest, open_bundle
from ..runtime.draft_bundle import DraftRecord
from .calibration import document_start, render_chat, self_written_windows
from .checkpoint import Checkpoint, TokenizerFiles, open_checkpoint
from .conversations import WINDOW, ChatFormat, Conversations, Writer
from .draft_costs import draft_d_ff
from .families import family_of
from .families.common import EMBEDDING, FINAL_NORM, HEAD
from .footprint import Footprint
from .progress import Progress, silent
from .prompts import default_prompts, read_prompts
from .reference import find_source
from .sources import resolve_model

if TYPE_CHECKING:
    from .draft_training import TrainingState

logger = logging.getLogger(__name__)

MINUTES = 60.0
GROUPS = 24  # of conversations, 32,768 tokens each, one of them held out
VOCABULARY = 4608
LEAST_GROUPS = 2
PASSAGES = 64
OWN_PROMPTS = 0.75  # of all prompts, those that the model writes; the others come from the templates
_EXIT_GROUP = 1 << 20  # no training has so many

_PROMPT, _ANSWER = "\u2021prompt\u2021", "\u2021answer\u2021"  # stand for themselves in a rendered template


def distill(
    out: str | Path,
    *,
    model: str | None = None,
    prompts: str | Path | None = None,
    minutes: float = MINUTES,
    groups: int = GROUPS,
    vocabulary: int = VOCABULARY,
    draft_layers: int = 1,
    exits: int | None = None,
    seed: int = 0,
    resume: bool = False,
    work: str | Path | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> DraftRecord:
    """Train a draft for a bundle and write it to ``out/device/draft``.

    Args:
        out: a bundle, or its device half, that is split.
        model: the checkpoint that it was exported from; by default what the manifest names.
        prompts: a file with a prompt a line; by default the model writes three of four itself, and the others are
            those that come with the package.
        minutes: of training, at most.
        groups: of conversations that the model writes first, 32,768 tokens each.
        vocabulary: ids that can be drafted, those that the model writes most.
        draft_layers: of the draft: one, which is as wide as its front allows.
        exits: layers after which a token may exit with the draft: the split's, where the draft reads.
        seed: of prompts, sampling and training.
        resume: go on with what is in the work folder.
        work: folder for conversations and training; by default ``out/distill``.
        cache: of downloaded models.
        offline: use models on this machine only.
        progress: called as the work goes on.

    Raises:
        ExportError: options out of range, the bundle has no split, another model was given, or too few prompts.
        BundleError: no bundle there.
        ModelError: the checkpoint cannot be read.
    """
    import torch  # noqa: F401  (not first after an hour of conversations)

    bundle = _split_bundle(out, exits)
    manifest = bundle.manifest
    if not 0 < minutes < 100_000:
        raise ExportError(f"minutes={minutes}: must be above 0")
    if draft_layers != 1:
        raise ExportError(f"draft_layers={draft_layers}: a draft has 1 layer; a longer front gets a wider one")
    if groups < LEAST_GROUPS:
        raise ExportError(f"groups={groups}: must be at least {LEAST_GROUPS}, one of them to measure on")
    if not 16 <= vocabulary <= manifest.architecture.vocab_size:
        raise ExportError(
            f"vocabulary={vocabulary}: must lie between 16 and the model's {manifest.architecture.vocab_size}"
        )
    cache_folder = Path(cache) if cache else None
    checkpoint = _checkpoint_of(bundle, model, cache_folder, offline, progress)
    family = family_of(checkpoint.config)
    folder = Path(work) if work else bundle.folder.parent / "distill"
    _begin(folder, resume, {"manifest": bundle.manifest_sha256, "prompts": str(prompts or ""), "seed": seed})

    given = None if prompts is None else read_prompts(Path(prompts))
    texts = _conversations(folder, checkpoint, family, manifest, given, groups, seed, cache_folder, progress)
    state, ids = _train(folder, checkpoint, family, manifest, texts, vocabulary, minutes, seed, progress)
    from .draft_segment import write_draft

    training = {
        "agreement": state.best_measurement.agreement,
        "overlap": state.best_measurement.overlap,
        "curve": [list(point) for point in state.curve],
        "groups": groups,
        "minutes": state.seconds / 60,
        "prompts": str(prompts or "shipped"),
        "seed": seed,
        "steps": state.step,
        "tokens": int(sum(text.written.sum() for text in texts[1:])),
    }
    return write_draft(bundle.folder, manifest, state.best, ids, training)


def exit_conversations(
    out: str | Path,
    *,
    model: str | None = None,
    prompts: str | Path | None = None,
    exits: int | None = None,
    seed: int = 0,
    work: str | Path | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Conversations:
    """Conversations to measure a draft's exits on: a group of its own, that no training sees.

    Args:
        out: see `distill`, as for the rest; what exits promise is for text like that of these prompts.
        model: see `distill`.
        prompts: see `distill`.
        exits: see `distill`.
        seed: see `distill`.
        work: see `distill`; they are kept there.
        cache: see `distill`.
        offline: see `distill`.
        progress: see `distill`.

    Raises:
        ExportError: see `distill`.
        BundleError: see `distill`.
        ModelError: see `distill`.
    """
    bundle = _split_bundle(out, exits)
    given = None if prompts is None else read_prompts(Path(prompts))
    cache_folder = Path(cache) if cache else None
    checkpoint = _checkpoint_of(bundle, model, cache_folder, offline, progress)
    folder = Path(work) if work else bundle.folder.parent / "distill"
    path = folder / "exits.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{folder}: {error.strerror or error}; choose another work folder") from error
    path.unlink(missing_ok=True)
    family = family_of(checkpoint.config)
    group = {_EXIT_GROUP: path}
    _write_groups(group, checkpoint, family, bundle.manifest, given, seed, cache_folder, progress)
    return Conversations.load(path)


def _split_bundle(out: str | Path, exits: int | None) -> Bundle:
    bundle = open_bundle(out, "device")
    split = bundle.manifest.split
    if not 0 < split < bundle.manifest.architecture.layers:
        raise ExportError(f"{out}: nothing to draft for, its split is {split}; export with one in between")
    if exits not in (None, split):
        raise ExportError(
            f"exits={exits}: tokens exit with the draft, which reads behind layer {split} of this bundle; export with "
            f"--split {exits}, or leave it out"
        )
    return bundle


def _checkpoint_of(
    bundle: Bundle, model: str | None, cache: Path | None, offline: bool, progress: Progress
) -> Checkpoint:
    """The checkpoint that a bundle was exported from."""
    source = bundle.manifest.source
    if model is None:
        try:
            path = find_source(source, cache=cache, progress=progress)
        except ModelError as error:
            raise ExportError(
                f"{bundle.folder} was made from {source.name}, which is not found here; give it with --model"
            ) from error
    else:
        path = resolve_model(model, cache=cache, offline=offline, progress=progress)
    checkpoint = open_checkpoint(path)
    if checkpoint.file_hashes() != source.files:
        raise ExportError(f"{checkpoint.name}: not the model that {bundle.folder} was exported from, {source.name}")
    return checkpoint


def chat_format(tokenizer: TokenizerFiles) -> ChatFormat:
    """How a model's conversations are laid out; prompts follow each other as documents if it has no chat template."""
    backend = Tokenizer.from_str(tokenizer.tokenizer_json)

    def ids(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    user = {"role": "user", "content": _PROMPT}
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        first = render_chat(tokenizer, [user], add_generation_prompt=True)
        both = render_chat(tokenizer, [user, answer, user], add_generation_prompt=True)
        opening, to_answer = first.split(_PROMPT)
        to_prompt = both.split(_ANSWER)[1].split(_PROMPT)[0]
    # A template is a program: what it does to values of the wrong type ends in Python's own errors.
    except (TemplateError, TypeError, ValueError, ArithmeticError, IndexError) as error:
        logger.warning("no chat template that can be used (%s): the model goes on with prompts as plain text", error)
        start = [document_start(tokenizer)]
        return ChatFormat(start, [], start, tokenizer.end_tokens)
    return ChatFormat(ids(opening), ids(to_answer), ids(to_prompt), tokenizer.end_tokens)


def _begin(folder: Path, resume: bool, settings: dict[str, Any]) -> None:
    """Make the work folder, or see that what is in it is of the same run."""
    path = folder / "settings.json"
    if path.exists():
        if not resume:
            raise ExportError(f"{folder} holds an earlier run; go on with it (--resume), or remove it")
        if json.loads(path.read_text(encoding="utf-8")) != settings:
            raise ExportError(f"{folder} holds a run with other bundle, prompts or seed; remove it")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{folder}: {error.strerror or error}; choose another work folder") from error


def _conversations(
    folder: Path,
    checkpoint: Checkpoint,
    family: ModuleType,
    manifest: Manifest,
    given: Sequence[str] | None,
    groups: int,
    seed: int,
    cache: Path | None,
    progress: Progress,
) -> list[Conversations]:
    """Groups of conversations, those that are there already read and the others written."""
    paths = {group: folder / f"conversations-{group:03d}.npz" for group in range(groups)}
    _write_groups(paths, checkpoint, family, manifest, given, seed, cache, progress)
    return [Conversations.load(path) for path in paths.values()]


def _write_groups(
    paths: Mapping[int, Path],
    checkpoint: Checkpoint,
    family: ModuleType,
    manifest: Manifest,
    given: Sequence[str] | None,
    seed: int,
    cache: Path | None,
    progress: Progress,
) -> None:
    """Write those groups of conversations that are not there; a group's number makes it another one."""
    if all(path.exists() for path in paths.values()):
        return
    tokenizer = checkpoint.tokenizer()
    backend, chat = Tokenizer.from_str(tokenizer.tokenizer_json), chat_format(tokenizer)
    windows = self_written_windows(checkpoint, family, manifest.architecture, cache=cache, progress=progress)
    with tempfile.TemporaryDirectory() as graphs:
        writer = Writer(Path(graphs), checkpoint, family, manifest)
        for number, (group, path) in enumerate(paths.items()):
            if path.exists():
                continue
            rng = np.random.default_rng([seed, group])
            texts = given_prompts(given, rng) if given else default_prompts(_passages(windows, backend, rng), rng)
            encoded = (backend.encode(text, add_special_tokens=False).ids for text in texts)
            fitting = (ids for ids in encoded if len(ids) < WINDOW // 2)

            def told(what: str, done: int, total: int, number: int = number) -> None:
                progress(what, number * total + done, len(paths) * total)

            writer.write(chat, fitting if given else with_own_prompts(fitting, rng), rng, told).save(path)


def given_prompts(prompts: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """Prompts without end, each time around in another order."""
    while True:
        for index in rng.permutation(len(prompts)):
            yield prompts[index]


def with_own_prompts(
    prompts: Iterator[Sequence[int]], rng: np.random.Generator, share: float = OWN_PROMPTS
) -> Iterator[Sequence[int] | None]:
    """The same with None, for a prompt that the model writes, in a ``share`` of places."""
    for prompt in prompts:
        while rng.random() < share:
            yield None
        yield prompt


def _passages(windows: Sequence[Sequence[int]], backend: Tokenizer, rng: np.random.Generator) -> list[str]:
    """Pieces of text that the model wrote itself, for prompts that ask about one."""
    passages = []
    for index in rng.integers(len(windows), size=PASSAGES):
        window = windows[index]
        first = int(rng.integers(1, max(2, len(window) - 200)))
        passages.append(backend.decode(list(window[first : first + int(rng.integers(60, 160))])).strip())
    return [passage for passage in passages if passage]


def _train(
    folder: Path,
    checkpoint: Checkpoint,
    family: ModuleType,
    manifest: Manifest,
    texts: Sequence[Conversations],
    vocabulary: int,
    minutes: float,
    seed: int,
    progress: Progress,
) -> tuple[TrainingState, NDArray[np.int64]]:
    """Train on all groups but the first, which is measured on; the state, and the draft's ids."""
    import torch

    from ..devices.backend import default_threads
    from .draft_model import DraftModel, DraftShape, initial_weights, load_weights
    from .draft_training import Teacher, train

    arch = manifest.architecture
    held_out, *texts = texts
    ids = most_used(texts, arch.vocab_size, vocabulary)
    norm = checkpoint.tensor(FINAL_NORM)
    head = checkpoint.tensor(EMBEDDING if arch.tied_embeddings else HEAD)[ids]
    shape = DraftShape(arch, draft_d_ff(Footprint(arch), manifest.split, len(ids)), len(ids))
    down = checkpoint.tensor(family.tensors(arch, arch.layers - 1).down)
    torch.set_num_threads(default_threads())
    torch.manual_seed(seed)
    model = DraftModel(shape, WINDOW)
    use = np.linalg.norm(down, axis=0)
    load_weights(model, initial_weights(checkpoint, family, shape, ids, square_map(texts), use))
    teacher = Teacher(norm, arch.norm_epsilon, head, ids)
    state = train(
        model, teacher, texts, held_out, minutes=minutes, seed=seed, keep=folder / "training.pt", progress=progress
    )
    return state, ids


def most_used(texts: Sequence[Conversations], vocab_size: int, count: int) -> NDArray[np.int64]:
    """The ids that the model chose most often, rising; the lowest of those that it never did, if there are too few."""
    counts = np.zeros(vocab_size, np.int64)
    for text in texts:
        np.add.at(counts, text.ids[text.written], 1)
    return np.sort(np.argsort(-counts, kind="stable")[:count])


def square_map(texts: Sequence[Conversations], damping: float = 1e-3) -> NDArray[np.float32]:
    """The linear map ``[d_model, d_model]`` from hidden states at the split to final features, by ridge regression."""
    sample = texts[:3]
    # The first positions are attention sinks, larger than all others together.
    inputs = np.concatenate([text.hidden[:, 4::7].reshape(-1, text.hidden.shape[-1]) for text in sample]).astype(float)
    outputs = np.concatenate([text.final[:, 4::7].reshape(-1, text.final.shape[-1]) for text in sample]).astype(float)
    moments = inputs.T @ inputs
    moments += damping * np.trace(moments) / len(moments) * np.eye(len(moments))
    solved: NDArray[np.float32] = np.linalg.solve(moments, inputs.T @ outputs).T.astype(np.float32)
    return solved
