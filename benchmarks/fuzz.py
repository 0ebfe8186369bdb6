"""Mutated messages against a server's message path: parsing, handshake, opening, and the step machine.

    python benchmarks/fuzz.py [--messages 1000000] [--seed 0] [--corpus DIR]

Messages of a healthy conversation are mutated as bytes (flips, cuts, splices) and as structures (fields out of range,
with the checksum made right again, so that what is behind it is reached). Each is either done or refused by a
`Refusal`; anything else is a finding. Printed: outcomes, the longest time of a message, and the growth of memory. The
first message of each outcome is kept in the corpus, from which later runs begin.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import thread_time  # a machine that is busy with something else is no hang of ours
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate
from tqdm import tqdm

from isthmus.devices.memory import process_memory
from isthmus.quant.codec import Codec, Raw16, Raw32
from isthmus.quant.tabq import TabQ
from isthmus.runtime.bundle import Architecture, KVSpec, Manifest, Source
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.sessions import Session
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import (
    Refusal,
    check_hello,
    hello_message,
    kv_crc,
    open_message,
    parse_client_message,
    read_sampling,
    step_crc,
    step_message,
)

D_MODEL, VOCABULARY, SPLIT, LAYERS, MAX_TOKENS = 16, 256, 2, 4, 64
CODECS: dict[str, Codec] = {"raw32": Raw32(), "raw16": Raw16(), "tabq": TabQ(outliers=2)}
HASH = "a" * 64
EXTREMES = (0, 1, 2, 3, 255, 256, 512, 513, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


class NullSession:
    """Counts positions and chooses the token 7."""

    def __init__(self) -> None:
        self.length = 0

    def append_rows(self, rows: NDArray[Any]) -> None:
        """Further positions."""
        self.length += rows.shape[3]

    def truncate(self, length: int) -> None:
        """Fewer positions."""
        self.length = length

    def sample(self) -> int:
        """Choose."""
        return 7

    def verify(self, drafted: Sequence[int]) -> list[int]:
        """Choose as long as 7 was drafted."""
        first = self.length - len(drafted)
        right = next((place for place, token in enumerate(drafted) if token != 7), len(drafted))
        self.truncate(first + right)
        return [7] * (right + 1)

    def close(self) -> None:
        """Nothing to free."""


class NullEngine:
    """A back half without layers."""

    manifest_sha256 = HASH
    onnxruntime_seconds = 0.0

    def __init__(self) -> None:
        self.manifest = Manifest(
            schema=2,
            isthmus="0",
            source=Source("none", "none", {}),
            architecture=Architecture("llama", LAYERS, D_MODEL, 2, 1, 8, 32, VOCABULARY, 1e-5, 1e4, 4096, True),
            split=SPLIT,
            front_bits=32,
            back_bits=32,
            embed_bits=32,
            head_bits=32,
            block_size=32,
            weights="rtn",
            symmetric=True,
            max_length=1024,
            segments=(),
            kv={"device": KVSpec(32, 1, 8), "server": KVSpec(32, 1, 8)},
            codecs=tuple(CODECS),
            end_tokens=(0,),
            bos_token=None,
            chat_template=None,
            special_tokens={},
            minimum_onnxruntime="1.0",
            files={"device": (), "server": ()},
            validation={},
        )

    def codec(self, name: str) -> Codec:
        """One of `CODECS`."""
        return CODECS[name]

    def new_session(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int] = ()) -> NullSession:
        """An empty session."""
        return NullSession()

    def advance(self, parts: Sequence[tuple[Any, NDArray[np.float32], int]]) -> None:
        """Further positions of several sessions."""
        for session, hidden, _ in parts:
            session.length += len(hidden)

    def kv_bytes(self, max_tokens: int) -> int:
        """A byte a position."""
        return max_tokens


def healthy(rng: random.Random, step: int, length: int) -> bytes:
    """A message that a device might send to a session that expects this step and has so many positions."""
    position = rng.choice((length, length, rng.randint(0, length)))
    kind = rng.randrange(6)
    if kind == 0:
        return hello_message(HASH, SPLIT, rng.choice(list(CODECS)))
    if kind == 1:
        return open_message(rng.randint(1, MAX_TOKENS), Sampling(temperature=0.5, seed=rng.getrandbits(64)), [1, 2, 3])
    if kind == 2:
        chunk = pb.KVChunk(tokens=2, first_layer=SPLIT, last_layer=LAYERS, payload=bytes(4 * 2 * 2 * 2 * 8))
        message = pb.Step(step=step, position=position, kv=chunk)
        message.kv.crc32c = kv_crc(message.step, message.position, message.sample, message.kv)
        return pb.ClientMessage(step=message).SerializeToString()
    if kind == 3:
        attach = pb.Attach(session=rng.randbytes(16), last_acknowledged_step=2)
        return pb.ClientMessage(attach=attach).SerializeToString()
    tokens = rng.randint(1, 5)
    hidden = np.random.default_rng(rng.getrandbits(32)).standard_normal((tokens, D_MODEL)).astype(np.float32)
    drafted = [7] * rng.randint(0, tokens) if kind == 5 else []
    payload = rng.choice(list(CODECS.values())).encode(hidden, [1] * tokens)
    return step_message(step, position, tokens, bool(drafted) or rng.random() < 0.5, payload, drafted)


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A message changed as bytes or as a structure."""
    if rng.random() < 0.5:
        return _as_structure(data, rng)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[place:]
            case 2:
                changed[place:place] = rng.randbytes(rng.randint(1, 8))
            case 3:
                changed[place:] = other[rng.randrange(len(other) + 1) :]
            case _:
                changed[place : place + 4] = struct.pack("<I", rng.choice(EXTREMES))
    return bytes(changed)


def _as_structure(data: bytes, rng: random.Random) -> bytes:
    message = pb.ClientMessage.FromString(data)
    body = getattr(message, message.WhichOneof("body"))
    if isinstance(body, pb.Step):
        content = body.kv if body.HasField("kv") else body.frame
        for _ in range(rng.randint(1, 3)):
            match rng.randrange(7):
                case 0:
                    body.position = rng.choice(EXTREMES)
                case 1:
                    body.step = rng.choice((0, body.step - 1, body.step + 1, 2**63)) % 2**64
                case 2:
                    body.sample = not body.sample
                case 3:
                    content.tokens = rng.choice(EXTREMES)
                case 4:
                    payload = bytearray(content.payload)
                    if payload:
                        payload[rng.randrange(len(payload))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
                    content.payload = bytes(payload[: rng.choice((len(payload), len(payload), rng.randrange(99)))])
                case 5 if isinstance(content, pb.Frame):
                    del content.drafted[:]
                    content.drafted.extend(rng.choice(EXTREMES) for _ in range(rng.choice((0, 1, 2, 5, 40, 600))))
                case _ if isinstance(content, pb.KVChunk):
                    content.first_layer, content.last_layer = rng.choice(EXTREMES), rng.choice(EXTREMES)
        if isinstance(content, pb.KVChunk):
            content.crc32c = kv_crc(body.step, body.position, body.sample, content)
        else:
            content.crc32c = step_crc(
                body.step, body.position, content.tokens, body.sample, content.payload, content.drafted
            )
        return message.SerializeToString()
    for field, value in body.ListFields():
        if rng.random() < 0.5 and isinstance(value, int) and not isinstance(value, bool):
            setattr(body, field.name, rng.choice(EXTREMES))
        elif rng.random() < 0.3 and isinstance(value, str):
            setattr(body, field.name, rng.choice(("", "x" * 5000, "raw64", "ä\0")))
    if isinstance(body, pb.Open):
        body.sampling.temperature = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e300))
    return message.SerializeToString()


class Target:
    """The path that a message takes in a server; a new session after every few messages."""

    def __init__(self) -> None:
        self._engine, self._limits = NullEngine(), ServerLimits()
        self._session = self._new()
        self._done = 0

    def outcome(self, data: bytes, codec: Codec) -> str:
        """What becomes of a message; any error but a refusal is the caller's."""
        self._done += 1
        if self._done % 16 == 0:
            self._session = self._new()
        try:
            message = parse_client_message(data)
            kind = message.WhichOneof("body")
            if kind == "hello":
                check_hello(message.hello, manifest_sha256=HASH, split=SPLIT, codecs=list(CODECS))
            elif kind == "open":
                read_sampling(message.open.sampling)
            elif kind == "step":
                answer = self._session.step(message.step, codec, 0.0)
                return f"step done, {len(answer.result.tokens) or int(answer.result.HasField('token'))} tokens"
            return f"{kind} passed"
        except Refusal as refusal:
            return f"refused: {pb.Fault.Code.Name(refusal.fault.fault.code)}"

    def expects(self) -> tuple[int, int]:
        """The number of the next step, and the session's length."""
        return self._session.last_step + 1, self._null.length

    def _new(self) -> Session:
        self._null = NullSession()
        return Session(self._engine, self._null, MAX_TOKENS, self._limits)


def fuzz(messages: int, seed: int, corpus: Path | None = None) -> tuple[Counter[str], float, float]:
    """Outcomes, the longest time of a message in seconds, and the growth of resident memory in MB."""
    rng, target = random.Random(seed), Target()
    kept = [path.read_bytes() for path in sorted(corpus.glob("*.bin"))] if corpus and corpus.is_dir() else []
    outcomes: Counter[str] = Counter()
    longest, before = 0.0, 0.0
    codecs = list(CODECS.values())
    for number in tqdm(range(messages), disable=messages < 100_000):
        if number == messages // 10:  # after the first tenth all is loaded that will be
            before = process_memory().resident_mb or 0.0
        sound = healthy(rng, *target.expects())
        base = rng.choice(kept) if kept and rng.random() < 0.2 else sound
        try:
            data = mutated(base, sound, rng) if rng.random() < 0.8 else base
        except Exception:  # a kept message need not parse
            data = base
        started = thread_time()
        outcome = target.outcome(data, rng.choice(codecs))
        longest = max(longest, thread_time() - started)
        if outcome not in outcomes and corpus is not None and len(data) < 4096:
            corpus.mkdir(parents=True, exist_ok=True)
            (corpus / f"{hashlib.sha256(outcome.encode()).hexdigest()[:12]}.bin").write_bytes(data)
        outcomes[outcome] += 1
    return outcomes, longest, (process_memory().resident_mb or 0.0) - before


def main() -> None:
    """Fuzz and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="read, and added to")
    args = parser.parse_args()
    outcomes, longest, growth_mb = fuzz(args.messages, args.seed, args.corpus)
    print(tabulate(sorted(outcomes.items()), ["outcome", "messages"]))
    print(
        f"\nlongest time of a message {1e3 * longest:.1f} ms; memory grew by {growth_mb:.1f} MB after the first tenth"
    )


if __name__ == "__main__":
    main()
