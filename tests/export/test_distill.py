"""Distillation on tiny models: what is written, what it learns, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cli.main import main
from isthmus.errors import BundleError, ExportError
from isthmus.export import conversations, draft_training, shipped_drafts
from isthmus.export import distill as distillation
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.conversations import ChatFormat, Conversations, Speaker, Writer, choose
from isthmus.export.distill import distill, exit_conversations, with_own_prompts
from isthmus.export.families import family_of
from isthmus.export.prompts import default_prompts, read_prompts
from isthmus.export.shipped_drafts import StoredDraft, load_draft, save_draft, shipped_draft
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.draft_bundle import open_draft
from isthmus.runtime.exit_measurement import ExitText, calibrate_exits
from isthmus.runtime.segments import Head, LayerStack

torch = pytest.importorskip("torch")

from isthmus.export.draft_model import DraftModel, DraftShape  # noqa: E402
from isthmus.export.draft_segment import write_draft  # noqa: E402

SPLIT, WINDOW, SEQUENCES = 2, 40, 8
PROMPTS = [f"Prompt number {number}?" for number in range(20)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "SEQUENCES", SEQUENCES)
    monkeypatch.setattr(conversations, "WINDOW", WINDOW)
    monkeypatch.setattr(distillation, "WINDOW", WINDOW)
    monkeypatch.setattr(conversations, "ANSWER_TOKENS", 9)
    monkeypatch.setattr(draft_training, "MEASURE_EVERY", 5)


@pytest.fixture
def bundle(tiny: Any, tmp_path: Path) -> Path:
    """A copy of a split bundle, to write into."""
    return Path(shutil.copytree(tiny.bundle(bits=8, split=SPLIT), tmp_path / "bundle"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS))
    return path


@pytest.fixture
def train(tiny: Any, bundle: Path, prompts: Path) -> Callable[..., Any]:
    def run(**options: Any) -> Any:
        given = {"model": str(tiny.checkpoint()), "prompts": prompts, "groups": 3, "vocabulary": 96, "minutes": 0.05}
        return distill(bundle, **given | options)

    return run


@pytest.fixture
def writer(tiny: Any, tmp_path: Path) -> Writer:
    checkpoint = open_checkpoint(tiny.checkpoint())
    manifest = open_bundle(tiny.bundle(bits=8, split=SPLIT), "device").manifest
    return Writer(tmp_path, checkpoint, family_of(checkpoint.config), manifest)


def written(writer: Writer, seed: int = 0) -> Conversations:
    prompts = iter([[10 + number, 3] for number in range(1000)])
    return writer.write(ChatFormat([1], [4, 5], [6], (255,)), prompts, np.random.default_rng(seed))


def test_prompts_are_given_and_answers_are_the_models(writer, local_model, tiny):
    text = written(writer)
    assert text.ids.shape == text.written.shape == (SEQUENCES, WINDOW)
    model = local_model(tiny.bundle(bits=8, split=SPLIT))
    for row in range(0, SEQUENCES, 2):
        ids = text.ids[row].tolist()
        assert ids[:5] == [1, 10 + row, 3, 4, 5]
        assert not text.written[row, :5].any()
        assert text.written[row, 5:14].all()
        assert ids[14] == 6, "after nine tokens the next prompt comes"
        hidden, logits = model.run(ids, [WINDOW])
        assert np.abs(hidden - text.final[row].astype(np.float32)).max() < 0.05 * np.abs(hidden).max()
        places = np.flatnonzero(text.written[row])
        greedy = logits[places - 1].argmax(axis=1) == np.array(ids)[places]
        assert greedy.mean() > 0.9, "the batched graphs round a little otherwise"


def test_the_model_writes_prompts_that_are_not_given(writer, monkeypatch):
    monkeypatch.setattr(conversations, "PROMPT_TOKENS", 6)
    chat = ChatFormat([1], [4, 5], [6], (255,))
    text = writer.write(chat, iter([None] * 1000), np.random.default_rng(0))
    for row in range(SEQUENCES):
        ids, answers = text.ids[row].tolist(), text.written[row]
        end = next((place for place in range(1, 7) if ids[place] == 255), 6)
        assert not answers[: end + 3].any(), "neither the prompt nor what stands around it is an answer"
        assert ids[end + 1 : end + 3] == [4, 5]
        assert answers[end + 3]
    assert len({tuple(ids[1:7]) for ids in text.ids.tolist()}) > 1, "prompts are sampled, in greedy sequences, too"


def test_an_end_that_the_model_chose_is_not_said_twice(writer):
    """Where the end token is what stands between two turns."""
    speaker = Speaker(ChatFormat([1], [9, 5], [9, 6], (9,)), iter([None, [7]]), 0.0)
    said = [speaker.next(chosen) for chosen in (0, 3, 9, 0, 8, 9, 0, 0, 0, 0, 2)]
    assert [token for token, _ in said] == [1, 3, 9, 5, 8, 9, 6, 7, 9, 5, 2]
    assert [answer for _, answer in said] == [*[False] * 4, True, True, *[False] * 4, True]


def test_tokens_are_drawn_as_their_probabilities_say():
    logits = np.log(np.array([[0.1, 0.2, 0.7]], np.float32)).repeat(30_000, axis=0)
    rng = np.random.default_rng(0)
    assert set(choose(logits, [0.0] * len(logits), rng)) == {2}
    for temperature in (1.0, 0.5):
        expected = np.array([0.1, 0.2, 0.7]) ** (1 / temperature)
        shares = np.bincount(choose(logits, [temperature] * len(logits), rng)) / len(logits)
        assert np.abs(shares - expected / expected.sum()).max() < 0.01


def test_three_of_four_prompts_are_the_models_own():
    prompts = with_own_prompts(iter([[1]] * 5000), np.random.default_rng(0))
    assert 0.7 < np.mean([prompt is None for prompt in prompts]) < 0.8


def test_a_seed_gives_the_same_conversations(writer):
    first, again, other = written(writer), written(writer), written(writer, seed=1)
    assert np.array_equal(first.ids, again.ids)
    assert not np.array_equal(first.ids, other.ids)


def test_conversations_are_read_as_they_were_written(writer, tmp_path):
    text = written(writer)
    text.save(tmp_path / "text.npz")
    again = Conversations.load(tmp_path / "text.npz")
    for name in ("ids", "written", "hidden", "final"):
        assert np.array_equal(getattr(text, name), getattr(again, name))


@pytest.mark.parametrize("bits", [32, 8])
def test_the_graphs_compute_what_the_trained_module_does_in_any_chunks(bundle, bits):
    half = open_bundle(bundle, "device")
    torch.manual_seed(0)
    model = DraftModel(DraftShape(half.manifest.architecture, 64, 50), WINDOW)
    for value in model.weights.values():
        torch.nn.init.normal_(value, 1.0 if value.ndim == 1 else 0.0, 0.1)
    write_draft(half.folder, half.manifest, model.arrays(), np.arange(0, 250, 5), {}, bits=bits)
    draft = open_draft(half)
    assert draft is not None
    hidden = np.random.default_rng(0).standard_normal((30, half.manifest.architecture.d_model)).astype(np.float32)
    stack, head = LayerStack(draft.bundle, 1), Head(draft.bundle, 1)
    whole = stack.session(WINDOW).forward(hidden).copy()
    with torch.no_grad():
        expected = model.logits(model(torch.from_numpy(hidden)[None]))[0].numpy()
    assert np.abs(head.logits_many(whole) - expected).max() < (1e-4 if bits == 32 else 0.1)
    session = stack.session(WINDOW)
    parts = [session.forward(hidden[first:last]).copy() for first, last in ((0, 1), (1, 2), (2, 7), (7, 30))]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_a_draft_learns_what_its_model_says(train, bundle):
    record = train(minutes=0.25)
    best = max(record.training["curve"], key=lambda point: point[2] + point[3])
    assert best[2:] == [record.training["agreement"], record.training["overlap"]]
    assert best[2] > 2 / 96
    assert 0 < best[3] <= 1
    draft = open_draft(open_bundle(bundle, "device"))
    assert draft is not None
    assert (draft.record.split, draft.record.vocabulary) == (SPLIT, 96)


def test_the_gradient_of_tvd_plus_is_that_of_the_total_variation_distance():
    torch.manual_seed(0)
    logits = torch.randn(40, 30, requires_grad=True)
    wanted = torch.randn(40, 30).log_softmax(-1)
    own = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad(draft_training.tvd_plus(own, wanted), logits, retain_graph=True)
    distance = 0.5 * (own.exp() - wanted.exp()).abs().sum(-1).mean()
    (expected,) = torch.autograd.grad(distance, logits)
    scale = (gradient * expected).sum() / (expected * expected).sum()
    assert scale > 1, "normalized: the rewards' spread is below 1"
    assert torch.allclose(gradient, scale * expected, atol=1e-6)


@pytest.mark.parametrize(("patience", "steps"), [(1000, 40), (1, 10)], ids=["by time", "sooner, where nothing rises"])
def test_the_loss_becomes_tvd_plus_towards_the_end(train, bundle, monkeypatch, patience, steps):
    losses = []
    for name in ("kl_divergence", "tvd_plus"):
        inner = getattr(draft_training, name)
        monkeypatch.setattr(draft_training, name, lambda *a, name=name, inner=inner: losses.append(name) or inner(*a))
    monkeypatch.setattr(draft_training, "PATIENCE", patience)
    clock = itertools.count()
    monkeypatch.setattr(draft_training.time, "monotonic", lambda: float(next(clock)))  # a step takes a second
    if patience == 1:
        measured = iter([(0.5, 0.5), *[(0.1, 0.1)] * 100])
        monkeypatch.setattr(draft_training, "quality", lambda *_: next(measured))
    train(minutes=1)
    first = losses.index("tvd_plus")
    assert losses == ["kl_divergence"] * first + ["tvd_plus"] * (len(losses) - first)
    assert abs(first - steps) <= 3
    assert abs(len(losses) - first - 18) <= 3, "three tenths of a minute"


def test_an_interrupted_training_goes_on(train, bundle):
    train()
    work = bundle / "distill"
    steps = json.loads((bundle / "device" / "draft" / "draft.json").read_text())["training"]["steps"]
    before = {path: path.stat().st_mtime_ns for path in work.glob("conversations-*")}
    with pytest.raises(ExportError, match="--resume"):
        train()
    (work / "conversations-002.npz").unlink()
    record = train(resume=True, minutes=0.1)
    assert record.training["steps"] >= steps - steps % 5
    kept = {path: path.stat().st_mtime_ns for path in before if path.name != "conversations-002.npz"}
    assert kept.items() <= before.items()


def test_what_was_begun_with_other_prompts_is_not_gone_on_with(train, tmp_path):
    train()
    other = tmp_path / "other.txt"
    other.write_text("\n".join(PROMPTS[::-1]))
    with pytest.raises(ExportError, match="remove it"):
        train(resume=True, prompts=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "minutes=0"),
        ({"groups": 1}, "groups=1"),
        ({"draft_layers": 2}, "a draft has 1 layer"),
        ({"exits": 3}, "exits=3: .* export with --split 3"),
        ({"vocabulary": 300}, "vocabulary=300"),
        ({"vocabulary": 4}, "vocabulary=4"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(train, bundle, options, message):
    with pytest.raises(ExportError, match=message):
        train(**options)
    assert not (bundle / "distill").exists()


def test_another_model_is_refused(train, write_checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "other", "llama", seed=5)
    with pytest.raises(ExportError, match="not the model"):
        train(model=str(other))


def test_exits_elsewhere_than_at_the_split_are_refused_where_they_are_only_measured(bundle):
    with pytest.raises(ExportError, match=r"exits=3: .* export with --split 3"):
        exit_conversations(bundle, exits=3)


def test_a_bundle_without_a_split_is_refused(tiny):
    with pytest.raises(ExportError, match="nothing to draft for"):
        distill(tiny.bundle(bits=8))


def test_too_few_prompts_are_refused(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("one\ntwo")
    with pytest.raises(ExportError, match="2 prompts"):
        read_prompts(path)
    with pytest.raises(ExportError, match="gone"):
        read_prompts(tmp_path / "gone.txt")
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(ExportError, match="UTF-8"):
        read_prompts(path)


def test_shipped_prompts_have_no_empty_places():
    prompts = default_prompts(["A passage."], np.random.default_rng(0))
    texts = [next(prompts) for _ in range(2000)]
    assert not any("{" in text for text in texts)
    assert len(set(texts)) > 900
    assert any("A passage." in text for text in texts)
    without = default_prompts([], np.random.default_rng(0))
    assert not any("passage" in next(without) for _ in range(500))


@pytest.fixture
def drafted(bundle: Path) -> Path:
    """A bundle with an untrained draft."""
    half = open_bundle(bundle, "device")
    model = DraftModel(DraftShape(half.manifest.architecture, 32, 16), 8)
    write_draft(half.folder, half.manifest, model.arrays(), np.arange(16), {"note": "untrained"})
    return bundle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["source"]["files"].update(other="00"), "a draft of"),
        (lambda data: data.update(split=1), "split 1"),
        (lambda data: data.update(d_model=8), "a draft of"),
        (lambda data: data.update(schema=99), "schema 99"),
        (lambda data: data.pop("files"), "no readable draft"),
        (lambda data: data.update(vocabulary=15), "rising ids"),
    ],
)
def test_a_draft_of_something_else_is_refused(drafted, change, message):
    path = drafted / "device" / "draft" / "draft.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        open_draft(open_bundle(drafted, "device"))


def test_a_damaged_draft_is_refused(drafted):
    path = drafted / "device" / "draft" / "layer.onnx.data"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(BundleError, match="altered"):
        open_draft(open_bundle(drafted, "device"))
    path.unlink()
    with pytest.raises(BundleError, match="missing"):
        open_draft(open_bundle(drafted, "device"))


def test_a_bundle_without_a_draft_has_none(bundle):
    assert open_draft(open_bundle(bundle, "device")) is None


def test_writing_fails_whole(drafted, monkeypatch):
    half = open_bundle(drafted, "device")
    model = DraftModel(DraftShape(half.manifest.architecture, 32, 16), 8)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isthmus.export.draft_segment.build_head", full)
    with pytest.raises(ExportError, match="No space left"):
        write_draft(half.folder, half.manifest, model.arrays(), np.arange(16), {})
    assert open_draft(half) is not None
    assert not list(half.folder.glob(".draft*"))


def test_a_stored_draft_comes_back_to_eight_bits(drafted, tmp_path):
    half = open_bundle(drafted, "device")
    model = DraftModel(DraftShape(half.manifest.architecture, 32, 16), 8)
    for value in model.weights.values():
        torch.nn.init.normal_(value, 0.0, 0.3)
    save_draft(tmp_path / "draft.npz", StoredDraft(model.arrays(), np.arange(16), {"seed": 3}))
    stored = load_draft(tmp_path / "draft.npz")
    assert stored.training == {"seed": 3}
    for name, weight in model.arrays().items():
        assert np.abs(stored.weights[name] - weight).max() <= np.abs(weight).max() / 128
    first = write_draft(half.folder, half.manifest, model.arrays(), np.arange(16), {}, bits=8)
    second = write_draft(half.folder, half.manifest, stored.weights, stored.vocabulary, {}, bits=8)
    assert first.files == second.files, "what is rounded already is not rounded again"


def test_no_draft_is_shipped_for_a_model_that_has_none():
    assert shipped_draft({"model.safetensors": "00"}, 10) is None


def test_every_shipped_draft_has_measured_exits():
    for (sha256, split), name in shipped_drafts._SHIPPED.items():
        stored = shipped_draft({name: sha256}, split)
        assert stored is not None
        assert stored.exits is not None
        thresholds = [stored.exits.threshold(agreement) for agreement in (0.9, 0.95, 0.99)]
        assert None not in thresholds
        assert thresholds == sorted(thresholds)


def test_exits_are_measured_on_conversations_of_their_own(drafted, prompts, tiny):
    texts = exit_conversations(drafted, prompts=prompts, model=str(tiny.checkpoint()))
    pairs = [ExitText(ids.tolist(), written) for ids, written in zip(texts.ids, texts.written, strict=True)]
    curve = calibrate_exits(drafted, pairs, "some prompts")
    draft = open_draft(open_bundle(drafted, "device"))
    assert draft is not None
    assert draft.record.exits == curve
    assert sum(curve.tokens) == texts.written.sum() > 50
    assert curve.text == "some prompts"


def test_exits_of_a_bundle_without_a_draft_are_refused(bundle):
    with pytest.raises(BundleError, match="no draft to exit with"):
        calibrate_exits(bundle, [ExitText([1, 2, 3], np.ones(3, np.bool_))], "")


def test_the_command_measures_the_draft_that_is_there(drafted, prompts, tiny, capsys):
    options = ["--exits-only", "--model", str(tiny.checkpoint()), "--prompts", str(prompts)]
    assert main(["distill", str(drafted), *options]) == 0
    assert "tokens that can be exited, by promised agreement" in capsys.readouterr().out
    assert main(["distill", str(drafted), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == f"conversations about {prompts}, seed 0"
