"""What a prompt costs whose beginning the server knows: time to the first token, and what keeping it costs the others.

    python benchmarks/prefix_cache.py --bundle OUT [--shared 64,300,1000] [--repetitions 7] [--json]

A device asks a server process over TLS on this machine. ``off`` is a server without the cache, ``miss`` one with it
that has never seen the prompt, ``hit`` the same when another session has sent the prompt's beginning before: the shared
tokens, then 16 of its own. All prompts are random, and new in each repetition, in which the three come in turn. The
device computes and sends all of its hidden states in each case. ``server`` is the processor time of the server process,
all of its work included. Then, in this process and of the shared tokens alone, processor time of the cache: hashing (at
each step), keeping (once), copying (at a hit), beside that of the layers, which a hit saves. All are medians in ms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
from processes import serving
from tabulate import tabulate

from isthmus import EdgeModel
from isthmus.runtime.back import BackEngine
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.batcher import LONG_RUN_ROWS
from isthmus.runtime.server.prefix_cache import BLOCK, Prefix, PrefixCache

OWN = 16  # tokens of a prompt that no other has


def processor_ms(process: int) -> float:
    """What a process has used of the processors so far."""
    threads = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in threads) / 1e6


def first_token(model: EdgeModel, server: int, ids: list[int]) -> tuple[float, float, int]:
    """Ms to the first token, processor time of the server until then, and the token."""
    stream = model.tokens(ids, max_new_tokens=1, end_tokens=(), draft="off")
    try:
        started, used = perf_counter(), processor_ms(server)
        token = next(iter(stream))
        return 1e3 * (perf_counter() - started), processor_ms(server) - used, token.id
    finally:
        stream.close()


def ask(off: tuple[EdgeModel, int], kept: tuple[EdgeModel, int], shared: int, repetitions: int) -> dict[str, Any]:
    """Medians of the three cases at one length."""
    rng = np.random.default_rng()
    vocabulary = off[0].manifest.architecture.vocab_size
    total: dict[str, list[float]] = {"off": [], "miss": [], "hit": []}
    server: dict[str, list[float]] = {"off": [], "miss": [], "hit": []}
    for _ in range(repetitions + 1):  # the first warms up
        beginning = rng.integers(vocabulary, size=shared).tolist()
        ids = [*beginning, *rng.integers(vocabulary, size=OWN).tolist()]
        tokens = {}
        first_ids = [*beginning, *rng.integers(vocabulary, size=OWN).tolist()]
        for case, (model, process), prompt in (("off", off, ids), ("miss", kept, first_ids), ("hit", kept, ids)):
            milliseconds, at_server, tokens[case] = first_token(model, process, prompt)
            total[case].append(milliseconds)
            server[case].append(at_server)
        if tokens["hit"] != tokens["off"]:
            raise SystemExit(f"{shared} shared tokens: another token at a hit: {tokens}")
    return {case: {"first_token_ms": median(total[case][1:]), "server_ms": median(server[case][1:])} for case in total}


def own_cost(engine: BackEngine, shared: int, repetitions: int) -> dict[str, float]:
    """Medians of the processor time of the cache at one length, and of the layers; in ms."""
    rows = shared - shared % BLOCK
    d_model = engine.manifest.architecture.d_model
    times: dict[str, list[float]] = {"hash": [], "keep": [], "copy": [], "layers": []}

    def timed(name: str, function: Callable[[], object]) -> None:
        started = process_time()
        function()
        times[name].append(1e3 * (process_time() - started))

    for repetition in range(repetitions + 1):
        hidden = np.random.default_rng(repetition).standard_normal((rows, d_model), np.float32)
        cache = PrefixCache(1 << 30)
        first, second = (engine.new_session(shared + OWN, Sampling()) for _ in range(2))
        prefixes = [Prefix(cache, session, "") for session in (first, second)]

        def run() -> None:
            for at in range(0, rows, LONG_RUN_ROWS):
                engine.advance([(first, hidden[at : at + LONG_RUN_ROWS], 0)])  # noqa: B023  (called at once)

        timed("hash", lambda: prefixes[0].reuse(hidden, 0))  # noqa: B023
        timed("layers", run)
        timed("keep", prefixes[0].offer)
        timed("copy", lambda: prefixes[1].reuse(hidden, 0))  # noqa: B023
        assert second.length == rows
        for session in (first, second):
            session.close()
    found = {name: median(values[1:]) for name, values in times.items()}
    found["copy"] -= found["hash"]  # a hit hashes, too
    return found | {"mb": cache.bytes / 1e6}


def main() -> None:
    """Measure, and print the tables or the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT")
    parser.add_argument("--shared", default="64,300,1000", help="tokens that prompts share (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    args = parser.parse_args()
    lengths = [int(each) for each in args.shared.split(",")]
    with ExitStack() as stack:
        servers = []
        for cache in ("0", "256MB"):
            command = ("serve", args.bundle / "server", "--listen", "127.0.0.1:0", "--threads", 1)
            address, process = stack.enter_context(serving(*command, "--prefix-cache", cache))
            servers.append((EdgeModel(args.bundle / "device", server=address, threads=1), process))
        asked = {shared: ask(*servers, shared, args.repetitions) for shared in lengths}
    engine = BackEngine(open_bundle(args.bundle / "server", "server"), 1, together=4, capacity=max(lengths) + OWN)
    rows = [
        {"shared": shared, **asked[shared], "cache": own_cost(engine, shared, args.repetitions)} for shared in lengths
    ]
    if args.json:
        print(json.dumps({"own": OWN, "block": BLOCK, "rows": rows}))
        return
    cases = ("off", "miss", "hit")
    first = [
        [row["shared"], *(row[case]["first_token_ms"] for case in cases), *(row[case]["server_ms"] for case in cases)]
        for row in rows
    ]
    headers = ["shared tokens", *(f"first token, {case}" for case in cases), *(f"server, {case}" for case in cases)]
    print(tabulate(first, headers, tablefmt="github", floatfmt=".1f"), end="\n\n")
    cost = [[row["shared"], *(row["cache"][name] for name in ("layers", "hash", "keep", "copy", "mb"))] for row in rows]
    print(
        tabulate(
            cost, ["shared tokens", "layers", "hash", "keep", "copy", "MB kept"], tablefmt="github", floatfmt=".2f"
        )
    )


if __name__ == "__main__":
    main()
