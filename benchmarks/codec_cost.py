"""What the codecs cost: microseconds per token to encode and to decode, and their share of front and back.

    python benchmarks/codec_cost.py [--bundle OUT] [--d-model 4096]

With the caches warm, on synthetic hidden states of each width, ``klt`` with tables fitted to such at 2 bits an element.
The shares at 4096 are of ten 4-bit layers as the front and twenty-two 8-bit layers as the back of Llama 2 7B's shapes,
one layer of each being measured. With a bundle also in place: one token at a time, right after a step of the front has
passed its weights through the caches. All on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from isthmus.devices.backend import Graph
from isthmus.export.klt_fit import GRADIENT_SHARE, CalibrationStates, fit_klt
from isthmus.quant.codec import Codec, Raw16, Raw32
from isthmus.quant.klt import KLT
from isthmus.quant.tabq import TabQ
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.codecs import open_codec
from isthmus.runtime.segments import Embedding, LayerStack

D_MODELS = (576, 4096)
TOKENS = (1, 128)
SECONDS_PER_CELL = 0.5
STEPS_IN_PLACE, WARM_UP = 300, 20
VOCABULARY = 1000
CALIBRATION = {576: 40, 4096: 40}  # texts of 128 tokens


def synthetic_hidden(tokens: int, d_model: int) -> NDArray[np.float32]:
    """Hidden states ``[tokens, d_model]`` float32 with heavy tails and three massive channels."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_t(6, (tokens, d_model)).astype(np.float32)
    hidden[:, rng.choice(d_model, 3, replace=False)] *= np.float32(100)
    return hidden


def synthetic_klt(d_model: int) -> KLT:
    """The codec ``klt`` at its level of about 2 bits per element, fitted to correlated noise."""
    rng = np.random.default_rng(1)
    spectrum = np.geomspace(3, 0.03, d_model).astype(np.float32)
    texts = [(rng.standard_normal((128, d_model)) * spectrum).astype(np.float32) for _ in range(CALIBRATION[d_model])]
    ids = [rng.integers(0, VOCABULARY, 128).tolist() for _ in texts]
    table = np.zeros((VOCABULARY, d_model), np.float32)  # tells nothing of a token
    return KLT(fit_klt(CalibrationStates(ids, texts, texts[::GRADIENT_SHARE], table, table), lambda *call: None), 2)


def median_microseconds(call: Callable[[], object]) -> float:
    """Median time of one call, in microseconds, over `SECONDS_PER_CELL`."""
    call()
    times = []
    stop = time.perf_counter() + SECONDS_PER_CELL
    while time.perf_counter() < stop:
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return float(np.median(times)) / 1000


def layer_microseconds(bits: int, tokens: int) -> float:
    """Microseconds per token of one layer of Llama 2 7B's shapes after 128 tokens of context, on one thread."""
    from isthmus.export.decoder import SegmentBuilder, build_block
    from isthmus.export.families.common import LayerTensors
    from isthmus.export.graph import GraphWriter
    from isthmus.export.weights import Weights
    from isthmus.runtime.bundle import Architecture, KVSpec

    arch = Architecture("llama", 32, 4096, 32, 32, 128, 11008, 32000, 1e-5, 1e4, 4096, False)
    shapes = {"up": (11008, 4096), "gate": (11008, 4096), "down": (4096, 11008), "norm": (4096,)}
    rng = np.random.default_rng(0)

    class Noise:
        def tensor(self, name: str) -> NDArray[np.float32]:
            shape = next((shape for key, shape in shapes.items() if key in name), (4096, 4096))
            return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    fields = LayerTensors.__dataclass_fields__
    names = LayerTensors(**{field: field for field in fields if field != "qkv_biases"})
    with tempfile.TemporaryDirectory() as folder:
        writer = GraphWriter(Path(folder), "layer")
        kv = KVSpec(32, arch.kv_heads, arch.head_dim)
        weights = Weights.uniform(Noise(), bits, 32)  # type: ignore[arg-type]
        build_block(SegmentBuilder(writer, arch, weights), {0: names}, 512, kv, {})
        graph = Graph(writer.graph_path, 1)
        cache = np.zeros((1, 32, 512, 128), np.float32)
        length = 128 + tokens
        inputs = {
            "hidden": np.zeros((1, tokens, 4096), np.float32),
            "past_key.0": cache,
            "past_value.0": cache,
            "seqlens_k": np.array([length], np.int32),
            "total_sequence_length": np.array(length + 1, np.int32),
        }
        return median_microseconds(lambda: graph.run(inputs, "hidden_out")) / tokens


def measure_in_place(folder: Path, threads: int = 1) -> list[list[object]]:
    """A row a codec: medians of front, encode and decode of one token in microseconds, the codec's share in percent.

    A codec runs many steps on end, as in a decode, and is held against the front of the same steps.
    """
    bundle = open_bundle(folder, "device", verify=False)
    embedding, front = Embedding(bundle), LayerStack(bundle, threads)
    ids = np.random.default_rng(0).integers(0, bundle.manifest.architecture.vocab_size, STEPS_IN_PLACE).tolist()
    rows: list[list[object]] = []
    for name in bundle.manifest.codecs:
        codec, session = open_codec(bundle, name), front.session(len(ids))
        times = []
        for token in ids:
            start = time.perf_counter_ns()
            hidden = session.forward(embedding.rows([token]))
            forwarded = time.perf_counter_ns()
            payload = codec.encode(hidden, [token])
            encoded = time.perf_counter_ns()
            codec.decode(payload, *hidden.shape)
            decoded = time.perf_counter_ns()
            times.append((forwarded - start, encoded - forwarded, decoded - encoded))
        forward, encode, decode = (float(median) / 1000 for median in np.median(times[WARM_UP:], axis=0))
        rows.append([name, forward, encode, decode, 100 * encode / forward])
    return rows


def measure_warm(d_model: int, tokens: int, codecs: Sequence[Codec]) -> list[list[object]]:
    """A row a codec: microseconds per token, bits per element."""
    rows: list[list[object]] = []
    for codec in codecs:
        hidden = synthetic_hidden(tokens, d_model)
        ids = np.random.default_rng(2).integers(0, VOCABULARY, tokens).tolist()
        if isinstance(codec, KLT):
            spectrum = np.geomspace(3, 0.03, d_model)
            hidden = (np.random.default_rng(3).standard_normal((tokens, d_model)) * spectrum).astype(np.float32)
        payload = codec.encode(hidden, ids)
        encode = median_microseconds(partial(codec.encode, hidden, ids)) / tokens
        decode = median_microseconds(partial(codec.decode, payload, tokens, d_model)) / tokens
        rows.append([d_model, tokens, codec.name, encode, decode, 8 * len(payload) / hidden.size])
    return rows


def main() -> None:
    """Measure every codec at every size and print a table, and one of a bundle's front if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, metavar="OUT", help="a bundle, of which the device half is read")
    parser.add_argument("--d-model", type=int, choices=D_MODELS, action="append", help="only this width")
    args = parser.parse_args()
    rows, shares = [], []
    for d_model in args.d_model or D_MODELS:
        codecs: list[Codec] = [Raw32(), Raw16(), TabQ(), synthetic_klt(d_model)]
        for tokens in TOKENS:
            measured = measure_warm(d_model, tokens, codecs)
            rows += measured
            if d_model == 4096:
                front, back = 10 * layer_microseconds(4, tokens), 22 * layer_microseconds(8, tokens)
                shares += [[tokens, row[2], front, back, 100 * row[3] / front, 100 * row[4] / back] for row in measured]
    headers = ["d_model", "tokens", "codec", "encode us", "decode us", "bits"]
    print("per token, median; bits per element with everything counted\n")
    print(tabulate(rows, headers, floatfmt=("d", "d", "", ".1f", ".1f", ".3f")))
    if shares:
        headers = ["tokens", "codec", "front us", "back us", "encode, % of front", "decode, % of back"]
        print("\nbeside ten 4-bit layers and twenty-two 8-bit layers of Llama 2 7B's shapes, per token\n")
        print(tabulate(shares, headers, floatfmt=("d", "", ".0f", ".0f", ".2f", ".2f")))
    if args.bundle:
        print("\nin place, one token after each step of the front on one thread, median\n")
        headers = ["codec", "front us", "encode us", "decode us", "encode, % of front"]
        print(tabulate(measure_in_place(args.bundle), headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
