"""How well a bundle predicts a text, beside a reference, and what its codec sends for it.

The text is cut into consecutive windows; each is a text of its own, so that its first token is not predicted.
A window's tokens depend on each other: standard errors are those of means over windows (a ratio estimator, with
``windows - 1`` degrees of freedom), and unknown for a single one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, RequestError
from .bundle import MANIFEST_NAME, Manifest, open_bundle
from .chain import HEAD_ROWS, Chain, CodecChoice, Hidden, chunks
from .journal import Journal, versions
from .text import Tokenizer

DEFAULT_WINDOW = 512

Progress = Callable[[str, int, int], None]  # what, steps done, steps in all


class Reference(Protocol):
    """A model whose predictions of the same windows a bundle's are compared with.

    Attributes:
        name: what to call it.
        key: hash of what determines its logits.
    """

    name: str
    key: str

    def logits(self, window: int, rows: slice) -> Hidden:
        """Logits ``[tokens, vocab_size]`` of some rows of a window."""
        ...


class BundleReference:
    """Another bundle, with its hidden states sent exactly."""

    def __init__(self, chain: Chain, windows: Sequence[Sequence[int]]) -> None:
        self.name = f"{chain.manifest.source.name}, split {chain.manifest.split}"
        self.key = f"bundle {chain.manifest_sha256}"
        self._chain, self._windows = chain, windows
        self._window = -1
        self._hidden: Hidden = np.empty((0, 0), np.float32)

    def logits(self, window: int, rows: slice) -> Hidden:
        """Logits of some rows of a window; a window is computed once if its rows are asked for one after the other."""
        if window != self._window:
            self._chain.truncate(0)
            self._hidden, self._window = self._chain.back(self._chain.front(self._windows[window])), window
        return self._chain.logits(self._hidden[rows])


def open_whole(folder: str | Path, compared: Manifest, *, threads: int | None = None) -> Chain:
    """Open a bundle to compare with: ``OUT``, or ``OUT/device`` with ``OUT/server`` beside it.

    Args:
        folder: of the bundle.
        compared: the manifest of the bundle that is measured.
        threads: of onnxruntime; by default the processors at hand, at most four.

    Raises:
        BundleError: no intact bundle there, or one with another vocabulary.
    """
    root = Path(folder).parent if (Path(folder) / MANIFEST_NAME).is_file() else Path(folder)
    device = open_bundle(root, "device")
    vocabulary = device.manifest.architecture.vocab_size
    if vocabulary != compared.architecture.vocab_size:
        raise BundleError(
            f"reference {folder}: its vocabulary has {vocabulary} tokens, the bundle's "
            f"{compared.architecture.vocab_size}; compare bundles of one model"
        )
    return Chain(device, None if device.manifest.device_only else open_bundle(root, "server"), threads=threads)


def is_bundle(path: str | Path) -> bool:
    """Whether a folder is a bundle or its device half."""
    return any((Path(path) / half / MANIFEST_NAME).is_file() for half in (".", "device"))


@dataclass(frozen=True)
class TextResult:
    """A text's figures for one codec and level. KL is in nats; bits and bytes count every byte of the payloads.

    Attributes:
        codec: ``none`` for a device-only bundle, and then bits and bytes are None.
        tokens: of the text, in all windows; but for the first of each, all are predicted.
        kl: mean over tokens of KL(reference, bundle).
        top1: share of the tokens after which both find the same token likeliest.
        bits_per_element: of a hidden state, in frames of a prefill (`PREFILL_CHUNK` tokens).
        bytes_per_token: in the same frames.
        decode_bits_per_element: in frames of one token, as generation sends them.
        perplexity_se: like all ``_se``, a standard error over windows; None if there is one window only.
    """

    codec: str
    level: int | None
    split: int
    tokens: int
    windows: int
    window: int
    perplexity: float
    perplexity_se: float | None
    reference: str
    reference_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_se: float | None
    kl: float
    kl_se: float | None
    top1: float
    top1_se: float | None
    bits_per_element: float | None
    bytes_per_token: float | None
    decode_bits_per_element: float | None
    decode_bytes_per_token: float | None

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus eval --json`` prints."""
        return asdict(self)


def read_text(path: str | Path) -> tuple[str, int]:
    """A text file, and how many CRLF line ends in it became LF.

    Raises:
        RequestError: it cannot be read or is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"text {path}: {error.strerror or error}; give a readable file") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"text {path}: not UTF-8 ({error}); convert it") from error
    return text.replace("\r\n", "\n"), text.count("\r\n")


def text_windows(
    tokenizer: Tokenizer, text: str, *, window: int = DEFAULT_WINDOW, tokens: int | None = None
) -> list[list[int]]:
    """Cut a text into consecutive windows of token ids; a last one of a single token is left out.

    If the checkpoint wants a token in front of every text (BOS), every window begins with it, and it counts.

    Args:
        tokenizer: the bundle's.
        text: at least two tokens.
        window: tokens in each; the last may have fewer.
        tokens: in all windows together; by default the whole text.

    Raises:
        RequestError: the text is too short, or a number is out of range.
    """
    if window < 2:
        raise RequestError(f"window={window}: must be at least 2, a window's first token is not predicted")
    if tokens is not None and tokens < 2:
        raise RequestError(f"tokens={tokens}: must be at least 2, a window's first token is not predicted")
    prefix, body = tokenizer.encode(""), tokenizer.encode(text, special_tokens=False)
    step = window - len(prefix)
    if step < 1:
        raise RequestError(f"window={window}: the tokenizer begins every text with {len(prefix)} tokens; choose more")
    windows = [prefix + body[first : first + step] for first in range(0, len(body), step)]
    available = sum(map(len, windows))
    if available < (tokens or 2):
        raise RequestError(
            f"the text has {available} tokens, {tokens or 2} are needed; give a longer text"
            + (" or fewer tokens" if tokens else "")
        )
    left, kept = available if tokens is None else tokens, []
    for ids in windows:
        ids = ids[:left]
        left -= len(ids)
        if len(ids) > 1:
            kept.append(ids)
    return kept


def text_subject(
    chain: Chain, windows: Sequence[Sequence[int]], codecs: Sequence[CodecChoice], reference: Reference
) -> dict[str, Any]:
    """What determines the results of `evaluate_text`, for its journal."""
    return {
        "kind": "text",
        "bundle": chain.manifest_sha256,
        "codecs": [str(choice) for choice in codecs],
        "reference": reference.key,
        "windows": ids_key(windows),
    } | versions()


def evaluate_text(
    chain: Chain,
    windows: Sequence[Sequence[int]],
    codecs: Sequence[CodecChoice],
    reference: Reference,
    *,
    journal: Journal | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[TextResult]:
    """Score windows of token ids with each codec; the front and the reference run once for all of them.

    Args:
        chain: the bundle.
        windows: see `text_windows`.
        codecs: see `Chain.codecs`.
        reference: made for the same windows.
        journal: of this evaluation (`text_subject`); windows that it holds are not computed again.
        progress: called as windows are done.

    Raises:
        RequestError: a window is longer than the context.
        CodecError: hidden states are not finite.
    """
    longest, limit = max(map(len, windows)), chain.manifest.max_length
    if longest > limit:
        raise RequestError(
            f"windows of {longest} tokens: this bundle's context holds {limit}; choose shorter ones or export with a "
            "larger --max-length"
        )
    measured: list[list[dict[str, float]]] = []
    for index, ids in enumerate(windows):
        progress("windows", index, len(windows))
        sums = journal.get(f"window {index}") if journal else None
        if sums is None:
            sums = _score(chain, list(ids), codecs, reference, index)
            if journal:
                journal.put(f"window {index}", sums)
        measured.append(sums)
    progress("windows", len(windows), len(windows))
    return [
        _summary(chain, choice, reference.name, longest, [len(ids) for ids in windows], [w[at] for w in measured])
        for at, choice in enumerate(_or_none(codecs))
    ]


def _or_none(codecs: Sequence[CodecChoice]) -> list[CodecChoice | None]:
    """The codecs, or one that is none: a device-only bundle sends nothing."""
    return [*codecs] or [None]


def _score(
    chain: Chain, ids: list[int], codecs: Sequence[CodecChoice], reference: Reference, index: int
) -> list[dict[str, float]]:
    """Sums over one window, for each codec."""
    chain.truncate(0)
    hidden = chain.front(ids)
    sums, finals = [], []
    for choice in _or_none(codecs):
        chain.truncate_back()
        received, sent = choice.send(hidden, ids) if choice else (hidden, 0)
        single = choice.single_bytes(hidden, ids) if choice else 0
        sums.append({"kl": 0.0, "agreeing": 0.0, "loss": 0.0, "reference": 0.0, "bytes": sent, "single_bytes": single})
        finals.append(chain.back(received))
    targets = np.array([*ids[1:], -1])  # nothing is known to follow the last
    for rows in chunks(len(ids), HEAD_ROWS):
        expected = Predictions(reference.logits(index, rows))
        for total, final in zip(sums, finals, strict=True):
            actual = Predictions(chain.logits(final[rows]))
            total["kl"] += float(expected.kl(actual).sum())
            total["agreeing"] += int((expected.likeliest == actual.likeliest).sum())
            predicted = targets[rows][targets[rows] >= 0]
            total["loss"] -= float(actual.log_probability(predicted).sum())
            total["reference"] -= float(expected.log_probability(predicted).sum())
    return sums


class Predictions:
    """Distributions over the vocabulary, from logits ``[tokens, vocab_size]``.

    Elements are float32, sums over the vocabulary float64: a KL of equal logits is 0, others err by about 1e-7.
    """

    def __init__(self, logits: Hidden) -> None:
        self.likeliest = logits.argmax(1)
        self._shifted = logits - logits[np.arange(len(logits)), self.likeliest][:, None]
        self._weights = np.exp(self._shifted)
        self._totals = self._weights.sum(1, dtype=np.float64)

    def log_probability(self, targets: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Log probabilities of one token in each of the first rows."""
        rows = np.arange(len(targets))
        return self._shifted[rows, targets] - np.log(self._totals[rows])

    def kl(self, other: Predictions) -> NDArray[np.float64]:
        """KL(this, other) of each row, in nats."""
        differences = self._shifted - other._shifted
        differences *= self._weights
        mean = differences.sum(1, dtype=np.float64) / self._totals
        return mean - np.log(self._totals) + np.log(other._totals)


def _summary(
    chain: Chain,
    choice: CodecChoice | None,
    reference: str,
    longest: int,
    lengths: list[int],
    measured: list[dict[str, float]],
) -> TextResult:
    tokens = np.array(lengths, float)
    loss, reference_loss, kl, agreeing = (
        np.array([sums[name] for sums in measured], float) for name in ("loss", "reference", "kl", "agreeing")
    )
    mean_loss, loss_se = mean_and_error(loss, tokens - 1)
    mean_excess, excess_se = mean_and_error(loss - reference_loss, tokens - 1)
    mean_kl, kl_se = mean_and_error(kl, tokens)
    top1, top1_se = mean_and_error(agreeing, tokens)
    # The standard error of exp(x) is that of x, times exp(x).
    perplexity, ratio = float(np.exp(mean_loss)), float(np.exp(mean_excess))
    bytes_ = [sum(sums[name] for sums in measured) / tokens.sum() for name in ("bytes", "single_bytes")]
    prefill, single = bytes_ if choice else (None, None)
    d_model = chain.manifest.architecture.d_model
    return TextResult(
        codec=choice.name if choice else "none",
        level=choice.level if choice else None,
        split=chain.manifest.split,
        tokens=sum(lengths),
        windows=len(lengths),
        window=longest,
        perplexity=perplexity,
        perplexity_se=None if loss_se is None else loss_se * perplexity,
        reference=reference,
        reference_perplexity=float(np.exp(reference_loss.sum() / (tokens - 1).sum())),
        perplexity_ratio=ratio,
        perplexity_ratio_se=None if excess_se is None else excess_se * ratio,
        kl=mean_kl,
        kl_se=kl_se,
        top1=top1,
        top1_se=top1_se,
        bits_per_element=None if prefill is None else 8 * prefill / d_model,
        bytes_per_token=prefill,
        decode_bits_per_element=None if single is None else 8 * single / d_model,
        decode_bytes_per_token=single,
    )


def mean_and_error(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float | None]:
    """Mean over all items of clusters, and its standard error over clusters.

    The ratio estimator (Cochran, *Sampling Techniques*, section 6.4): clusters may differ in size.

    Args:
        sums: over each cluster's items.
        counts: items of each cluster.

    Returns:
        The error is None for a single cluster.
    """
    mean = float(sums.sum() / counts.sum())
    clusters = len(sums)
    if clusters < 2:
        return mean, None
    spread = ((sums - mean * counts) ** 2).sum() * clusters / (clusters - 1)
    return mean, float(np.sqrt(spread) / counts.sum())


def ids_key(windows: Sequence[Sequence[int]]) -> str:
    """Hex digits that stand for token ids and how they are cut into windows."""
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(np.array([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()[:32]
