"""Isthmus against llama.cpp on the same GGUF file, with the same threads and lengths.

Both stay loaded, each in a process of its own, and take turns test by test, A B A B; medians are compared,
because a machine that is busy with something else slows both. ``pp<N>`` is the prefill of N tokens with the
logits of the last, ``tg<N>`` the generation of N tokens one by one, as in llama-bench; both choose greedily.

    python benchmarks/peers.py [--model MODEL] [--bundle OUT/device | --rounded] [--threads 1,2]

The bundle is one made with ``isthmus export MODEL -o OUT --split all``; without it that is done first. It should
have the file's own precisions: the default, 4-bit layers with an 8-bit embedding and head, has those of the
catalog's ``smollm2-135m-instruct``. That file's Q4_1 blocks are copied with their offsets, which takes time;
``--rounded`` rounds them to plain 4-bit blocks instead. llama.cpp is used through llama-cpp-python, in this environment
or, with ``--llama-python``, in that of another Python; its bare C calls are driven, not its Python class.
"""

from __future__ import annotations

# Only the standard library up here: one process of this file runs where isthmus is, the other where llama_cpp is.
import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

INSTALL = """{python} has no llama_cpp ({error}). Install it with

    {python} -m pip install llama-cpp-python

which compiles llama.cpp for this machine (a C++ compiler, 10 minutes or more), or give the Python of an
environment that has it: --llama-python PATH"""

DIED = """the process that ran {peer} died with status {status}. If llama.cpp crashes in an AMX instruction (some
virtual machines announce AMX and fault on it), compile it without:

    CMAKE_ARGS="-DCMAKE_C_FLAGS='{flags}' -DCMAKE_CXX_FLAGS='{flags}'" pip install --no-cache-dir llama-cpp-python"""
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"

Test = tuple[int, int]  # prompt tokens, new tokens
Seconds = Callable[[int, int], float]  # of one test


def open_isthmus(bundle: str, threads: int, longest: int) -> tuple[Seconds, str]:
    """Open a bundle here; returns what runs a test, and a description."""
    import onnxruntime

    from isthmus.runtime.edge.bench import generate_exactly
    from isthmus.runtime.edge.model import EdgeModel

    model = EdgeModel(bundle, threads=threads)

    def seconds(prompt: int, new: int) -> float:
        return generate_exactly(model, prompt, new)[0]

    return seconds, f"onnxruntime {onnxruntime.__version__}"


def open_llama(gguf: str, threads: int, longest: int) -> tuple[Seconds, str]:
    """Open a GGUF file here with llama.cpp; returns what runs a test, and a description."""
    import ctypes
    import logging
    import random

    import llama_cpp
    import numpy as np

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = longest
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def next_token(ids: list[int]) -> int:
        array = (ctypes.c_int32 * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise SystemExit(f"llama.cpp could not decode {len(ids)} tokens")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def seconds(prompt: int, new: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        ids = random.Random(0).choices(range(vocabulary), k=prompt)
        started = perf_counter()
        for _ in range(new):
            ids = [next_token(ids)]
        return perf_counter() - started

    return seconds, f"{llama_cpp.__version__}, {llama_cpp.llama_print_system_info().decode().strip(' |')}"


OPENERS = {"isthmus": open_isthmus, "llama.cpp": open_llama}


class Peer:
    """A process with one peer loaded."""

    def __init__(self, name: str, python: str, source: str, threads: int, longest: int) -> None:
        self.name = name
        setup = json.dumps([name, source, threads, longest])
        self._process = subprocess.Popen(
            [python, __file__, "--serve", setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._read()

    def seconds(self, test: Test) -> float:
        """Run one test there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(test) + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(DIED.format(peer=self.name, status=self._process.wait(), flags=NO_AMX))
        return str(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(setup: str) -> None:
    """The other side of `Peer`: open, then run a test for each line."""
    name, *arguments = json.loads(setup)
    seconds, about = OPENERS[name](*arguments)
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds(*json.loads(line))), flush=True)


def compare(args: argparse.Namespace) -> None:
    """Alternate the peers and print the table."""
    from tabulate import tabulate
    from tqdm import tqdm

    from isthmus.export.sources import resolve_model

    gguf = str(resolve_model(args.model))
    if Path(gguf).suffix != ".gguf":
        raise SystemExit(f"{gguf}: llama.cpp reads .gguf files; give one, or a catalog name that stands for one")
    prompts, news = numbers(args.prompt_tokens), numbers(args.new_tokens)
    tests: dict[str, Test] = {f"pp{n}": (n, 1) for n in prompts} | {f"tg{n}": (1, n) for n in news}
    longest = max(map(sum, tests.values()))
    rows = []
    thread_counts = numbers(args.threads)
    with tqdm(total=len(thread_counts) * len(tests) * args.repetitions, unit="pair", leave=False) as bar:
        for threads in thread_counts:
            ours = Peer("isthmus", sys.executable, args.bundle, threads, longest)
            theirs = Peer("llama.cpp", args.llama_python, gguf, threads, longest)
            for name, test in tests.items():
                pairs = []
                for repetition in range(-1, args.repetitions):  # the first warms up
                    pair = ours.seconds(test), theirs.seconds(test)
                    if repetition >= 0:
                        pairs.append(pair)
                        bar.update()
                speeds = [max(test) / median(column) for column in zip(*pairs, strict=True)]
                rows.append([name, threads, *speeds, speeds[0] / speeds[1]])
            ours.close()
            theirs.close()
    headers = ["test", "threads", "isthmus tokens/s", "llama.cpp tokens/s", "ratio"]
    print(tabulate(rows, headers, floatfmt=("", "", ".1f", ".1f", ".2f")))
    print(f"\nmedians of {args.repetitions} alternating runs\nisthmus: {ours.about}\nllama.cpp: {theirs.about}")


def check_llama(python: str) -> None:
    """Exit with instructions unless a Python has llama_cpp."""
    probe = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True)
    if probe.returncode:
        raise SystemExit(INSTALL.format(python=python, error=(probe.stderr.strip() or "?").splitlines()[-1]))


def numbers(text: str) -> list[int]:
    """The numbers of a list with commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Compare, or be one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
        return
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a .gguf file or a catalog name")
    parser.add_argument("--bundle", metavar="DIR", help="OUT/device, exported from it with --split all")
    parser.add_argument("--rounded", action="store_true", help="export without copying the file's blocks")
    parser.add_argument("--threads", default="1,2", metavar="N[,N]")
    parser.add_argument("--prompt-tokens", default="128,512", metavar="N[,N]")
    parser.add_argument("--new-tokens", default="128", metavar="N[,N]")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="of each test, with each peer")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH", help="a Python that has llama_cpp")
    args = parser.parse_args()
    check_llama(args.llama_python)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.bundle:
            from isthmus.export.export import export_bundle

            with patch("isthmus.export.weights.copied", return_value=None) if args.rounded else nullcontext():
                export_bundle(args.model, Path(scratch, "bundle"), split=None, calibration_tokens=0)
            args.bundle = str(Path(scratch, "bundle", "device"))
        compare(args)


if __name__ == "__main__":
    main()
