"""Scoring a text: windows, figures against independent arithmetic, bytes, resuming."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain as joined
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from isthmus.errors import BundleError, CodecError, RequestError
from isthmus.export.validate import log_softmax
from isthmus.runtime.chain import Chain
from isthmus.runtime.evaluate import (
    BundleReference,
    Predictions,
    evaluate_text,
    mean_and_error,
    open_whole,
    read_text,
    text_subject,
    text_windows,
)
from isthmus.runtime.journal import Journal
from isthmus.runtime.text import Tokenizer

IDS = np.random.default_rng(5).integers(1, 256, 300).tolist()
WINDOWS = [IDS[:140], IDS[140:280], IDS[280:]]  # longer than a prefill chunk, and a short one


@pytest.fixture(scope="module")
def chain(tiny: Any) -> Chain:
    folder = tiny.bundle("llama", split=2)
    return Chain.open(folder / "device", folder / "server", threads=1)


@pytest.fixture
def reference(tiny: Any) -> BundleReference:
    return BundleReference(Chain.open(tiny.bundle("llama", bits=32) / "device", threads=1), WINDOWS)


def test_a_device_with_all_layers_needs_no_other_half(chain: Chain, tiny: Any) -> None:
    alone = Chain.open(tiny.bundle(split=2, device_layers="all") / "device")
    chain.truncate(0)
    assert np.array_equal(alone.back(alone.front(IDS[:140])), chain.back(chain.front(IDS[:140])))
    assert [choice.name for choice in alone.codecs(["raw16"])] == ["raw16"]


def test_a_chain_gives_the_bits_of_the_unsplit_model(chain: Chain, tiny: Any, local_model: Callable[..., Any]) -> None:
    hidden, logits = local_model(tiny.bundle("llama")).run(IDS[:140], [140])
    chain.truncate(0)
    choice = chain.codecs(["raw32"])[0]
    received, sent = choice.send(chain.front(IDS[:140]), IDS[:140])
    final = chain.back(received)
    assert sent == 140 * 64 * 4
    assert np.array_equal(final, hidden)
    assert np.array_equal(chain.logits(final[:64]), logits[:64])


def test_the_figures_are_those_of_whole_texts_in_float64(
    chain: Chain, reference: BundleReference, tiny: Any, local_model: Callable[..., Any]
) -> None:
    result = evaluate_text(chain, WINDOWS, chain.codecs(["raw32"]), reference)[0]
    actual, expected = (local_model(tiny.bundle("llama", bits=bits)) for bits in (4, 32))
    losses, reference_losses, kls, agreeing = [], [], [], []
    for ids in WINDOWS:
        log_q, log_p = (log_softmax(model.run(ids, [len(ids)])[1]) for model in (actual, expected))
        rows, targets = np.arange(len(ids) - 1), ids[1:]
        losses.append(-log_q[rows, targets])
        reference_losses.append(-log_p[rows, targets])
        kls.append((np.exp(log_p) * (log_p - log_q)).sum(1))
        agreeing.append(log_p.argmax(1) == log_q.argmax(1))
    assert result.tokens == 300
    assert result.windows == 3
    assert result.perplexity == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-6)
    assert result.reference_perplexity == pytest.approx(np.exp(np.concatenate(reference_losses).mean()), rel=1e-6)
    assert result.perplexity_ratio == pytest.approx(result.perplexity / result.reference_perplexity, rel=1e-9)
    assert result.kl == pytest.approx(np.concatenate(kls).mean(), rel=1e-5)
    assert result.top1 == np.concatenate(agreeing).mean()
    assert result.kl > 0.001
    # Windows as clusters, by a jackknife: another estimator of the same error.
    left_out = [np.concatenate(kls[:at] + kls[at + 1 :]).mean() for at in range(3)]
    jackknife = np.sqrt(2 / 3 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    assert result.kl_se == pytest.approx(jackknife, rel=0.3)


def test_equal_models_agree_exactly(chain: Chain, tiny: Any) -> None:
    same = BundleReference(Chain.open(tiny.bundle("llama") / "device", threads=1), WINDOWS)
    exact, coarse = evaluate_text(chain, WINDOWS, chain.codecs(["raw32", "tabq"]), same)
    assert (exact.kl, exact.top1, exact.perplexity_ratio) == (0.0, 1.0, 1.0)
    assert coarse.kl > 1e-6


def test_every_byte_of_every_frame_counts(chain: Chain, reference: BundleReference) -> None:
    choices = chain.codecs(["raw32", "raw16", "tabq"], [0])
    results = evaluate_text(chain, WINDOWS, choices, reference)
    chunks = [IDS[first : first + n] for first, n in ((0, 128), (128, 12), (140, 128), (268, 12), (280, 20))]
    for choice, result in zip(choices, results, strict=True):
        prefill = single = 0
        for ids, start in zip(chunks, (0, 128, 0, 128, 0), strict=True):
            if start == 0:
                chain.truncate(0)
            hidden = chain.front(ids)
            prefill += len(choice.codec.encode(hidden, ids))
            single += sum(len(choice.codec.encode(row[None], [token])) for row, token in zip(hidden, ids, strict=True))
        assert result.bytes_per_token == prefill / 300
        assert result.bits_per_element == 8 * prefill / 300 / 64
        assert result.decode_bytes_per_token == single / 300
        assert result.decode_bits_per_element == 8 * single / 300 / 64
    assert [result.bits_per_element for result in results[:2]] == [32, 16]


def test_a_device_only_bundle_sends_nothing(tiny: Any, reference: BundleReference) -> None:
    alone = Chain.open(tiny.bundle("llama") / "device", threads=1)
    (result,) = evaluate_text(alone, WINDOWS, alone.codecs(["tabq"], None), reference)
    assert (result.codec, result.level, result.bits_per_element, result.decode_bytes_per_token) == (
        "none",
        None,
        None,
        None,
    )
    assert result.kl > 0


def test_a_sweep_takes_all_levels_and_codecs_without_levels_once(chain: Chain) -> None:
    assert [str(choice) for choice in chain.codecs(["raw16", "tabq"], None)] == [
        "raw16",
        "tabq 0",
        "tabq 1",
        "tabq 2",
        "tabq 3",
        "tabq 4",
    ]
    assert [str(choice) for choice in chain.codecs(["raw16", "tabq"], [1])] == ["raw16", "tabq 1"]
    assert [str(choice) for choice in chain.codecs(["tabq"])] == ["tabq 2"]


@pytest.mark.parametrize(
    ("names", "levels", "message"),
    [
        (["zip"], [None], "codec 'zip' is unknown"),
        (["tabq"], [9], "level 9"),
        (["tabq"], [-1], "level -1"),
        (["raw32"], [0], "no levels"),
        (["raw32", "tabq"], [0, 7], "level 7"),
    ],
)
def test_codecs_and_levels_that_the_bundle_has_not_are_refused(
    chain: Chain, names: list[str], levels: list[int | None], message: str
) -> None:
    with pytest.raises(CodecError, match=message):
        chain.codecs(names, levels)


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_figures(
    chain: Chain, reference: BundleReference, tmp_path: Path
) -> None:
    choices = chain.codecs(["raw16", "tabq"])
    whole = evaluate_text(chain, WINDOWS, choices, reference)
    subject = text_subject(chain, WINDOWS, choices, reference)

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_text(chain, WINDOWS, choices, reference, journal=Journal(tmp_path / "journal", subject), progress=stop)

    class Unasked(BundleReference):
        def logits(self, window: int, rows: slice) -> Any:
            assert window == 2
            return super().logits(window, rows)

    again = Unasked(reference._chain, WINDOWS)
    journal = Journal(tmp_path / "journal", subject)
    assert journal.names == ["window 0", "window 1"]
    assert evaluate_text(chain, WINDOWS, choices, again, journal=journal) == whole


def test_what_determines_the_result_is_in_the_journals_subject(
    chain: Chain, reference: BundleReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = chain.codecs(["tabq"])
    subject = text_subject(chain, WINDOWS, choices, reference)
    assert subject == text_subject(chain, WINDOWS, choices, reference)
    assert subject != text_subject(chain, WINDOWS[:2], choices, reference)
    assert subject != text_subject(chain, [IDS], choices, reference)
    assert subject != text_subject(chain, WINDOWS, chain.codecs(["tabq"], [1]), reference)
    monkeypatch.setattr("onnxruntime.__version__", "0.0.1")
    assert subject != text_subject(chain, WINDOWS, choices, reference)


def test_predictions_are_those_of_float64_and_equal_ones_are_at_distance_0() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((7, 5000)).astype(np.float32) * 6 + offset for offset in (0, 40))
    p, q = Predictions(x), Predictions(y)
    log_p, log_q = log_softmax(x), log_softmax(y)
    np.testing.assert_allclose(p.kl(q), (np.exp(log_p) * (log_p - log_q)).sum(1), rtol=1e-5)
    np.testing.assert_allclose(p.log_probability(np.array([3, 9])), log_p[[0, 1], [3, 9]], rtol=1e-5)
    assert np.array_equal(p.kl(Predictions(x)), np.zeros(7))
    nearby = Predictions(x + rng.standard_normal(x.shape).astype(np.float32) * 1e-3)
    assert 0 < p.kl(nearby).mean() < 1e-5


def test_the_error_of_equal_clusters_is_that_of_their_means() -> None:
    sums = np.array([3.0, 5.0, 7.0, 1.0])
    mean, error = mean_and_error(sums, np.full(4, 10.0))
    assert mean == 0.4
    assert error == pytest.approx(np.std(sums / 10, ddof=1) / 2)
    assert mean_and_error(sums[:1], np.array([10.0])) == (0.3, None)


def test_windows_are_consecutive_and_hold_the_tokens_asked_for(chain: Chain) -> None:
    text = "".join(chr(97 + at % 26) for at in range(100))
    ids = chain.tokenizer.encode(text)
    windows = text_windows(chain.tokenizer, text, window=30)
    assert [len(window) for window in windows] == [30, 30, 30, 10]
    assert list(joined.from_iterable(windows)) == ids
    assert list(joined.from_iterable(text_windows(chain.tokenizer, text, window=30, tokens=70))) == ids[:70]
    # A single token predicts nothing that is in the text.
    assert [len(window) for window in text_windows(chain.tokenizer, text, window=30, tokens=61)] == [30, 30]
    assert [len(window) for window in text_windows(chain.tokenizer, text, window=99)] == [99]


def test_every_window_begins_as_the_checkpoint_wants_a_text_to_begin(chain: Chain) -> None:
    backend = chain.tokenizer._backend.__class__.from_str(chain.tokenizer._backend.to_str())
    backend.post_processor = processors.TemplateProcessing(single="Ā $A", special_tokens=[("Ā", 7)])
    windows = text_windows(Tokenizer(backend), "abcdefghij", window=4)
    plain = chain.tokenizer.encode("abcdefghij")
    assert windows == [[7, *plain[:3]], [7, *plain[3:6]], [7, *plain[6:9]], [7, plain[9]]]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "has 0 tokens, 2 are needed"),
        ("a", {}, "has 1 tokens, 2 are needed"),
        ("abc", {"tokens": 4}, "has 3 tokens, 4 are needed"),
        ("abc", {"tokens": 1}, "tokens=1"),
        ("abc", {"tokens": -5}, "tokens=-5"),
        ("abc", {"window": 1}, "window=1"),
    ],
)
def test_texts_and_numbers_of_no_use_are_errors(chain: Chain, text: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        text_windows(chain.tokenizer, text, **options)


def test_a_window_longer_than_the_context_is_an_error(chain: Chain, reference: BundleReference) -> None:
    with pytest.raises(RequestError, match="context holds 512"):
        evaluate_text(chain, [[1] * 513], chain.codecs(["raw32"]), reference)


def test_crlf_becomes_lf_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"one\r\ntwo\nthree\r\n\xc3\xa9")
    assert read_text(path) == ("one\ntwo\nthree\né", 2)


def test_a_text_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="give a readable file"):
        read_text(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        read_text(tmp_path / "binary")


def test_halves_that_are_missing_too_many_or_of_other_exports_are_refused(tiny: Any) -> None:
    split, other, alone = (tiny.bundle("llama", split=at) for at in (2, 1, None))
    with pytest.raises(BundleError, match="--back"):
        Chain.open(split / "device")
    with pytest.raises(BundleError, match=r"leave .* out"):
        Chain.open(alone / "device", split / "server")
    with pytest.raises(BundleError, match="different exports"):
        Chain.open(split / "device", other / "server")


def test_a_reference_with_another_vocabulary_is_refused(tiny: Any, write_checkpoint: Any, tmp_path: Path) -> None:
    from isthmus.export.export import export_bundle

    other = write_checkpoint(tmp_path / "checkpoint", vocab_size=320)
    export_bundle(str(other), tmp_path / "out", split=2, front_bits=32, back_bits=32, calibration_tokens=0)
    compared = Chain.open(tiny.bundle("llama") / "device").manifest
    for folder in (tmp_path / "out", tmp_path / "out" / "device"):
        with pytest.raises(BundleError, match="vocabulary has 320 tokens, the bundle's 256"):
            open_whole(folder, compared)
