"""The NumPy layers against transformers and torch's gradients, and against the float graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.errors import ExportError
from isthmus.export import float_layer
from isthmus.export.checkpoint import Checkpoint, open_checkpoint
from isthmus.export.families import family_of
from isthmus.export.families.common import EMBEDDING
from isthmus.export.float_gradients import gradients_at, hidden_at
from isthmus.export.float_layer import FloatHead, FloatLayer
from isthmus.export.validate import FloatModel
from isthmus.runtime.bundle import Architecture

# Largest difference, relative to the largest value of the expected array. Both sides compute in float32.
TOLERANCE = 1e-4

# A kind, and changes to it for the ratios of query heads to key heads that it does not have itself: 2.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "a key head for each": ("llama", {"num_key_value_heads": 4}),
    "wide heads": ("llama", {"head_dim": 32}),
    "untied": ("llama-untied", {}),
    "llama3 rope": ("llama3-rope", {}),
    "yarn rope": ("llama-yarn-rope", {}),
    "window": ("mistral", {}),
    "bias": ("qwen2", {}),
    "bias and window": ("qwen2-window", {}),
}

# Longer than a tile of 128 rows, a chunk of the head's 64 and the window of 24, and no multiple of any.
TEXT = np.random.default_rng(7).integers(0, 256, 200).tolist()


class Source:
    """A tiny checkpoint, opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.family: ModuleType = family_of(self.checkpoint.config)
        self.arch: Architecture = self.family.architecture(self.checkpoint.config)

    def layer(self, index: int) -> FloatLayer:
        return FloatLayer.read(self.checkpoint, self.family, self.arch, index)

    def head(self) -> FloatHead:
        return FloatHead.read(self.checkpoint, self.arch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Callable[[str], Source]:
    made: dict[str, Source] = {}

    def get(variant: str) -> Source:
        if variant not in made:
            kind, changes = VARIANTS[variant]
            made[variant] = Source(write_checkpoint(tmp_path_factory.mktemp("float") / "model", kind, 0, **changes))
        return made[variant]

    return get


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


class Reference:
    """transformers' model of the same checkpoint; ``inputs`` keeps what each named linear layer was given."""

    def __init__(self, folder: Path) -> None:
        self.torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.torch.float32, attn_implementation="eager"
        ).eval()
        self.inputs: dict[str, NDArray[np.float32]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, self.torch.nn.Linear):
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[Any, ...], _output: Any) -> None:
            self.inputs[name] = inputs[0][0].detach().numpy()

        return hook

    def run(self, ids: list[int]) -> tuple[list[Any], Any]:
        """Hidden states at each layer's input, as tensors that gradients reach, and the logits."""
        kept: list[Any] = []

        def hook(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            hidden.retain_grad()
            kept.append(hidden)

        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self.model.model.layers]
        handles.append(self.model.model.norm.register_forward_pre_hook(hook, with_kwargs=True))
        embedded = self.model.model.embed_tokens(self.torch.tensor([ids]))
        logits = self.model(inputs_embeds=embedded).logits[0]
        for handle in handles:
            handle.remove()
        return kept, logits

    def gradients(self, ids: list[int], labels: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Of the sum of ``-log p(label)`` at each layer's input, and at the head's."""
        kept, logits = self.run(ids)
        self.torch.nn.functional.cross_entropy(logits, self.torch.tensor(labels), reduction="sum").backward()
        return [hidden.grad[0].numpy() for hidden in kept]


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_the_inputs_of_linear_layers_equal_those_of_transformers(
    source: Callable[[str], Source], variant: str
) -> None:
    model = source(variant)
    reference = Reference(model.folder)
    kept, logits = reference.run(TEXT)
    for index in range(model.arch.layers):
        hidden = kept[index][0].detach().numpy()
        output, activations = model.layer(index).forward(hidden)
        assert_close(output, kept[index + 1][0].detach().numpy())
        for role, given in (
            ("self_attn.q_proj", activations.normed),
            ("self_attn.o_proj", activations.attended),
            ("mlp.gate_proj", activations.post_normed),
            ("mlp.down_proj", activations.gated),
        ):
            assert_close(given, reference.inputs[f"model.layers.{index}.{role}"])
    assert_close(model.head().logits(output), logits.detach().numpy())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_at_every_layer_equals_autograds(source: Callable[[str], Source], variant: str) -> None:
    model = source(variant)
    labels = np.random.default_rng(1).integers(0, 256, len(TEXT))
    expected = Reference(model.folder).gradients(TEXT, labels)
    layers = [model.layer(index) for index in range(model.arch.layers)]
    inputs = [model.checkpoint.tensor(EMBEDDING)[TEXT]]
    for layer in layers:
        inputs.append(layer.forward(inputs[-1])[0])
    gradient = model.head().sampled_label_gradient(inputs[-1], labels)
    assert_close(gradient, expected[-1])
    for index in reversed(range(len(layers))):
        gradient.flags.writeable = inputs[index].flags.writeable = False  # the caller's arrays stay as they are
        gradient = layers[index].backward(inputs[index], layers[index].activations(inputs[index]), gradient)
        assert_close(gradient, expected[index])


@pytest.mark.parametrize("variant", ["llama", "window", "bias"])
def test_hidden_states_equal_those_of_the_float_graphs(
    source: Callable[[str], Source], tmp_path: Path, variant: str
) -> None:
    model = source(variant)
    graphs = FloatModel(model.checkpoint, model.family, model.arch, tmp_path)
    expected = graphs.embed(TEXT)
    for index in range(3):
        expected = graphs.layer(index, expected)
    [actual] = hidden_at(model.checkpoint, 3, [TEXT])
    assert_close(actual, expected)


WINDOWS = [TEXT[:70], TEXT[70:], TEXT[:1]]


@pytest.mark.parametrize("split", [0, 2, 4])
def test_gradients_at_a_split_are_autograds_for_the_labels_that_were_drawn(
    source: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch, split: int
) -> None:
    model = source("bias")
    drawn: list[list[NDArray[np.int64]]] = []
    sample = float_layer._sample

    def record(probabilities: NDArray[np.float32], draws: int, generator: Any) -> NDArray[np.int64]:
        labels = sample(probabilities, draws, generator)
        drawn.append(list(labels))
        return labels

    monkeypatch.setattr(float_layer, "_sample", record)
    gradients = gradients_at(model.checkpoint, split, WINDOWS, draws=2)
    assert len(gradients) == 2 * len(WINDOWS)
    reference, chunks = Reference(model.folder), iter(drawn)
    for window, pair in zip(WINDOWS, zip(gradients[::2], gradients[1::2], strict=True), strict=True):
        parts = [next(chunks) for _ in range(0, len(window), float_layer.HEAD_ROWS)]
        for draw, gradient in enumerate(pair):
            labels = np.concatenate([part[draw] for part in parts])
            assert_close(gradient, reference.gradients(window, labels)[split])


def test_labels_depend_on_the_seed_the_draw_and_the_windows_place_alone(source: Callable[[str], Source]) -> None:
    checkpoint = source("llama").checkpoint
    both = gradients_at(checkpoint, 2, WINDOWS[:2], draws=2, seed=3)
    alone = gradients_at(checkpoint, 2, WINDOWS[:1], draws=2, seed=3)
    other = gradients_at(checkpoint, 2, WINDOWS[:1], draws=2, seed=4)
    for first, again, different in zip(both, alone, other, strict=False):
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, different)
    assert not np.array_equal(both[0], both[1])
    same_text = gradients_at(checkpoint, 2, [WINDOWS[0]] * 2, seed=3)
    assert not np.array_equal(*same_text)


def test_gradients_start_from_given_hidden_states(source: Callable[[str], Source]) -> None:
    checkpoint = source("llama").checkpoint
    own = hidden_at(checkpoint, 2, WINDOWS)
    expected = gradients_at(checkpoint, 2, WINDOWS)
    for given, gradient in zip(gradients_at(checkpoint, 2, WINDOWS, start=own), expected, strict=True):
        np.testing.assert_array_equal(given, gradient)
    shifted = [hidden + np.float32(0.5) for hidden in own]
    assert not np.array_equal(gradients_at(checkpoint, 2, WINDOWS, start=shifted)[0], expected[0])


def test_labels_follow_the_models_distribution() -> None:
    rows = np.array([[0.0, 0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    labels = float_layer._sample(rows, 20000, np.random.default_rng(0))
    assert labels.shape == (20000, 2)
    shares = np.stack([np.bincount(column, minlength=5) for column in labels.T]) / 20000
    np.testing.assert_allclose(shares, rows, atol=0.02)
    assert not shares[rows == 0].any()


def test_a_later_token_changes_nothing_before_it(source: Callable[[str], Source]) -> None:
    """A tile's mask is more than what its keys' range leaves out."""
    model = source("llama")
    changed = [*TEXT[:150], (TEXT[150] + 1) % 256, *TEXT[151:]]
    first, second = hidden_at(model.checkpoint, 4, [TEXT, changed])
    np.testing.assert_array_equal(first[:150], second[:150])
    assert (first[150:] != second[150:]).any(axis=1).all()


def test_saturated_gates_and_scores_stay_finite(source: Callable[[str], Source]) -> None:
    layer = source("llama").layer(0)
    layer = replace(layer, gate=layer.gate * np.float32(1000), qkv=layer.qkv * np.float32(100))
    hidden = np.random.default_rng(0).standard_normal((40, 64), np.float32)
    with np.errstate(all="raise", under="ignore"):
        output, activations = layer.forward(hidden)
        gradient = layer.backward(hidden, activations, np.ones_like(output))
    assert np.isfinite(output).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("split", [-1, 5])
def test_a_split_outside_the_model_is_refused(source: Callable[[str], Source], split: int) -> None:
    for function in (hidden_at, gradients_at):
        with pytest.raises(ExportError, match=f"split {split}: the model has 4 layers; choose from 0 to 4"):
            function(source("llama").checkpoint, split, WINDOWS)


def test_hidden_states_of_other_windows_are_refused(source: Callable[[str], Source]) -> None:
    checkpoint = source("llama").checkpoint
    start = hidden_at(checkpoint, 1, WINDOWS)
    for wrong in (start[:2], start[::-1]):
        with pytest.raises(ExportError, match="the windows ask for"):
            gradients_at(checkpoint, 1, WINDOWS, start=wrong)
