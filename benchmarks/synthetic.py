"""Checkpoints of random weights, at the shapes of Llama 2 7B or at these divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def llama_config(layers: int, divisor: int = 1) -> dict[str, Any]:
    """Llama 2 7B's numbers with so many layers, all widths, heads and the vocabulary divided."""
    heads = 32 // divisor
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 4096 // divisor,
        "intermediate_size": 11008 // divisor,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 128,
        "vocab_size": 32000 // divisor,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write float16 weights, a shard a layer, so that writing takes little memory too."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    width, feed = config["hidden_size"], config["intermediate_size"]

    def matrix(rows: int, columns: int) -> NDArray[np.float16]:
        return (rng.standard_normal((rows, columns), np.float32) * 0.02).astype(np.float16)

    shards: dict[str, str] = {}

    def save(name: str, tensors: dict[str, NDArray[np.float16]]) -> None:
        save_file(tensors, folder / name)
        shards.update(dict.fromkeys(tensors, name))

    vocabulary = matrix(config["vocab_size"], width)
    ones = np.ones(width, np.float16)
    save("vocabulary.safetensors", {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary.copy()})
    save("norm.safetensors", {"model.norm.weight": ones})
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}self_attn.{role}_proj.weight": matrix(width, width) for role in "qkvo"}
        tensors |= {f"{prefix}mlp.{role}_proj.weight": matrix(feed, width) for role in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = matrix(width, feed)
        tensors |= {f"{prefix}{norm}_layernorm.weight": ones.copy() for norm in ("input", "post_attention")}
        save(f"layer-{layer}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(use_regex=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
