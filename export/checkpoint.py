"""The checkpoint interface: config, weights and tokenizer of a source model, whatever its file format.

Names, shapes and config keys are those of Hugging Face, so that a graph builder knows one convention only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError

# Special tokens that end a turn or a text whatever the checkpoint declares: many instruct models declare
# one of two. The list follows llama.cpp's, which has no better rule either.
_END_TEXTS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<EOT>",
    }
)

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class TokenizerFiles:
    """All that a runtime needs to turn text into token ids and back, and chats into prompts.

    Args:
        tokenizer_json: the `tokenizers` library's serialisation; encoding adds a BOS token only if the
            checkpoint wants one.
        chat_template: Jinja source, or None.
        end_tokens: ids that end a generation, ascending.
        bos_token: id of the BOS token, whether or not encoding adds it.
        special_tokens: texts for the chat template, of ``bos_token``, ``eos_token``, ``unk_token`` and
            ``pad_token`` those that the checkpoint has.
    """

    tokenizer_json: str
    chat_template: str | None
    end_tokens: tuple[int, ...]
    bos_token: int | None
    special_tokens: dict[str, str]


class Checkpoint(Protocol):
    """An opened source model. Opening reads headers only; tensors are read from the file one at a time.

    ``config`` holds Hugging Face's config.json keys as `normalize_config` leaves them.
    """

    @property
    def name(self) -> str:
        """What to call the model."""

    @property
    def format(self) -> str:
        """``"safetensors"`` or ``"gguf"``."""

    @property
    def config(self) -> dict[str, Any]:
        """Hugging Face's config.json keys, normalised."""

    def names(self) -> list[str]:
        """Tensor names, for example ``model.layers.0.self_attn.q_proj.weight``."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, ``[out, in]`` for a matrix, without reading it.

        Raises:
            ModelError: the checkpoint has no such tensor.
        """

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32, in memory of its own; nothing is kept.

        Raises:
            ModelError: the checkpoint has no such tensor.
        """

    def tokenizer(self) -> TokenizerFiles:
        """Read the tokenizer.

        Raises:
            ModelError: there is none, or it cannot be read.
        """

    def file_hashes(self) -> dict[str, str]:
        """Hex SHA-256 of each file of the checkpoint, by file name; reads them all."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory, or a GGUF file (or a directory that holds exactly one).

    Raises:
        ModelError: nothing there, not a checkpoint, or one that is truncated, corrupt or unsupported.
    """
    # Here, because both modules need this one, and a model needs only one of them.
    from .gguf_checkpoint import GGUFCheckpoint
    from .safetensors_checkpoint import SafetensorsCheckpoint

    try:
        if path.is_dir():
            if (path / "config.json").is_file():
                return SafetensorsCheckpoint(path)
            files = sorted(path.glob("*.gguf"))
            if len(files) != 1:
                raise ModelError(
                    f"{path}: no config.json and {len(files)} .gguf files; a checkpoint directory holds "
                    "config.json and *.safetensors, or exactly one .gguf file"
                )
            path = files[0]
        if not path.is_file():
            raise ModelError(f"{path}: no such file; give a checkpoint directory or a .gguf file")
        if path.suffix == ".safetensors":
            raise ModelError(f"{path}: the config is needed as well; give the directory {path.parent}")
        return GGUFCheckpoint(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error}); check the file and its permissions") from error


def normalize_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Bring a config.json of any transformers version to one form, with defaults filled in.

    Rotary settings are found under ``rope_parameters`` (transformers 5), or under ``rope_scaling`` with
    ``rope_theta`` beside it (4). Afterwards ``rope_theta`` is a float at top level and ``rope_scaling`` is
    None or a dict with ``rope_type``. Beyond transformers' own types there is, from GGUF,
    ``{"rope_type": "factors", "factors": [...]}``: ``head_dim / 2`` numbers that the inverse frequencies are
    divided by.

    ``sliding_window`` is None where the model does not use it.

    Args:
        config: the parsed config.json.
        where: the file's name, for errors.

    Raises:
        ModelError: a number is missing or is not a positive integer.
    """
    result = dict(config)
    scaling: dict[str, Any] = {}
    for given in (result.get("rope_scaling"), result.pop("rope_parameters", None)):
        if not isinstance(given, dict | None):
            raise ModelError(f"{where}: rotary settings are {given!r}, not an object; fetch it again")
        scaling.update(given or {})
    result["rope_theta"] = scaling.pop("rope_theta", None) or result.get("rope_theta") or 10000.0
    legacy_type = scaling.pop("type", "default")
    rope_type = scaling.pop("rope_type", legacy_type)
    result["rope_scaling"] = None if rope_type == "default" else {"rope_type": rope_type, **scaling}
    for key in ("model_type", *_REQUIRED):
        if result.get(key) is None:
            raise ModelError(f"{where}: no {key}; this is not the config of a decoder-only language model")
    _check_counts(result, _REQUIRED, where)
    defaults = {
        "num_key_value_heads": result["num_attention_heads"],
        "head_dim": result["hidden_size"] // result["num_attention_heads"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
    }
    result.update({key: default for key, default in defaults.items() if result.get(key) is None})
    _check_counts(result, ("num_key_value_heads", "head_dim", "max_position_embeddings"), where)
    for key in ("rope_theta", "rms_norm_eps"):
        value = result[key]
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(f"{where}: {key} is {value!r}, not a positive number; fetch it again")
        result[key] = float(value)
    if result.get("use_sliding_window") is False or not result.get("sliding_window"):
        result["sliding_window"] = None
    return result


def _check_counts(config: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    for key in keys:
        if type(config[key]) is not int or config[key] <= 0:
            raise ModelError(f"{where}: {key} is {config[key]!r}, not a positive integer; fetch it again")


def end_token_ids(declared: Iterable[int], special: Mapping[str, int]) -> tuple[int, ...]:
    """Ids that end a generation: those declared, and special tokens with a well-known text.

    Args:
        declared: ids that the checkpoint names as end tokens.
        special: text and id of the checkpoint's special tokens.
    """
    return tuple(sorted({*declared, *(token for text, token in special.items() if text in _END_TEXTS)}))
