"""Hours of sessions that come, go, break off and vanish, against a real server process: what grows?

    python benchmarks/soak.py --bundle OUT [--minutes 60] [--sessions 24] [--plot soak.png] [--json]

Waves of up to ``--sessions`` replayed generations (recorded once, every token compared) beside devices that cancel in
the middle or vanish without a word. Memory, threads, descriptors, sessions and KV cache of the server are sampled every
few seconds. The slope of each figure is that of its least values, a tenth of an hour's samples at a time, in the second
half, when all that is made once has been made: waves come and go, and only what stays when they have gone is a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
from tabulate import tabulate

from isthmus.cli.progress import progress_bar
from isthmus.runtime.edge.load import Recording, Recordings, record, replay
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.metrics import parse_metrics
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import open_message
from isthmus.runtime.wire.security import ChannelSecurity
from isthmus.runtime.wire.transport import SESSION_PATH

SECURITY = ChannelSecurity(insecure=True)
LEASE_S = 5
SAMPLE_S = 5.0
WAVE_S = 1.0  # at least: sessions of devices that vanish stay for the lease, and would fill the server
NEW_TOKENS = 24


async def leave(recording: Recording, hello: bytes, address: str, tokens: int, *, cancel: bool) -> None:
    """A device that opens a session, asks for some tokens, and cancels or vanishes."""
    async with SECURITY.aio_channel(address) as channel:
        stream = channel.stream_stream(SESSION_PATH, None, None)(None)
        await stream.write(hello)
        await stream.write(open_message(recording.capacity, Sampling(), ()))
        for _ in range(2):
            await stream.read()
        for messages, _ in recording.exchanges[:tokens]:
            for message in messages:
                await stream.write(message)
            for _ in messages:
                await stream.read()
        if cancel:
            await stream.write(pb.ClientMessage(cancel=pb.Cancel()).SerializeToString())
            await stream.read()
        stream.cancel()


class Sample(NamedTuple):
    """What the server had at a moment."""

    seconds: float  # since the start
    resident_mb: float
    private_mb: float  # of these, memory of its own: files that are mapped come and go
    threads: float
    descriptors: float
    sessions: float
    kv_mb: float


class Server:
    """An ``isthmus serve`` process, and samples of it.

    Attributes:
        samples: so far.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        command = [sys.executable, "-m", "isthmus.cli.main", "-v", "serve", str(folder), "--listen", "127.0.0.1:0"]
        with (home / "log").open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--insecure", "--threads", "1", "--lease", str(LEASE_S), "--metrics", "127.0.0.1:0"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HOME": str(home), "XDG_CONFIG_HOME": str(home)},
            )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().split(" on ")[1].split()[0]
        [self._metrics] = re.findall(r"metrics on (http://\S+)", (home / "log").read_text())
        self.samples: list[Sample] = []
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def sample(self) -> Sample:
        """What it has now."""
        proc = Path(f"/proc/{self._process.pid}")
        status = (proc / "status").read_text()
        resident, private = (int(status.split(f"{name}:")[1].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
        with urlopen(self._metrics) as answer:
            found = parse_metrics(answer.read().decode())
        return Sample(
            time.monotonic() - self._began,
            resident,
            private,
            *(len(list((proc / name).iterdir())) for name in ("task", "fd")),
            found["sessions"],
            found["kv_bytes"] / 1e6,
        )

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.samples.append(self.sample())

    def end(self) -> None:
        """Stop sampling, then the process."""
        self._ended.set()
        self._thread.join()
        self._process.terminate()
        self._process.wait(30)


def soak(recordings: Recordings, address: str, minutes: float, sessions: int) -> Counter[str]:
    """Waves until the time is over; how many sessions ended how."""
    rng, ends = random.Random(0), Counter[str]()
    stop = time.monotonic() + 60 * minutes

    async def leavers(leaving: list[tuple[Recording, int, bool]]) -> None:
        calls = [
            leave(recording, recordings.hello, address, tokens, cancel=cancel) for recording, tokens, cancel in leaving
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        ends["left"] += sum(result is None for result in results)
        ends["failed to leave"] += sum(result is not None for result in results)

    with progress_bar() as progress:
        while (left := stop - time.monotonic()) > 0:
            progress("soaking", round(60 * minutes - left), round(60 * minutes))
            leaving = [
                (rng.choice(recordings.generations), rng.randrange(NEW_TOKENS), rng.random() < 0.5)
                for _ in range(rng.randrange(sessions // 2 + 1))
            ]
            ends["waves"] += 1
            next_wave = time.monotonic() + WAVE_S
            beside = threading.Thread(target=lambda leaving=leaving: asyncio.run(leavers(leaving)))
            beside.start()
            report = replay(recordings, address, sessions=rng.randrange(1, sessions + 1), security=SECURITY).to_dict()
            beside.join()
            ends["finished"] += report["finished"]
            ends["waves with other tokens"] += not report["identical"]
            ends.update(report["errors"])
            time.sleep(max(0.0, next_wave - time.monotonic()))
    return ends


def slopes(samples: list[Sample], rest: Sample) -> list[dict[str, Any]]:
    """Of each figure its range in the second half, the slope of its least values there, and what it was afterwards."""
    second = np.array(samples[len(samples) // 2 :])
    parts = np.array_split(second, max(2, min(10, len(second) // 4)))
    hours = np.array([part[:, 0].mean() for part in parts]) / 3600
    rows = []
    for column, name in enumerate(Sample._fields[1:], 1):
        values = second[:, column]
        slope = float(np.polyfit(hours, [part[:, column].min() for part in parts], 1)[0])
        rows.append(
            {
                "figure": name.replace("_mb", " MB"),
                "first": samples[0][column],
                "least": float(values.min()),
                "most": float(values.max()),
                "at rest": rest[column],
                "an hour": slope,
            }
        )
    return rows


def plot(samples: list[Sample], path: Path) -> None:
    """Memory, and threads and descriptors, over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    minutes = [sample.seconds / 60 for sample in samples]
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 5))
    for axis, names in zip(axes, (("resident_mb", "private_mb"), ("threads", "descriptors", "sessions")), strict=True):
        for name in names:
            axis.plot(minutes, [getattr(sample, name) for sample in samples], label=name.replace("_mb", " MB"))
        axis.set_ylim(bottom=0)
        axis.legend()
    axes[1].set_xlabel("minutes")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Soak and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N")
    parser.add_argument("--sessions", type=int, default=24, metavar="N", help="most at once")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    # gRPC has one poller for all event loops of a process, and logs an error for each that has closed meanwhile.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as home:
        server = Server(args.bundle / "server", Path(home))
        server.samples.append(server.sample())
        try:
            recordings = record(
                args.bundle / "device", server.address, new_tokens=NEW_TOKENS, security=SECURITY, threads=1
            )
            ends = soak(recordings, server.address, args.minutes, args.sessions)
            samples = server.samples[:]
            time.sleep(2 * LEASE_S)  # those that vanished are forgotten
            rest = server.sample()
        finally:
            server.end()
    rows = slopes(samples, rest)
    if args.plot:
        plot(samples, args.plot)
    if args.json:
        print(json.dumps({"minutes": args.minutes, "sessions": dict(ends), "slopes": rows, "samples": samples}))
        return
    print(", ".join(f"{count} {end}" for end, count in ends.items() if count), end="\n\n")
    print(tabulate(rows, headers="keys", floatfmt=".1f"))


if __name__ == "__main__":
    main()
