"""A bundle as a model of lm-evaluation-harness, and the harness' tasks over it.

Needs `lm_eval` (``pip install 'isthmus[eval]'``); import this module only where a task is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from ..errors import RequestError
from .chain import HEAD_ROWS, Chain, CodecChoice, chunks
from .evaluate import Predictions, Progress, ids_key, mean_and_error
from .journal import Journal, versions
from .tasks import TASKS, Doc
from .text import Detokenizer, StopStrings

DEFAULT_NEW_TOKENS = 256  # of generate_until, as the harness' own models have it

Pair = tuple[list[int], list[int]]  # context and what follows it


class BundleLM(TemplateLM):  # type: ignore[misc]  # lm_eval is untyped
    """A bundle as the harness sees a model: both halves in this process, the codec between them.

    Requests that follow each other with the same context share its computation and its frames: the KV caches roll
    back to where they differ. That changes no bit (`isthmus.runtime.chain.Chain`).

    Attributes:
        sent_bytes: of all payloads so far.
        sent_tokens: whose hidden states they hold.
    """

    def __init__(
        self,
        chain: Chain,
        codec: CodecChoice | None = None,
        *,
        name: str | None = None,
        journal: Journal | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        """Wrap a chain.

        Args:
            chain: the bundle.
            codec: see `Chain.codecs`; None sends hidden states exactly and counts nothing.
            name: what progress and journal call it; by default the codec's.
            journal: of this evaluation; contexts that it holds are not computed again.
            progress: called as contexts are done.
        """
        super().__init__()
        self._name = name or str(codec or "exact")
        self.sent_bytes = self.sent_tokens = 0
        self._chain, self._codec = chain, codec
        self._journal, self._progress = journal, progress
        self._ids: list[int] = []  # the text that the chain holds
        self._final = np.empty((0, chain.manifest.architecture.d_model), np.float32)  # after its last layer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return min(self._chain.manifest.end_tokens)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or else the end token."""
        bos = self._chain.manifest.bos_token
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the special tokens that the checkpoint adds unless that is False."""
        return self._chain.tokenizer.encode(string, special_tokens=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log probability of each continuation after its context, and whether it is the greedy one."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log probability of each whole text, in windows of the bundle's context."""
        texts = [self._chain.tokenizer.encode(request.args[0], special_tokens=False) for request in requests]
        pairs: list[Pair] = []
        for ids in texts:
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._chain.manifest.max_length, 1)
            pairs += map(make_disjoint_window, windows)
        scores = iter(self._scores(pairs))
        totals = []
        for ids in texts:
            total, left = 0.0, len(ids)
            while left:
                left -= min(left, self._chain.manifest.max_length)
                total += next(scores)[0]
            totals.append(total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy text after each context, up to a stop string, an end token or the context's end.

        Raises:
            RequestError: sampling is asked for.
        """
        return [self._generate(*request.args) for request in self._told(requests)]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._scores([(context, following) for _, context, following in requests])

    def _scores(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        groups = [list(group) for _, group in groupby(pairs, key=lambda pair: pair[0])]
        scores: list[tuple[float, bool]] = []
        for group in self._told(groups):
            ids = [context + following for context, following in group]
            done = self._remembered(
                f"{[len(context) for context, _ in group]} {ids_key(ids)}", self._score_group, group
            )
            scores += [(score, bool(greedy)) for score, greedy in done]
        return scores

    def _score_group(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        self._forget()
        return [self._score(*pair) for pair in pairs]

    def _score(self, context: list[int], following: list[int]) -> tuple[float, bool]:
        # A text that is too long loses its beginning, as with the harness' own models.
        ids = (context + following)[-self._chain.manifest.max_length - 1 :]
        self._advance(ids[:-1])
        following = following[-len(ids) + 1 :]
        score, greedy, start = 0.0, True, len(ids) - 1 - len(following)
        for rows in chunks(len(following), HEAD_ROWS):
            predictions = Predictions(self._chain.logits(self._final[start:][rows]))
            targets = np.array(following[rows])
            score += float(predictions.log_probability(targets).sum())
            greedy &= bool((predictions.likeliest == targets).all())
        return score, greedy

    def _advance(self, ids: list[int]) -> None:
        """Have the chain hold these tokens, keeping what it holds of their beginning."""
        pairs = enumerate(zip(ids, self._ids, strict=False))
        kept = next((at for at, (ours, held) in pairs if ours != held), min(len(ids), len(self._ids)))
        new = ids[kept:]
        self._chain.truncate(kept)
        self._final = self._final[:kept]
        self._ids = ids[:kept]
        if new:
            hidden = self._chain.front(new)
            if self._codec:
                hidden, sent = self._codec.send(hidden, new)
                self.sent_bytes += sent
                self.sent_tokens += len(new)
            self._final = np.concatenate([self._final, self._chain.back(hidden)])
            self._ids = ids

    def _forget(self) -> None:
        self._ids = []

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature"):
            raise RequestError("generate_until: only greedy generation is evaluated; set do_sample to false")
        most = int(options.get("max_gen_toks") or DEFAULT_NEW_TOKENS)
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ids = self.tok_encode(context)[-max(1, self._chain.manifest.max_length - most) :]
        text: str = self._remembered(f"{most} {stops} {ids_key([ids])}", self._continue, ids, most, stops)
        return text

    def _continue(self, ids: list[int], most: int, stops: list[str]) -> str:
        self._forget()
        detokenizer, stopper, text = Detokenizer(self._chain.tokenizer), StopStrings(stops), ""
        for _ in range(min(most, self._chain.manifest.max_length - len(ids))):
            self._advance(ids)
            token = int(self._chain.logits(self._final[-1:])[0].argmax())
            if token in self._chain.manifest.end_tokens:
                break
            ids = [*ids, token]
            piece, stopped = stopper.push(detokenizer.push(token))
            text += piece
            if stopped:
                return text
        piece, stopped = stopper.push(detokenizer.finish())
        return text + piece + ("" if stopped else stopper.finish())

    def _told(self, items: list[Any]) -> Iterator[Any]:
        """The items, with progress told after each."""
        for index, item in enumerate(items):
            self._progress(self._name, index, len(items))
            yield item
        self._progress(self._name, len(items), len(items))

    def _remembered(self, name: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        """A result and what was sent for it, from the journal if it is there."""
        name = f"{self._name} {name}"
        entry = self._journal.get(name) if self._journal is not None else None
        if entry is not None:
            self.sent_bytes += entry["bytes"]
            self.sent_tokens += entry["tokens"]
            return entry["result"]
        sent_bytes, sent_tokens = self.sent_bytes, self.sent_tokens
        result = compute(*arguments)
        if self._journal is not None:
            sent = {"bytes": self.sent_bytes - sent_bytes, "tokens": self.sent_tokens - sent_tokens}
            self._journal.put(name, {"result": result} | sent)
        return result


@dataclass(frozen=True)
class TaskResult:
    """A task's figures for one codec and level.

    Attributes:
        codec: ``none`` for a device-only bundle, and then bits and bytes are None.
        accuracy: share of the items whose right answer is the likeliest.
        accuracy_norm: the same with log probabilities divided by the answers' bytes; None if the task has none.
        accuracy_se: like all ``_se``, a standard error over items; None for one item.
        reference_accuracy: of the bundle that was compared with, its hidden states sent exactly; None without one.
        accuracy_difference_se: of accuracy minus reference accuracy, item by item.
        bits_per_element: of a hidden state, over all frames: an item's context once, then each of its answers.
        harness: version of lm_eval.
    """

    task: str
    codec: str
    level: int | None
    split: int
    items: int
    accuracy: float
    accuracy_se: float | None
    accuracy_norm: float | None
    accuracy_norm_se: float | None
    reference_accuracy: float | None
    accuracy_difference: float | None
    accuracy_difference_se: float | None
    bits_per_element: float | None
    bytes_per_token: float | None
    tokens: int
    harness: str

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus eval --json`` prints."""
        return asdict(self)


def task_subject(
    chain: Chain, task: str, docs: Sequence[Doc], codecs: Sequence[CodecChoice], reference: Chain | None
) -> dict[str, Any]:
    """What determines the results of `evaluate_task`, for its journal."""
    return {
        "kind": "task",
        "task": task,
        "bundle": chain.manifest_sha256,
        "codecs": [str(choice) for choice in codecs],
        "reference": reference.manifest_sha256 if reference else None,
        "docs": ids_key([list(repr(doc).encode()) for doc in docs]),
        "harness": version("lm_eval"),
    } | versions()


def evaluate_task(
    chain: Chain,
    task: str,
    docs: Sequence[Doc],
    codecs: Sequence[CodecChoice],
    *,
    reference: Chain | None = None,
    journal: Journal | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[TaskResult]:
    """Run a task of the harness with each codec.

    Args:
        chain: the bundle.
        task: a key of `isthmus.runtime.tasks.TASKS`.
        docs: see `isthmus.runtime.tasks.read_docs`.
        codecs: see `Chain.codecs`.
        reference: a bundle to compare with, item by item.
        journal: of this evaluation (`task_subject`).
        progress: called as items are done.
    """
    expected = None
    if reference:
        compared = BundleLM(reference, name="reference", journal=journal, progress=progress)
        expected = item_scores(compared, task, docs)["acc"]
    results = []
    choices: list[CodecChoice | None] = [*codecs] or [None]  # a device-only bundle sends nothing
    for choice in choices:
        model = BundleLM(chain, choice, journal=journal, progress=progress)
        samples = item_scores(model, task, docs)
        accuracy, error = _mean(samples["acc"])
        norm, norm_error = _mean(samples["acc_norm"]) if "acc_norm" in samples else (None, None)
        difference, difference_error = (None, None) if expected is None else _mean(samples["acc"] - expected)
        bytes_ = model.sent_bytes / model.sent_tokens if choice else None
        results.append(
            TaskResult(
                task=task,
                codec=choice.name if choice else "none",
                level=choice.level if choice else None,
                split=chain.manifest.split,
                items=len(docs),
                accuracy=accuracy,
                accuracy_se=error,
                accuracy_norm=norm,
                accuracy_norm_se=norm_error,
                reference_accuracy=None if expected is None else float(expected.mean()),
                accuracy_difference=difference,
                accuracy_difference_se=difference_error,
                bits_per_element=None if bytes_ is None else 8 * bytes_ / chain.manifest.architecture.d_model,
                bytes_per_token=bytes_,
                tokens=model.sent_tokens,
                harness=version("lm_eval"),
            )
        )
    return results


def item_scores(model: TemplateLM, task: str, docs: Sequence[Doc]) -> dict[str, NDArray[np.float64]]:
    """Each item's ``acc`` and, where the task has it, ``acc_norm``, for any model of the harness.

    Args:
        model: a `BundleLM`, or one of the harness' own.
        task: a key of `isthmus.runtime.tasks.TASKS`.
        docs: see `isthmus.runtime.tasks.read_docs`.
    """
    with _quiet_harness():
        folder = Path(next(iter(lm_eval.tasks.__path__))) / TASKS[task].folder
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        # The harness' own definition of the task; only where the documents come from is ours.
        documents = {"items": datasets.Dataset.from_list(list(docs))}
        splits = {"training_split": None, "validation_split": "items", "test_split": None, "fewshot_split": None}
        definition = {"task": task, "process_docs": None, "custom_dataset": lambda **_: documents} | splits
        # A group's members may override parts of a definition; a task by itself may not.
        ((name, loaded),) = manager.load([{"group": "isthmus", "task": [definition]}])["tasks"].items()
        loaded.set_config(key="num_fewshot", value=0)
        report = evaluate(model, {name: loaded}, bootstrap_iters=0, log_samples=True)
    samples = sorted(report["samples"][name], key=lambda sample: sample["doc_id"])
    metrics = [metric for metric in ("acc", "acc_norm") if metric in samples[0]]
    return {metric: np.array([sample[metric] for sample in samples], float) for metric in metrics}


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Without the harness' advice to its own users."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _mean(values: NDArray[np.float64]) -> tuple[float, float | None]:
    """Mean over items and its standard error, as the harness has it."""
    return mean_and_error(values, np.ones(len(values)))
