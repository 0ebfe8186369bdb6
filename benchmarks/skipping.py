"""Skip decoding and FFN skipping: what layers, or networks, that are left out do to speed, perplexity and tasks.

    isthmus export smollm2-135m-instruct -o OUT --split 10 --layers-per-block 2
    python benchmarks/skipping.py --bundle OUT --text FILE [--task NAME FILE ...] --schedules 28:28:1,30:24:96
    isthmus export smollm2-135m-instruct -o OUT --split 10 --ffn-skip
    python benchmarks/skipping.py --bundle OUT --plain PLAIN --text FILE [--task NAME FILE ...] --ffn-skip 0.99,0.98

- Text: windows whose first `PROMPT` tokens are the prompt and run whole; what is predicted after the others counts. KL
  and top-1 agreement are with the same bundle run whole. ``left out`` is the share of all the model's feed-forward
  networks that these tokens leave out.
- Tasks: an item's context runs whole, its answers by the schedule or threshold; the difference is taken item by item.
- Speed: tokens after a prompt over a loopback link, nothing drafted, all in turns; ``x`` is the median ratio to the
  whole model in the same round: of the same bundle, or of the one that ``--plain`` names, whose graphs cannot skip
  networks and are faster for it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from tabulate import tabulate
from tqdm import tqdm

from isthmus.export.validate import log_softmax
from isthmus.runtime.bundle import FFN_SIMILARITY, Half, open_bundle
from isthmus.runtime.chain import HEAD_ROWS, Chain, chunks
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.evaluate import read_text, text_windows
from isthmus.runtime.harness import BundleLM, item_scores
from isthmus.runtime.segments import SIDES, Embedding
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.skipping import NO_BYPASS, Bypass, SkipSchedule, bypass_order
from isthmus.runtime.tasks import read_docs
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

WINDOW, PROMPT = 256, 128
WHOLE = "whole"

Way = SkipSchedule | float | None  # a schedule, a threshold, or nothing is left out


class SkippingLM(BundleLM):
    """A bundle whose answers, but not their contexts, leave something out."""

    def __init__(self, chain: Chain, way: Way, **options: Any) -> None:
        super().__init__(chain, **options)
        self._way = way

    def _score(self, context: list[int], following: list[int]) -> tuple[float, bool]:
        self._chain.leave_out(bypass(self._chain, self._way, len(context)))
        return super()._score(context, following)


def bypass(chain: Chain, way: Way, prompt_tokens: int) -> Bypass:
    """What is left out after a prompt."""
    if way is None:
        return NO_BYPASS
    if isinstance(way, float):
        return Bypass(ffn_similarity=way, ffn_from=prompt_tokens)
    manifest = chain.manifest
    return Bypass(way.blocks(bypass_order(manifest), manifest.architecture.layers, prompt_tokens))


def on_text(chain: Chain, windows: list[list[int]], way: Way) -> dict[str, float]:
    """Perplexity behind the prompts, and KL and agreement with the whole model there."""
    losses, kls, agreed = [], [], []
    for ids in tqdm(windows, desc=str(way or WHOLE), leave=False, disable=None):
        final = []
        for each in (None, way):
            chain.truncate(0)
            chain.leave_out(bypass(chain, each, PROMPT))
            final.append(chain.back(chain.front(ids[:-1]))[PROMPT:])
        targets = np.array(ids[PROMPT + 1 :])
        for rows in chunks(len(targets), HEAD_ROWS):
            full, skipped = (log_softmax(chain.logits(hidden[rows])) for hidden in final)
            losses.append(-skipped[np.arange(len(skipped)), targets[rows]])
            kls.append((np.exp(full) * (full - skipped)).sum(1))
            agreed.append(full.argmax(1) == skipped.argmax(1))
    loss, kl, same = (float(np.concatenate(parts).mean()) for parts in (losses, kls, agreed))
    return {"perplexity": float(np.exp(loss)), "kl": kl, "top1": same}


class Networks:
    """The blocks of a bundle, opened so that they tell which rows leave which network out."""

    def __init__(self, folder: Path) -> None:
        halves: tuple[Half, ...] = ("device", "server")
        bundles = [open_bundle(folder / half, half, verify=False, use_installed=False) for half in halves]
        self._layers = bundles[0].manifest.architecture.layers
        self._embedding = Embedding(bundles[0])
        self._blocks = [(bundle, segment) for bundle in bundles for segment in bundle.segments("block")]
        self._sessions = [self._open(bundle.graph_path(segment)) for bundle, segment in self._blocks]

    @staticmethod
    def _open(path: Path) -> tuple[ort.InferenceSession, list[str]]:
        model = onnx.load(path, load_external_data=False)
        deciding = [node.output[0] for node in model.graph.node if node.output[0].endswith(".leaves")]
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, None) for name in deciding
        )
        options = ort.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return ort.InferenceSession(model.SerializeToString(), options), deciding

    def left_out(self, windows: list[list[int]], similarity: float) -> float:
        """Share of all networks that tokens behind the prompts leave out."""
        return float(np.mean([share for ids in windows for share in self._shares(ids[:-1], similarity)]))

    def _shares(self, ids: list[int], similarity: float) -> Iterator[float]:
        hidden, tokens = self._embedding.rows(ids)[None], len(ids)
        thresholds = Bypass(ffn_similarity=similarity, ffn_from=PROMPT).ffn_thresholds(0, tokens)
        left_out = np.zeros(tokens - PROMPT)
        for (bundle, segment), (session, deciding) in zip(self._blocks, self._sessions, strict=True):
            inputs: dict[str, Any] = {
                "hidden": hidden,
                "seqlens_k": np.array([tokens], np.int32),
                "total_sequence_length": np.array(tokens + 1, np.int32),
                FFN_SIMILARITY: thresholds[None, :, None],
            }
            for layer in range(segment.first_layer, segment.last_layer):
                for side in SIDES:
                    inputs[f"past_{side}.{layer}"] = np.zeros(bundle.kv.shape(tokens), bundle.kv.dtype)
            hidden, *decided = session.run(["hidden_out", *deciding], inputs)
            for leaves in decided:
                left_out += leaves[0, PROMPT:tokens, 0]
        yield float(left_out.mean()) / self._layers


def on_tasks(chain: Chain, way: Way, tasks: list[tuple[str, list[Any]]]) -> dict[str, Any]:
    """Each item's score, by task."""
    scores = {}
    for name, docs in tasks:
        with tqdm(desc=f"{name}, {way or WHOLE}", leave=False, disable=None) as bar:
            model = SkippingLM(chain, way, progress=lambda what, done, total, bar=bar: bar.update())
            scores[name] = item_scores(model, name, docs)["acc"]
    return scores


def speeds(bundle: Path, plain: Path | None, ways: list[Way], tokens: int, rounds: int) -> dict[Way, Any]:
    """Tokens/s of each way, round by round, and the mean layers of a token; those of None by the plain bundle."""
    found: dict[Way, list[float]] = {way: [] for way in ways}
    layers: dict[Way, float] = {}
    with ExitStack() as running:
        servers = {
            folder: running.enter_context(
                BackServer.from_bundle(
                    folder / "server", "127.0.0.1:0", threads=1, security=ServerSecurity(insecure=True)
                )
            )
            for folder in {bundle, plain or bundle}
        }
        models = {}
        for way in ways:
            folder = plain if plain and way is None else bundle
            models[way] = EdgeModel(
                folder / "device",
                server=servers[folder].address,
                security=ChannelSecurity(insecure=True),
                codec="raw16",
                threads=1,
                draft="off",
                skip_schedule=way if isinstance(way, SkipSchedule) else None,
                ffn_skip=way if isinstance(way, float) else None,
            )
        ids = models[None].prompt_ids("Once upon a time, in a small village by the sea,")
        for _ in tqdm(range(rounds), desc="speed", leave=False, disable=None):
            for way, model in models.items():
                with model.stream(ids, max_new_tokens=tokens) as stream:
                    for _piece in stream:
                        pass
                found[way].append(stream.result.decode_tokens_per_s)
                layers[way] = stream.result.mean_layers or 0.0
    return {way: (found[way], layers[way]) for way in ways}


def main() -> None:
    """Measure and print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, metavar="OUT")
    parser.add_argument("--plain", type=Path, metavar="OUT", help="the same export without --ffn-skip")
    parser.add_argument("--schedules", default="", metavar="A:B:N,…")
    parser.add_argument("--ffn-skip", default="", metavar="X,…", help="thresholds")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--windows", type=int, default=24, metavar="N")
    parser.add_argument("--task", nargs=2, action="append", default=[], metavar=("NAME", "FILE"))
    parser.add_argument("--items", type=int, default=400, metavar="N", help="of each task")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="generated for the speed")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    ways: list[Way] = [None, *map(SkipSchedule.parse, filter(None, args.schedules.split(",")))]
    ways += map(float, filter(None, args.ffn_skip.split(",")))
    measured = speeds(args.bundle, args.plain, ways, args.tokens, args.rounds)
    chain = Chain.open(args.bundle / "device", args.bundle / "server")
    windows = text_windows(
        chain.tokenizer, read_text(args.text)[0], window=WINDOW + 1, tokens=args.windows * (WINDOW + 1)
    )
    tasks = [(name, list(read_docs(name, path))[: args.items]) for name, path in args.task]
    networks = Networks(args.bundle) if args.ffn_skip else None
    results, rows, whole = {}, [], None
    for way in ways:
        text, scores = on_text(chain, windows, way), on_tasks(chain, way, tasks)
        whole = scores if whole is None else whole
        rates, layers = measured[way]
        ratio = median(own / full for own, full in zip(rates, measured[None][0], strict=True))
        left_out = networks.left_out(windows, way) if networks and isinstance(way, float) else 0.0
        row = [str(way or WHOLE), f"{layers:.1f}", f"{left_out:.1%}", f"{median(rates):.1f}", f"{ratio:.2f}"]
        row += [f"{text['perplexity']:.2f}", f"{text['kl']:.3f}", f"{text['top1']:.3f}"]
        each: dict[str, Any] = {"layers": layers, "ffn_left_out": left_out} | text
        each |= {"tokens_per_s": median(rates), "ratio": ratio}
        for name, values in scores.items():
            drop = values - whole[name]
            error = float(drop.std(ddof=1) / len(drop) ** 0.5)
            each[name] = {"accuracy": float(values.mean()), "difference": float(drop.mean()), "difference_se": error}
            row.append(f"{100 * values.mean():.1f} ({100 * drop.mean():+.1f} ± {100 * error:.1f})")
        results[str(way or WHOLE)] = each
        rows.append(row)
    headers = ["way", "layers a token", "networks left out", "tokens/s", "x", "perplexity", "KL", "top-1"]
    headers += [name for name, _ in tasks]
    print(json.dumps(results) if args.json else tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
