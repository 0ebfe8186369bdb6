"""The main job from end to end: pull, export, serve, generate over TLS, and what it cost.

`make demo` runs this. Everything is written below ``build/demo``; the model is kept in the user's cache.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tabulate import tabulate

from isthmus import EdgeModel
from isthmus.devices.memory import ProcessMemory, process_memory
from isthmus.runtime.edge.stream import Generation

FOLDER = Path("build/demo")
SPLIT, FRONT_BITS, BACK_BITS = 10, 4, 8
QUESTION = "Explain in three sentences why the sky is blue."
NEW_TOKENS = 96
CALIBRATION_TOKENS = 16384  # a quarter of the default, for a demo that does not wait
ISTHMUS = [sys.executable, "-m", "isthmus.cli.main"]


def main() -> None:
    """Run the demo."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    model = isthmus("pull", "smollm2-135m-instruct", capture=True)
    bits = ["--front-bits", str(FRONT_BITS), "--back-bits", str(BACK_BITS)]
    calibration = ["--calibration-tokens", str(CALIBRATION_TOKENS)]
    isthmus("export", model, "-o", str(FOLDER), "--split", str(SPLIT), *bits, *calibration)
    with server(FOLDER / "server") as (process, address, certificate):
        device = EdgeModel.open(FOLDER / "device", server=address, tls_ca=certificate, codec="klt")
        messages = [{"role": "user", "content": QUESTION}]
        print(f"\n> {QUESTION}\n")
        stream = device.stream(messages, max_new_tokens=NEW_TOKENS)
        for piece in stream:
            print(piece, end="", flush=True)
        print("\n")
        memory = {"device": process_memory(), "server": process_memory(process.pid)}
        ids = device.prompt_ids(messages)
        print_table(device, stream.result, memory, agreement(model, ids, stream.result))


def isthmus(*arguments: str, capture: bool = False) -> str:
    """Show and run a command of Isthmus; ends the demo if it fails."""
    print("\n$ isthmus " + " ".join(arguments), flush=True)
    done = subprocess.run([*ISTHMUS, *arguments], stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    if capture:
        print(done.stdout, end="")
    return (done.stdout or "").strip()


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A running server: its process, address and certificate."""
    arguments = ["serve", str(folder), "--listen", "127.0.0.1:0"]
    print("\n$ isthmus " + " ".join(arguments), flush=True)
    process = subprocess.Popen([*ISTHMUS, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        ready = process.stdout.readline() if process.stdout else ""
        print(ready, end="")
        if not ready:
            sys.exit("the server did not start")
        address = ready.split(" on ")[1].split()[0]
        certificate = ready.rstrip().rstrip(")").split("certificate ")[1]
        yield process, address, certificate
    finally:
        process.terminate()
        process.wait(timeout=30)


def agreement(model: str, prompt_ids: list[int], result: Generation) -> float:
    """Share of the generated tokens that the unsplit float model would choose after the same text."""
    from isthmus.export.validate import float_logits

    choices = float_logits(model, prompt_ids + result.token_ids[:-1]).argmax(axis=1)[len(prompt_ids) - 1 :]
    return float((choices == result.token_ids).mean())


def print_table(device: EdgeModel, result: Generation, memory: dict[str, ProcessMemory], agreeing: float) -> None:
    """Print what the generation cost."""
    arch = device.manifest.architecture
    sent = result.prompt_tokens + result.new_tokens - 1
    raw16 = 2 * arch.d_model
    rows = [
        ["decode", f"{result.decode_tokens_per_s:.1f} tokens/s"],
        [
            "time to first token",
            f"{result.ttft_ms:.0f} ms, connection and {result.prompt_tokens} prompt tokens included",
        ],
        ["bytes up per token", f"{result.bytes_up / sent:.0f} ({raw16 * sent / result.bytes_up:.2f}x below 16 bit)"],
        ["round trips", f"{result.round_trips} for {result.new_tokens} tokens"],
        ["layers on the device", f"{device.manifest.split} of {arch.layers} ({FRONT_BITS} bit; back {BACK_BITS} bit)"],
        *([f"memory, {side}", describe(reading)] for side, reading in memory.items()),
        ["agreement with the unsplit float model", f"{agreeing:.1%} of {result.new_tokens} tokens, greedy"],
    ]
    print(tabulate(rows, tablefmt="simple"))
    print("\nThe default model's file holds 4-bit weights; the float model is that file, dequantized.")


def describe(memory: ProcessMemory) -> str:
    """Peak and anonymous memory, where the system tells them."""
    known = {"peak resident": memory.peak_resident_mb, "anonymous": memory.anonymous_mb}
    return ", ".join(f"{value:.0f} MB {name}" for name, value in known.items() if value is not None)


if __name__ == "__main__":
    main()
