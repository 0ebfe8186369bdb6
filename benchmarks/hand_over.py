"""What a hand-over costs: bytes and time of both ways to send a session, against the paper's formula.

    python benchmarks/hand_over.py [--bundle OUT] [--at 64,256,1024]

The default model is exported at split 10 with all layers for the device, unless a bundle is given. A device that has
generated alone hands over in the middle of token w to a server process on a core of its own, over TLS on this machine;
then it is split as usual. ``exact`` sends hidden states in raw32 and the KV cache in float32, the default codec sends
hidden states at about 2 bits an element and the cache at 8. ``formula`` is what arXiv 2511.04002 counts, B_io(w, l) for
hidden states and B_kv(w, l) for the cache, but of the server's layers alone, which are all that must move; ``B_kv, all
layers`` is the paper's. Both at the bits an element that were used, side information included (measured for the codec).
Times are medians from the decision to the first token that the server chose; those of slower links are computed: the
median and the bytes over the rate. KL and top-1 tell what the transfer alone costs the predictions of the text's next
128 tokens, all that follows it being exact.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
from processes import serving
from tabulate import tabulate
from tqdm import tqdm

from isthmus import EdgeModel, HandOver, export_bundle
from isthmus.export.validate import log_softmax, validation_text
from isthmus.runtime.bundle import Manifest, open_bundle
from isthmus.runtime.codecs import default_codec, open_codec
from isthmus.runtime.edge.generate import Move
from isthmus.runtime.edge.handover import Send
from isthmus.runtime.segments import Embedding, Head, LayerStack
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.kv import decode_rows, encode_rows

ALONE = 4  # tokens that the device generates before it hands over
AFTER = 4  # tokens that it generates afterwards
FOLLOWING = 128  # tokens of the text on which the loss is measured
RATES_MBIT = (10, 1)
ROWS8_BITS = 8 + 16 / 64  # a float16 scale for each head of 64


def elements(manifest: Manifest, w: int, layers: Sequence[int]) -> int:
    """Elements of B_kv over some layers: w tokens' keys and values below the split, w - 1 behind it, a hidden state."""
    arch = manifest.architecture
    row = 2 * arch.kv_heads * arch.head_dim
    return sum(row * (w if layer < manifest.split else w - 1) for layer in layers) + arch.d_model


def formula(manifest: Manifest, w: int, send: Send, precision: str, sent: int) -> tuple[float, float, float | None]:
    """Bits an element of a way to send, and the kB that the formula makes of them: what must move, and all layers."""
    layers, hidden = range(manifest.architecture.layers), w * manifest.architecture.d_model
    if send == "hidden":
        bits = 32.0 if precision == "exact" else 8 * sent / hidden
        return bits, hidden * bits / 8e3, None
    bits = 32.0 if precision == "exact" else ROWS8_BITS
    moved = elements(manifest, w, layers[manifest.split :]) * bits / 8e3
    return bits, moved, elements(manifest, w, layers) * bits / 8e3


def hand_overs(model: EdgeModel, prompt: list[int], plan: HandOver, repetitions: int) -> list[Move]:
    """The hand-over of each of several generations."""
    moves: list[Move] = []
    for _ in range(repetitions):
        stream = model.tokens(prompt, max_new_tokens=ALONE + AFTER, end_tokens=(), hand_over=plan)
        for _ in stream:
            pass
        moves += stream.moves
        stream.close()
    return moves


class Losses:
    """What a transfer of a text's beginning does to the predictions of what follows, in this process."""

    def __init__(self, folder: Path) -> None:
        device = open_bundle(folder, "device", verify=False)
        back = device.own_back()
        self._codec = open_codec(device, default_codec(device))
        self._embedding, self._front = Embedding(device), LayerStack(device, 1)
        self._back, self._head = LayerStack(back, 1), Head(back, 1)
        self._kv = back.kv

    def measure(self, ids: list[int], w: int, send: Send) -> tuple[float, float]:
        """KL and top-1 agreement over the tokens from number w on, against a transfer that loses nothing."""
        hidden = self._front.session(len(ids)).forward(self._embedding.rows(ids)).copy()
        exact, lossy = self._back.session(len(ids)), self._back.session(len(ids))
        exact.forward(hidden[: w - 1])
        if send == "kv":
            coding, payload = encode_rows(exact.cache.rows(0, w - 1), exact=False)
            layers = self._back.layers
            first, last = layers.start, layers.stop
            chunk = pb.KVChunk(tokens=w - 1, first_layer=first, last_layer=last, coding=coding, payload=payload)
            lossy.cache.append(decode_rows(chunk, self._kv, layers))
        else:
            sent = self._codec.encode(hidden[: w - 1], ids[: w - 1])
            lossy.forward(self._codec.decode(sent, w - 1, hidden.shape[1]))
        expected, actual = (
            log_softmax(self._head.logits_many(session.forward(hidden[w - 1 :]))) for session in (exact, lossy)
        )
        kl = (np.exp(expected) * (expected - actual)).sum(axis=1).mean()
        return float(kl), float((expected.argmax(1) == actual.argmax(1)).mean())


def main() -> None:
    """Export, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--bundle", type=Path, metavar="OUT", help="exported with --device-layers all")
    parser.add_argument("--split", type=int, default=10)
    parser.add_argument("--text", type=Path, help="that the prompt is cut from; by default the one of validation")
    parser.add_argument("--at", default="64,256,1024", metavar="W,…", help="tokens at which sessions move")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.bundle or Path(scratch) / "bundle"
        if not args.bundle:
            export_bundle(args.model, folder, split=args.split, device_layers="all")
        command = ("serve", folder / "server", "--listen", "127.0.0.1:0", "--threads", 1, "--prefix-cache", 0)
        with serving(*command, cores=cores[-1:] if len(cores) > 1 else ()) as (address, _):
            if len(cores) > 1:
                os.sched_setaffinity(0, {cores[0]})
            losses = Losses(folder)
            models = {
                name: EdgeModel(folder / "device", server=address, codec=codec, threads=1)
                for name, codec in (("exact", "raw32"), ("default", None))
            }
            text = args.text.read_text(encoding="utf-8") if args.text else validation_text()
            manifest = models["exact"].manifest
            ids = models["exact"].tokenizer.encode(text)
            rows = []
            for w in tqdm([int(part) for part in args.at.split(",")]):
                text_ids = (ids * ((w + FOLLOWING) // len(ids) + 1))[: w + FOLLOWING - 1]
                for name, model in models.items():
                    for send in get_args(Send):
                        moves = hand_overs(model, text_ids[: w - ALONE], HandOver(w, send), args.repetitions)
                        sent, seconds = moves[0].bytes_up, median(move.seconds for move in moves)
                        slower = (seconds + 8 * sent / (rate * 1e6) for rate in RATES_MBIT)
                        sizes = [sent / 1e3, *formula(manifest, w, send, name, sent)]
                        lost = (None, None) if name == "exact" else losses.measure(text_ids, w, send)
                        rows.append([w, send, name, *sizes, seconds, *slower, *lost])
    headers = ["w", "send", "precision", "kB sent", "bits", "formula kB", "B_kv, all layers"]
    headers += ["s", *(f"s at {rate} Mbit/s" for rate in RATES_MBIT), "KL", "top-1"]
    print(tabulate(rows, headers, floatfmt=("", "", "", ".1f", ".2f", ".1f", ".1f", ".3f", ".2f", ".2f", ".5f", ".3f")))


if __name__ == "__main__":
    main()
