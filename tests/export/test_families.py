"""Each family, through a whole float bundle, against transformers on the same random checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.errors import ModelError
from isthmus.export.export import export_bundle
from isthmus.runtime.edge.model import EdgeModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Largest difference of a logit; logits have a standard deviation of about one. Both sides compute in float32.
TOLERANCE = 1e-4

KINDS = [
    "llama",
    "llama-untied",
    "llama-linear-rope",
    "llama3-rope",
    "llama-yarn-rope",
    "mistral",
    "mistral-no-window",
    "qwen2",
    "qwen2-untied",
    "qwen2-window",
]

# Longer than Mistral's window of 24, and than the 128 tokens that one prefill chunk holds.
TEXT = np.random.default_rng(7).integers(0, 256, 200).tolist()


@cache
def reference_logits(checkpoint: Path) -> NDArray[np.float32]:
    """What transformers makes of the folder by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(torch.tensor([TEXT])).logits[0].numpy()
    return logits


def assert_equal_logits(actual: NDArray[np.float32], checkpoint: Path) -> None:
    expected = reference_logits(checkpoint)
    assert 0.5 < expected.std() < 2
    assert np.abs(actual - expected).max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_text_equal_those_of_transformers(tiny: Any, kind: str) -> None:
    model = EdgeModel(tiny.bundle(kind, bits=32) / "device")
    assert_equal_logits(model.score(TEXT), tiny.checkpoint(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "chunks",
    [[200], [1] * 200, [60, *[1] * 140], [7, 1, 32, 64, 2, 94]],
    ids=["prefill", "decode", "prefill then decode", "chunked prefill"],
)
def test_every_way_to_run_a_text_equals_transformers(
    tiny: Any, local_model: Callable[[Path], Any], kind: str, chunks: list[int]
) -> None:
    _, logits = local_model(tiny.bundle(kind, bits=32)).run(TEXT, chunks)
    assert_equal_logits(logits, tiny.checkpoint(kind))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_split_float_model_equals_transformers(tiny: Any, local_model: Callable[[Path], Any], kind: str) -> None:
    _, logits = local_model(tiny.bundle(kind, bits=32, split=1)).run(TEXT, [100, 100])
    assert_equal_logits(logits, tiny.checkpoint(kind))


@pytest.mark.parametrize("kind", ["mistral", "qwen2-window"])
def test_the_sliding_window_is_seen_in_the_logits(tiny: Any, kind: str) -> None:
    """Guards the comparison above: with the text's first token changed, only the window's reach may differ."""
    model = EdgeModel(tiny.bundle(kind, bits=32) / "device")
    reach = 4 * (24 - 1)  # layers times how far back one layer looks
    changed = [(TEXT[0] + 1) % 256, *TEXT[1:]]
    difference = np.abs(model.score(changed) - model.score(TEXT)).max(axis=1)
    assert difference[reach] > 0
    assert not difference[reach + 1 :].any()


@pytest.mark.parametrize(
    ("kind", "changes", "names"),
    [
        ("llama", {"model_type": "gemma9"}, "model_type 'gemma9': there are builders for llama, mistral, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"head_dim": 24}, "head_dim=24"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope scaling 'longrope'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ("llama", {"num_hidden_layers": 5}, "no tensor model.layers.4.input_layernorm.weight"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.3.*: the llama builder has no place"),
        ("llama", {"vocab_size": 300}, r"model.embed_tokens.weight: shape \(256, 64\).*\(300, 64\)"),
        ("llama", {"num_key_value_heads": 4}, r"k_proj.weight: shape \(32, 64\).*\(64, 64\)"),
        ("llama", {"intermediate_size": 128}, r"gate_proj.weight: shape \(96, 64\).*\(128, 64\)"),
        ("qwen2", {"model_type": "llama"}, "_proj.bias: the llama builder has no place"),
        ("llama", {"model_type": "qwen2"}, "no tensor model.layers.0.self_attn.q_proj.bias"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "max_window_layers=2",
        ),
    ],
    ids=str,
)
def test_a_checkpoint_that_no_builder_computes_is_refused_by_name(
    tmp_path: Path, altered_checkpoint: Callable[..., Path], kind: str, changes: dict[str, Any], names: str
) -> None:
    checkpoint = altered_checkpoint(kind, **changes)
    with pytest.raises(ModelError, match=names):
        export_bundle(str(checkpoint), tmp_path / "out", split=None)
    assert not list(tmp_path.glob("*out*"))


def test_a_missing_head_is_refused_by_name(tmp_path: Path, altered_checkpoint: Callable[..., Path]) -> None:
    checkpoint = altered_checkpoint("llama", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"no tensor lm_head\.weight"):
        export_bundle(str(checkpoint), tmp_path / "out", split=None)
