"""Hours of sessions that come, go, break off and vanish, against a real server process: what grows?

    python benchmarks/soak.py --bundle OUT [--minutes 60] [--sessions 24] [--plot soak.png] [--json]

Waves of up to ``--sessions`` replayed generations (recorded once, every token compared) beside devices that cancel in
the middle or vanish without a word. Memory, threads, descriptors and sessions of the server are sampled every few
seconds; slopes are those of the second half, when all that is made once has been made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from isthmus.cli.progress import progress_bar
from isthmus.runtime.edge.load import Recording, Recordings, record, replay
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import open_message
from isthmus.runtime.wire.security import ChannelSecurity
from isthmus.runtime.wire.transport import SESSION_PATH

SECURITY = ChannelSecurity(insecure=True)
LEASE_S = 5
SAMPLE_S = 5.0
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


class Server:
    """An ``isthmus serve`` process, and samples of it.

    Attributes:
        samples: seconds since the start, MB resident, threads, descriptors.
    """

    def __init__(self, folder: Path, home: str) -> None:
        command = [sys.executable, "-m", "isthmus.cli.main", "serve", str(folder), "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [*command, "--insecure", "--threads", "1", "--lease", str(LEASE_S), "--metrics", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"HOME": home, "XDG_CONFIG_HOME": home},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split(" on ")[1].split()[0]
        self.samples: list[tuple[float, float, int, int]] = []
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        proc = Path(f"/proc/{self.process.pid}")
        while not self._ended.wait(SAMPLE_S):
            resident = int((proc / "status").read_text().split("VmRSS:")[1].split()[0]) / 1024
            threads, descriptors = (len(list((proc / name).iterdir())) for name in ("task", "fd"))
            self.samples.append((time.monotonic() - self._began, resident, threads, descriptors))

    def end(self) -> None:
        """Stop sampling, then the process."""
        self._ended.set()
        self._thread.join()
        self.process.terminate()
        self.process.wait(30)


def soak(recordings: Recordings, address: str, minutes: float, sessions: int) -> Counter[str]:
    """Waves until the time is over; how many sessions ended how."""
    rng, ends = random.Random(0), Counter[str]()
    stop = time.monotonic() + 60 * minutes

    async def leavers(count: int) -> None:
        calls = [
            leave(
                rng.choice(recordings.generations),
                recordings.hello,
                address,
                rng.randrange(NEW_TOKENS),
                cancel=rng.random() < 0.5,
            )
            for _ in range(count)
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        ends["left"] += sum(result is None for result in results)
        ends["failed to leave"] += sum(result is not None for result in results)

    with progress_bar() as progress:
        while (left := stop - time.monotonic()) > 0:
            progress("soaking", round(60 * minutes - left), round(60 * minutes))
            beside = threading.Thread(target=lambda: asyncio.run(leavers(rng.randrange(sessions // 2 + 1))))
            beside.start()
            report = replay(recordings, address, sessions=rng.randrange(1, sessions + 1), security=SECURITY).to_dict()
            beside.join()
            ends["finished"] += report["finished"]
            ends["with other tokens"] += not report["identical"]
            ends.update(report["errors"])
        time.sleep(2 * LEASE_S)
    return ends


def slopes(samples: list[tuple[float, float, int, int]]) -> list[dict[str, Any]]:
    """Of each figure the first and last sample of the second half, and its slope."""
    second = np.array(samples[len(samples) // 2 :])
    hours = second[:, 0] / 3600
    rows = []
    for name, column in (("MB resident", 1), ("threads", 2), ("descriptors", 3)):
        values = second[:, column]
        slope = float(np.polyfit(hours, values, 1)[0])
        rows.append({"figure": name, "median": float(np.median(values)), "least": values.min(), "most": values.max()})
        rows[-1]["an hour"] = slope
    return rows


def plot(samples: list[tuple[float, float, int, int]], path: Path) -> None:
    """Memory, and threads and descriptors, over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    at = np.array(samples)
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7, 5))
    upper.plot(at[:, 0] / 60, at[:, 1])
    upper.set_ylabel("MB resident")
    lower.plot(at[:, 0] / 60, at[:, 2], label="threads")
    lower.plot(at[:, 0] / 60, at[:, 3], label="descriptors")
    lower.set_xlabel("minutes")
    lower.legend()
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
    with tempfile.TemporaryDirectory() as home:
        server = Server(args.bundle / "server", home)
        try:
            recordings = record(
                args.bundle / "device", server.address, new_tokens=NEW_TOKENS, security=SECURITY, threads=1
            )
            ends = soak(recordings, server.address, args.minutes, args.sessions)
        finally:
            server.end()
    rows = slopes(server.samples)
    if args.plot:
        plot(server.samples, args.plot)
    if args.json:
        print(json.dumps({"minutes": args.minutes, "sessions": dict(ends), "slopes": rows, "samples": server.samples}))
        return
    print(", ".join(f"{count} {end}" for end, count in ends.items() if count), end="\n\n")
    print(tabulate(rows, headers="keys", floatfmt=".1f"))


if __name__ == "__main__":
    main()
