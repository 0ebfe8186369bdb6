"""A checkpoint in a GGUF file: llama.cpp's names, metadata and rotary layout turned into Hugging Face's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from ..errors import ModelError
from ..runtime.bundle import sha256_file
from .checkpoint import TokenizerFiles, normalize_config
from .gguf_blocks import BLOCK_BITS, SourceBlocks, parse_blocks
from .gguf_file import GGUFFile
from .gguf_tokenizer import build_tokenizer

# general.architecture, which is also the config's model_type. SmolLM2 and Mistral call themselves llama.
ARCHITECTURES = ("llama", "qwen2")
# Architectures whose query and key rows llama.cpp stores with the halves of each head interleaved.
_INTERLEAVED_ROTARY = ("llama",)

_EMBEDDING = "token_embd.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GGUFCheckpoint:
    """See `Checkpoint`.

    The factors that Llama 3 files hold in ``rope_freqs.weight`` appear in the config as
    ``rope_scaling = {"rope_type": "factors", "factors": [...]}``: divide the inverse frequencies by them.

    Args:
        path: the file.

    Raises:
        ModelError: truncated, corrupt, one part of several, or of an unsupported architecture.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self._file = GGUFFile(path)
        architecture = self._file.get("general.architecture", str)
        if architecture is None or architecture not in ARCHITECTURES:
            raise ModelError(f"{path}: architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
        parts = self._file.get("split.count", int, 1) or 1
        if parts > 1:
            raise ModelError(f"{path}: one of {parts} parts; join them with gguf-split --merge")
        self._tensor_names = self._map_names()
        self.config = self._build_config(architecture)

    def names(self) -> list[str]:
        """Tensor names."""
        return list(self._tensor_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._file.tensors[self._gguf_name(name)].shape

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32."""
        values = self._file.tensor(self._gguf_name(name))
        order = self._row_order(name)
        return values if order is None else values[order]

    def block_kind(self, name: str) -> GGMLQuantizationType | None:
        """A tensor's type, if `blocks` can give its blocks."""
        kind = self._file.tensors[self._gguf_name(name)].type
        return kind if kind in BLOCK_BITS else None

    def blocks(self, name: str) -> SourceBlocks:
        """One tensor's quantized blocks."""
        gguf_name = self._gguf_name(name)
        blocks = parse_blocks(np.array(self._file.stored(gguf_name)), self._file.tensors[gguf_name].type)
        order = self._row_order(name)
        return blocks if order is None else blocks.reordered(order)

    def tokenizer(self) -> TokenizerFiles:
        """Build the tokenizer from the metadata."""
        return build_tokenizer(self._file, self.config["vocab_size"])

    def file_hashes(self) -> dict[str, str]:
        """Hex SHA-256 of the file."""
        return {self.path.name: sha256_file(self.path)}

    def _row_order(self, name: str) -> NDArray[np.intp] | None:
        """Which of the file's rows come where, None where they are in order.

        Hugging Face rotates dimension ``i`` of a head with ``i + head_dim/2``, llama.cpp ``2i`` and ``2i+1``: the
        order undoes that of a rotary weight ``[heads * head_dim, d_model]`` or bias.
        """
        if self.config["model_type"] not in _INTERLEAVED_ROTARY or not (".q_proj." in name or ".k_proj." in name):
            return None
        heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        rows, found = heads * self.config["head_dim"], self.shape(name)[0]
        if found != rows:
            raise ModelError(f"{self.path}: {name} has {found} rows, not {rows}; corrupt, fetch it again")
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()

    def _gguf_name(self, name: str) -> str:
        if name not in self._tensor_names:
            raise ModelError(f"{self.path}: no tensor {name}; the file is incomplete or of another family")
        return self._tensor_names[name]

    def _map_names(self) -> dict[str, str]:
        """Hugging Face's name of each tensor, to its name in the file."""
        names = {}
        for gguf_name in self._file.tensors:
            stem, _, kind = gguf_name.rpartition(".")
            layer = _LAYER_PATTERN.fullmatch(gguf_name)
            if gguf_name == _ROPE_FACTORS:
                continue
            if stem in _GLOBAL_NAMES:
                names[f"{_GLOBAL_NAMES[stem]}.{kind}"] = gguf_name
            elif layer and layer[2] in _LAYER_NAMES:
                names[f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"] = gguf_name
            else:
                # To leave a tensor out would change the model in silence.
                raise ModelError(
                    f"{self.path}: tensor {gguf_name} has no place in a dense {' or '.join(ARCHITECTURES)} "
                    "model; this variant is not supported"
                )
        return names

    def _build_config(self, architecture: str) -> dict[str, Any]:
        embedding = self._file.tensors.get(_EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise ModelError(f"{self.path}: no matrix {_EMBEDDING}; the file holds no language model")
        config: dict[str, Any] = {"model_type": architecture, "vocab_size": embedding.shape[0]}
        for key, gguf_key, kind in (
            ("hidden_size", "embedding_length", int),
            ("intermediate_size", "feed_forward_length", int),
            ("num_hidden_layers", "block_count", int),
            ("num_attention_heads", "attention.head_count", int),
            ("num_key_value_heads", "attention.head_count_kv", int),
            ("head_dim", "attention.key_length", int),
            ("max_position_embeddings", "context_length", int),
            ("rms_norm_eps", "attention.layer_norm_rms_epsilon", float),
            ("rope_theta", "rope.freq_base", float),
            ("sliding_window", "attention.sliding_window", int),
        ):
            config[key] = self._file.get(f"{architecture}.{gguf_key}", kind)
        config["tie_word_embeddings"] = "lm_head.weight" not in self._tensor_names
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._tensor_names
        config["rope_scaling"] = self._rope_scaling(architecture)
        config = normalize_config(config, str(self.path))
        if embedding.shape[1] != config["hidden_size"]:
            raise ModelError(
                f"{self.path}: {_EMBEDDING} has rows of {embedding.shape[1]}, "
                f"embedding_length is {config['hidden_size']}; corrupt, fetch it again"
            )
        head_dim = config["head_dim"]
        scaling = config["rope_scaling"] or {}
        if scaling.get("rope_type") == "factors" and len(scaling["factors"]) != head_dim // 2:
            raise ModelError(f"{self.path}: {_ROPE_FACTORS} has not {head_dim // 2} factors; corrupt, fetch it again")
        rotary = self._file.get(f"{architecture}.rope.dimension_count", int, head_dim)
        if rotary != head_dim or head_dim % 2:
            raise ModelError(
                f"{self.path}: rotary embedding over {rotary} of {head_dim} dimensions; "
                "only whole heads of even size are supported"
            )
        return config

    def _rope_scaling(self, architecture: str) -> dict[str, Any] | None:
        if _ROPE_FACTORS in self._file.tensors:
            return {"rope_type": "factors", "factors": self._file.tensor(_ROPE_FACTORS).tolist()}
        prefix = f"{architecture}.rope.scaling."
        rope_type = self._file.get(f"{prefix}type", str, "linear")
        factor = self._file.get(f"{prefix}factor", float)
        if rope_type not in ("none", "linear", "yarn"):
            raise ModelError(f"{self.path}: rope scaling {rope_type!r}; supported are linear and yarn")
        if rope_type == "none" or not factor:
            return None
        scaling = {"rope_type": rope_type, "factor": factor}
        if trained := self._file.get(f"{prefix}original_context_length", int):
            scaling["original_max_position_embeddings"] = trained
        return scaling
