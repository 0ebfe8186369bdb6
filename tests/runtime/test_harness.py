"""A bundle as the harness' model: scores against whole texts, shared contexts, the harness' own tasks."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from isthmus.errors import RequestError
from isthmus.export.validate import log_softmax
from isthmus.runtime.chain import Chain
from isthmus.runtime.harness import BundleLM, evaluate_task, task_subject
from isthmus.runtime.journal import Journal

PAIRS = [
    ("A man is sitting on a roof. he", " starts pulling up roofing."),
    ("A man is sitting on a roof. he", " starts to sing."),
    ("A man is sitting on a roof. he", "!"),
    ("Another context ", "and what follows"),
    ("", "no context at all"),
    ("long " * 60, "x" * 230),  # together longer than the context of 512
]
DOCS = [
    {
        "question": f"What is {number}?",
        "choices": {"text": ["a number", "a letter", "an animal"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[number % 3],
    }
    for number in range(6)
]


@pytest.fixture(scope="module")
def chain(tiny: Any) -> Chain:
    folder = tiny.bundle("llama", split=2)
    return Chain.open(folder / "device", folder / "server", threads=1)


@pytest.fixture(scope="module")
def alone(tiny: Any) -> Chain:
    return Chain.open(tiny.bundle("llama") / "device", threads=1)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.mark.parametrize(("codec", "kv_bits"), [("raw32", 32), ("tabq", 32), (None, 32), ("tabq", 8), ("raw32", 4)])
def test_sharing_a_context_changes_no_bit(tiny: Any, codec: str | None, kv_bits: int) -> None:
    folder = tiny.bundle("llama", split=2, front_kv_bits=kv_bits, back_kv_bits=kv_bits)
    chain = Chain.open(folder / "device", folder / "server", threads=1)
    choice = chain.codecs([codec])[0] if codec else None
    together = BundleLM(chain, choice)
    scores = together.loglikelihood(requests(*PAIRS))
    apart = BundleLM(chain, choice)
    assert scores == [apart.loglikelihood(requests(pair))[0] for pair in PAIRS]
    if codec:
        assert together.sent_tokens < apart.sent_tokens


def test_scores_are_those_of_whole_texts(chain: Chain, tiny: Any, local_model: Callable[..., Any]) -> None:
    scores = BundleLM(chain, chain.codecs(["raw32"])[0]).loglikelihood(requests(*PAIRS))
    whole = local_model(tiny.bundle("llama"))
    tokenizer = chain.tokenizer
    for (context, following), (score, greedy) in zip(PAIRS, scores, strict=True):
        ids = tokenizer.encode(context) or [min(chain.manifest.end_tokens)]
        targets = tokenizer.encode(following)
        if context.endswith(" "):  # the harness gives it to what follows
            ids, targets = ids[:-1], [ids[-1], *targets]
        text = (ids + targets)[-513:]
        log_p = log_softmax(whole.run(text[:-1], [len(text) - 1])[1])[-len(targets) :]
        assert score == pytest.approx(log_p[np.arange(len(targets)), targets].sum(), rel=1e-5)
        assert greedy == (log_p.argmax(1).tolist() == targets)


def test_a_greedy_continuation_is_known_as_such(alone: Chain) -> None:
    model = BundleLM(alone)
    (text,) = model.generate_until(requests(("Once upon", {"max_gen_toks": 5, "until": []})))
    ids = alone.tokenizer.encode(text)
    if len(ids) == 5:  # bytes that are no text would not come back
        assert model.loglikelihood(requests(("Once upon", text)))[0][1]


def test_a_context_is_sent_once_and_the_last_token_never(chain: Chain) -> None:
    model = BundleLM(chain, chain.codecs(["raw16"])[0])
    model.loglikelihood(requests(("context", " one"), ("context", " two"), ("context", " tree")))
    # 7 of the context; " on" and then what differs from the one before.
    assert model.sent_tokens == 7 + 3 + 2 + 2
    assert model.sent_bytes == model.sent_tokens * 64 * 2


def test_a_rolling_score_is_the_sum_over_windows(alone: Chain, tiny: Any, local_model: Callable[..., Any]) -> None:
    text = "All work and no play. " * 40  # longer than the context of 512
    short = "Just this."
    scores = BundleLM(alone).loglikelihood_rolling(requests((text,), (short,)))
    whole = local_model(tiny.bundle("llama"))

    def score(ids: list[int], start: list[int]) -> float:
        log_p = log_softmax(whole.run([*start, *ids][:-1], [len(ids) + len(start) - 1])[1])[-len(ids) :]
        return float(log_p[np.arange(len(ids)), ids].sum())

    ids, end = alone.tokenizer.encode(text), [min(alone.manifest.end_tokens)]
    # The second window keeps the context full: it begins with tokens that the first has scored.
    second = ids[512:]
    expected = score(ids[:512], end) + score(second, ids[len(ids) - 513 : 512])
    assert scores[0] == pytest.approx(expected, rel=1e-5)
    assert scores[1] == pytest.approx(score(alone.tokenizer.encode(short), end), rel=1e-5)


def test_generation_is_that_of_the_model(alone: Chain, tiny: Any, local_model: Callable[..., Any]) -> None:
    ids = alone.tokenizer.encode("Once upon a time")
    tokens = local_model(tiny.bundle("llama")).generate(ids, 12)
    ends = [at for at, token in enumerate(tokens) if token in alone.manifest.end_tokens]
    expected = alone.tokenizer.decode(tokens[: ends[0]] if ends else tokens)
    arguments = ("Once upon a time", {"until": [], "max_gen_toks": 12})
    assert BundleLM(alone).generate_until(requests(arguments)) == [expected]
    stop = expected[3:5]
    stopped = BundleLM(alone).generate_until(requests(("Once upon a time", {"until": stop, "max_gen_toks": 12})))
    assert stopped == [expected[: expected.index(stop)]]


def test_sampling_is_refused(alone: Chain) -> None:
    with pytest.raises(RequestError, match="only greedy"):
        BundleLM(alone).generate_until(requests(("x", {"do_sample": True})))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_task_is_the_harness_own(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    whole = BundleLM.loglikelihood

    def listening(model: BundleLM, wanted: list[Any], disable_tqdm: bool = True) -> Any:
        asked.extend(request.args for request in wanted)
        return whole(model, wanted)

    monkeypatch.setattr(BundleLM, "loglikelihood", listening)
    result = evaluate_task(chain, "arc_easy", DOCS, chain.codecs(["raw32"]))[0]
    assert asked[:3] == [("Question: What is 0?\nAnswer:", f" {text}") for text in DOCS[0]["choices"]["text"]]
    scores = np.array([score for score, _ in whole(BundleLM(chain), requests(*asked))]).reshape(6, 3)
    gold = np.arange(6) % 3
    right = scores.argmax(1) == gold
    lengths = [len(text) for text in DOCS[0]["choices"]["text"]]
    assert result.items == 6
    assert result.accuracy == right.mean()
    assert result.accuracy_norm == ((scores / lengths).argmax(1) == gold).mean()
    assert result.accuracy_se == pytest.approx(right.std(ddof=1) / 6**0.5)
    assert (result.bits_per_element, result.harness[:2]) == (32, "0.")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("task", "doc", "context", "following"),
    [
        ("hellaswag", {"query": "Doing: A. he", "choices": ["x", "y", "z", "w"], "label": "1"}, "Doing: A. he", " x"),
        ("piqa", {"goal": "To go", "sol1": "walk", "sol2": "sit", "label": 0}, "Question: To go\nAnswer:", " walk"),
        (
            "boolq",
            {"passage": "Some.", "question": "is it", "label": 1},
            "Some.\nQuestion: is it?\nAnswer:",
            " no",
        ),
        (
            "openbookqa",
            {"question_stem": "Wet is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
            "Wet is",
            " a",
        ),
    ],
)
def test_the_prompts_are_the_harness_own(
    alone: Chain, task: str, doc: dict[str, Any], context: str, following: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def answer(model: BundleLM, wanted: list[Any], disable_tqdm: bool = True) -> Any:
        asked.extend(request.args for request in wanted)
        return [(-float(at == 0), False) for at in range(len(wanted))]  # the first is least likely

    monkeypatch.setattr(BundleLM, "loglikelihood", answer)
    (result,) = evaluate_task(alone, task, [doc], [])
    assert asked[0] == (context, following)
    right = {"hellaswag": 1.0, "piqa": 0.0, "boolq": 1.0, "openbookqa": 1.0}[task]
    assert (result.accuracy, result.accuracy_se, result.codec, result.bits_per_element) == (right, None, "none", None)
    assert (result.accuracy_norm is None) == (task == "boolq")


def test_an_interrupted_task_goes_on_and_ends_with_the_same_figures(chain: Chain, alone: Chain, tmp_path: Path) -> None:
    codecs = chain.codecs(["tabq"], [0, 4])
    whole = evaluate_task(chain, "arc_easy", DOCS, codecs, reference=alone)
    subject = task_subject(chain, "arc_easy", DOCS, codecs, alone)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("tabq 4", 3):
            raise KeyboardInterrupt

    def run(**options: Any) -> Any:
        journal = Journal(tmp_path / "journal", subject)
        return evaluate_task(chain, "arc_easy", DOCS, codecs, reference=alone, journal=journal, **options)

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    assert len(Journal(tmp_path / "journal", subject).names) == 6 + 6 + 3
    assert run() == whole
    assert len(Journal(tmp_path / "journal", subject).names) == 18


def test_a_reference_is_compared_item_by_item(chain: Chain, alone: Chain) -> None:
    (same,) = evaluate_task(chain, "arc_easy", DOCS, chain.codecs(["raw32"]), reference=alone)
    assert same.reference_accuracy == same.accuracy
    assert (same.accuracy_difference, same.accuracy_difference_se) == (0, 0)


def test_what_determines_the_result_is_in_the_journals_subject(chain: Chain, alone: Chain) -> None:
    codecs = chain.codecs(["tabq"])
    subject = task_subject(chain, "arc_easy", DOCS, codecs, None)
    assert subject == task_subject(chain, "arc_easy", DOCS, codecs, None)
    for other in (
        task_subject(chain, "arc_easy", DOCS[:5], codecs, None),
        task_subject(chain, "arc_easy", DOCS, chain.codecs(["raw16"]), None),
        task_subject(chain, "arc_easy", DOCS, codecs, alone),
        task_subject(alone, "arc_easy", DOCS, codecs, None),
    ):
        assert other != subject


def test_scores_are_those_of_the_harness_own_model(tiny: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    folder = tiny.checkpoint("llama")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours = Chain.open(tiny.bundle("llama", bits=32) / "device", threads=1)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(ours.manifest.end_tokens))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=512, batch_size=1, device="cpu")
    expected = theirs.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (score, greedy), (their_score, their_greedy) in zip(
        BundleLM(ours).loglikelihood(requests(*PAIRS)), expected, strict=True
    ):
        assert score == pytest.approx(their_score, rel=1e-4)
        assert greedy == their_greedy
    texts = requests(("All work and no play. " * 40,), ("Just this.",))
    assert BundleLM(ours).loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4
    )
