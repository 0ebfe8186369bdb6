"""Tiny source models for the checkpoint tests."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

D_MODEL, HEADS, KV_HEADS, HEAD_DIM, D_FF = 32, 4, 2, 8, 64


def permute_like_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order that llama.cpp's converter gives to query and key weights of Llama models."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


class TinyGGUF:
    """Writes a one-layer model with random weights; tests change metadata or tensors before `write`."""

    def __init__(self, architecture: str = "llama") -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.architecture = architecture
        self.tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "he", "ll", "hell", "hello"]
        self.types = [3, 3, 3] + [1] * (len(self.tokens) - 3)
        self.merges: list[str] | None = ["h e", "l l", "he ll", "hell o"]
        self.scores: list[float] | None = None
        rng = np.random.default_rng(0)
        qkv = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        shapes = {f"model.layers.0.self_attn.{n}_proj.weight": (rows, D_MODEL) for n, rows in qkv.items()}
        shapes |= {
            "model.embed_tokens.weight": (len(self.tokens), D_MODEL),
            "model.layers.0.input_layernorm.weight": (D_MODEL,),
            "model.layers.0.self_attn.o_proj.weight": (D_MODEL, HEADS * HEAD_DIM),
            "model.layers.0.post_attention_layernorm.weight": (D_MODEL,),
            "model.layers.0.mlp.gate_proj.weight": (D_FF, D_MODEL),
            "model.layers.0.mlp.up_proj.weight": (D_FF, D_MODEL),
            "model.layers.0.mlp.down_proj.weight": (D_MODEL, D_FF),
            "model.norm.weight": (D_MODEL,),
        }
        if architecture == "qwen2":
            shapes |= {f"model.layers.0.self_attn.{n}_proj.bias": (rows,) for n, rows in qkv.items()}
        self.weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 1)
        self.tensors: dict[str, np.ndarray] = {}
        for name, value in self.weights.items():
            stored = value
            if architecture == "llama" and ".q_proj." in name:
                stored = permute_like_llama_cpp(value, HEADS)
            elif architecture == "llama" and ".k_proj." in name:
                stored = permute_like_llama_cpp(value, KV_HEADS)
            stem, _, kind = name.rpartition(".")
            self.tensors[f"{names.get_name(stem)}.{kind}"] = stored
        self.metadata: dict[str, Any] = {
            f"{architecture}.context_length": 128,
            f"{architecture}.embedding_length": D_MODEL,
            f"{architecture}.block_count": 1,
            f"{architecture}.feed_forward_length": D_FF,
            f"{architecture}.attention.head_count": HEADS,
            f"{architecture}.attention.head_count_kv": KV_HEADS,
            f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{architecture}.rope.freq_base": 100000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": "{{ messages }}",
        }

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_string(key, value)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        for name, value in self.tensors.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture
def source_tiny_gguf() -> type[TinyGGUF]:
    return TinyGGUF
