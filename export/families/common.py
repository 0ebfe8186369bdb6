"""What the families share: Hugging Face's config keys and tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ModelError
from ...runtime.bundle import Architecture
from ..checkpoint import Checkpoint

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

ROLES = ("qkv", "attention_output", "gate", "up", "down")  # a layer's matrices, as the graphs multiply with them


@dataclass(frozen=True)
class LayerTensors:
    """Checkpoint names of one layer's weights, by their role in the graph."""

    input_norm: str
    query: str
    key: str
    value: str
    attention_output: str
    post_norm: str
    gate: str
    up: str
    down: str
    qkv_biases: tuple[str, ...] = ()

    def matrices(self) -> dict[str, tuple[str, ...]]:
        """Checkpoint names of the tensors that make up each matrix of `ROLES`."""
        qkv = (self.query, self.key, self.value)
        others = (self.attention_output, self.gate, self.up, self.down)
        return {"qkv": qkv} | dict(zip(ROLES[1:], ((name,) for name in others), strict=True))

    def shapes(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """The shape that each weight must have, by its checkpoint name."""
        width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        return {
            self.input_norm: (arch.d_model,),
            self.query: (width, arch.d_model),
            self.key: (kv_width, arch.d_model),
            self.value: (kv_width, arch.d_model),
            self.attention_output: (arch.d_model, width),
            self.post_norm: (arch.d_model,),
            self.gate: (arch.d_ff, arch.d_model),
            self.up: (arch.d_ff, arch.d_model),
            self.down: (arch.d_model, arch.d_ff),
        } | dict(zip(self.qkv_biases, ((width,), (kv_width,), (kv_width,)), strict=False))


def weight_tensors(arch: Architecture, layers: Sequence[LayerTensors]) -> dict[str, tuple[str, ...]]:
    """Checkpoint names of the tensors that make up each weight: ``embedding``, ``layers.0.qkv``, ..., ``head``."""
    matrices = {
        f"layers.{layer}.{role}": tensors
        for layer, names in enumerate(layers)
        for role, tensors in names.matrices().items()
    }
    return {"embedding": (EMBEDDING,), **matrices, "head": (EMBEDDING if arch.tied_embeddings else HEAD,)}


def base_architecture(
    config: dict[str, Any], family: str, *, sliding_window: int | None, qkv_bias: bool = False
) -> Architecture:
    """Architecture from the config keys that Llama-like models share.

    Raises:
        ModelError: a key is missing, or asks for something that the graphs do not compute.
    """
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"hidden_act={activation!r}: the builder computes silu only")
    if config.get("mlp_bias") or (config.get("attention_bias") and not qkv_bias):
        raise ModelError("attention_bias/mlp_bias: this family's builder has no such bias")
    try:
        heads = int(config["num_attention_heads"])
        d_model = int(config["hidden_size"])
        arch = Architecture(
            family=family,
            layers=int(config["num_hidden_layers"]),
            d_model=d_model,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or d_model // heads),
            d_ff=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            norm_epsilon=float(config["rms_norm_eps"]),
            rope_theta=float(config.get("rope_theta") or 10000.0),
            rope_scaling=config.get("rope_scaling"),
            max_positions=int(config["max_position_embeddings"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=int(sliding_window) if sliding_window else None,
            qkv_bias=qkv_bias,
        )
    except KeyError as error:
        raise ModelError(f"the checkpoint's config has no {error.args[0]!r}; is it complete?") from error
    if arch.head_dim % 16:
        raise ModelError(
            f"head_dim={arch.head_dim}: onnxruntime's attention needs a multiple of 16 with rotary embedding"
        )
    if heads % arch.kv_heads:
        raise ModelError(f"num_key_value_heads={arch.kv_heads}: must divide num_attention_heads={heads}")
    return arch


def layer_tensors(layer: int, *, qkv_bias: bool) -> LayerTensors:
    """Hugging Face's names for a Llama-like layer."""
    prefix = f"model.layers.{layer}."
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    return LayerTensors(
        input_norm=f"{prefix}input_layernorm.weight",
        query=f"{attention}q_proj.weight",
        key=f"{attention}k_proj.weight",
        value=f"{attention}v_proj.weight",
        attention_output=f"{attention}o_proj.weight",
        post_norm=f"{prefix}post_attention_layernorm.weight",
        gate=f"{mlp}gate_proj.weight",
        up=f"{mlp}up_proj.weight",
        down=f"{mlp}down_proj.weight",
        qkv_biases=tuple(f"{attention}{role}_proj.bias" for role in "qkv") if qkv_bias else (),
    )


def check_tensors(checkpoint: Checkpoint, arch: Architecture, layers: Iterable[LayerTensors]) -> None:
    """Hold a checkpoint's tensors against what the graphs compute, before anything is written.

    Raises:
        ModelError: a tensor is missing, has another shape than the config says, or has no place in the graphs.
    """
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (arch.vocab_size, arch.d_model), FINAL_NORM: (arch.d_model,)}
    if not arch.tied_embeddings:
        expected[HEAD] = (arch.vocab_size, arch.d_model)
    for names in layers:
        expected |= names.shapes(arch)
    for name, shape in expected.items():
        found = tuple(checkpoint.shape(name))
        if found != shape:
            raise ModelError(f"{name}: shape {found} where the config asks for {shape}; fetch the checkpoint again")
    for name in checkpoint.names():
        # Tied checkpoints may repeat the embedding as the head; old ones hold the rotary frequencies.
        if name not in expected and name != HEAD and not name.endswith("rotary_emb.inv_freq"):
            raise ModelError(
                f"{name}: the {arch.family} builder has no place for this tensor, and to leave it out would change "
                "the model; this variant is not supported"
            )
