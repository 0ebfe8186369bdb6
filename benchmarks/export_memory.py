"""Peak memory of an export, over the number of layers, at the shapes of Llama 2 7B.

    python benchmarks/export_memory.py [--layers 11,16] [--scratch DIR]

Writes synthetic float16 checkpoints (0.4 GB a layer, 0.5 GB for the vocabulary), exports each in a process of its own
and extrapolates the straight line through the peaks to 32 layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tabulate import tabulate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
FULL_LAYERS = 32
EXPORT = """
import sys
from isthmus import export_bundle
from isthmus.devices.memory import AnonymousPeak, process_memory
with AnonymousPeak() as anonymous:
    export_bundle(sys.argv[1], sys.argv[2], split=1)
print(process_memory().peak_resident_mb, anonymous.peak_mb)
"""


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write random weights, a shard a layer, so that writing takes little memory too."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    width, feed = CONFIG["hidden_size"], CONFIG["intermediate_size"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns), np.float32) * 0.02).astype(np.float16)

    shards: dict[str, str] = {}

    def save(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / name)
        shards.update(dict.fromkeys(tensors, name))

    vocabulary = matrix(CONFIG["vocab_size"], width)
    ones = np.ones(width, np.float16)
    save("vocabulary.safetensors", {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary.copy()})
    save("norm.safetensors", {"model.norm.weight": ones})
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}self_attn.{role}_proj.weight": matrix(width, width) for role in "qkvo"}
        tensors |= {f"{prefix}mlp.{role}_proj.weight": matrix(feed, width) for role in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = matrix(width, feed)
        tensors |= {f"{prefix}{norm}_layernorm.weight": ones.copy() for norm in ("input", "post_attention")}
        save(f"layer-{layer}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(use_regex=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="11,16", help="numbers of layers to measure")
    parser.add_argument("--scratch", type=Path, help="folder with some gigabytes of room")
    args = parser.parse_args()
    counts = [int(part) for part in args.layers.split(",")]
    peaks: list[tuple[float, float]] = []
    for layers in counts:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            checkpoint, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
            write_checkpoint(checkpoint, layers)
            command = [sys.executable, "-c", EXPORT, str(checkpoint), str(out)]
            resident, anonymous = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            peaks.append((float(resident), float(anonymous)))
    slopes, bases = np.polyfit(counts, peaks, 1)
    width, feed = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    layer_mb = 4 * (4 * width * width + 3 * width * feed) / 1e6
    rows = [[layers, *peak] for layers, peak in zip(counts, peaks, strict=True)]
    rows.append([f"{FULL_LAYERS} (extrapolated)", *(bases + slopes * FULL_LAYERS)])
    print(f"one layer in float32: {layer_mb:.0f} MB")
    print(tabulate(rows, headers=["layers", "peak resident MB", "peak anonymous MB"], floatfmt=".0f"))


if __name__ == "__main__":
    main()
