"""A fleet whose worker is killed under load: are the tokens right, and how long do its sessions stand still?

    python benchmarks/fleet.py --bundle OUT [--workers 3] [--sessions 24] [--json FILE]

A few generations are recorded once. Then `isthmus fleet` runs on this machine, and so many sessions send what was
recorded, over the device's own link, which makes lost sessions again. When half of all tokens are there, the process of
a worker is killed (SIGKILL). Before that, one session at a time measures what a token takes over the front, and on the
same server without it, and how much of a processor the front takes for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from isthmus.runtime.edge.load import Recording, Recordings, record, replay
from isthmus.runtime.edge.remote_session import Peers, RemoteSession
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import renumbered_step
from isthmus.runtime.wire.security import ChannelSecurity

SECURITY = ChannelSecurity(insecure=True)
SERVES = re.compile(r"worker (\d+) \(process (\d+)\) serves")


class Serving:
    """An ``isthmus serve`` or ``isthmus fleet`` process, and what it has said of its workers."""

    def __init__(self, command: str, folder: Path, *options: str) -> None:
        self.workers: dict[int, tuple[int, float]] = {}  # process and time, by number
        listen = ["--listen", "127.0.0.1:0", "--insecure", *options]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "isthmus.cli.main", "-v", command, str(folder), *listen],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Linux shares processors out among sessions; Ray starts workers in their own
        )
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().split(" on ")[1].split()[0]

    def _listen(self) -> None:
        for line in self._process.stderr or ():
            if found := SERVES.search(line):
                self.workers[int(found[1])] = int(found[2]), time.monotonic()

    @property
    def process(self) -> int:
        """Its number."""
        return self._process.pid

    def end(self) -> None:
        """Drain it."""
        self._process.terminate()
        self._process.wait()


@contextmanager
def serving(command: str, folder: Path, *options: str) -> Iterator[Serving]:
    """A process, for a while."""
    process = Serving(command, folder, *options)
    try:
        yield process
    finally:
        process.end()


class Device:
    """A session that sends what was recorded, and does what a device does when its server is lost."""

    def __init__(self, recording: Recording, hello: bytes, address: str) -> None:
        self._recording = recording
        self._session = RemoteSession(Peers([address], hello, SECURITY))
        self.times: list[float] = []  # at which each token came
        self.identical = True
        self.error: str | None = None

    def run(self, opened: threading.Barrier) -> None:
        """Open the session; once all are, generate."""
        session = self._session
        try:
            session.open(self._recording.capacity, Sampling(), ())
            opened.wait(120)
            for messages, token in self._recording.exchanges:
                for message in messages:
                    position = pb.ClientMessage.FromString(message).step.position
                    session.send(renumbered_step(message, session.last_step + 1), position)
                result = None
                while session.unacknowledged:
                    result = session.receive() or result
                self.times.append(time.monotonic())
                self.identical &= result is not None and result.token == token
            session.close()
        except Exception as error:
            self.error = str(error)

    @property
    def replays(self) -> list[float]:
        """Seconds that each recovery took on the device."""
        return [replay.seconds for replay in self._session.replays]

    def longest_gap(self) -> float:
        """The most seconds between two tokens."""
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


def processor_ms(process: int) -> float:
    """Processor time that a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def front_work(recordings: Recordings, fleet: Serving, sessions: int, repetitions: int) -> float:
    """Processor milliseconds of the front for a token."""
    before = processor_ms(fleet.process)
    for _ in range(repetitions):
        replay(recordings, fleet.address, sessions=sessions, security=SECURITY)
    return (processor_ms(fleet.process) - before) / (repetitions * sessions * recordings.new_tokens)


def kill_one(recordings: Recordings, fleet: Serving, sessions: int) -> dict[str, Any]:
    """Run sessions, kill a worker half way, and tell what came of it."""
    generations = [recordings.generations[number % len(recordings.generations)] for number in range(sessions)]
    devices = [Device(each, recordings.hello, fleet.address) for each in generations]
    opened = threading.Barrier(sessions)
    threads = [threading.Thread(target=device.run, args=(opened,)) for device in devices]
    for thread in threads:
        thread.start()
    half = sessions * recordings.new_tokens // 2
    while sum(len(device.times) for device in devices) < half:
        time.sleep(0.01)
    victim, known = min(fleet.workers.items())[1][0], set(fleet.workers)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(300)
    deadline = time.monotonic() + 60
    while not set(fleet.workers) - known and time.monotonic() < deadline:
        time.sleep(0.1)
    hit = [device for device in devices if device.replays]
    other = [device for device in devices if not device.replays]
    gaps = [device.longest_gap() for device in hit]
    started = [at for number, (_, at) in fleet.workers.items() if number not in known]
    return {
        "sessions": sessions,
        "finished": sum(len(device.times) == recordings.new_tokens for device in devices),
        "identical": all(device.identical and device.error is None for device in devices),
        "errors": [device.error for device in devices if device.error],
        "hit": len(hit),
        "longest_gap_s": {"p50": median(gaps), "max": max(gaps)} if gaps else None,
        "replay_s": {"p50": median(device.replays[0] for device in hit)} if hit else None,
        "others_longest_gap_s": {"p50": median(device.longest_gap() for device in other)} if other else None,
        "replacement_s": started[0] - killed if started else None,
    }


def front_cost(recordings: Recordings, servers: dict[str, str], repetitions: int) -> dict[str, float]:
    """Milliseconds a token, of one session at a time: medians, and that of the differences of runs side by side."""
    seen: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(repetitions):
        for name, address in servers.items():
            report = replay(recordings, address, sessions=1, security=SECURITY).to_dict()
            seen[name].append(report["ms_per_token"]["p50"])
    added = [fleet - serve for serve, fleet in zip(seen["serve"], seen["fleet"], strict=True)]
    return {name: median(values) for name, values in (seen | {"added": added}).items()}


def main() -> None:
    """Measure, print the tables, and write the numbers if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    args = parser.parse_args()
    folder = args.bundle / "server"
    with serving("serve", folder, "--threads", "1", "--prefix-cache", "0") as alone:
        recordings = record(args.bundle / "device", alone.address, new_tokens=args.new_tokens, security=SECURITY)
        with serving("fleet", folder, "--threads", "1", "--workers", "1") as one:
            cost = front_cost(recordings, {"serve": alone.address, "fleet": one.address}, 5 * args.repetitions)
            work = {str(count): front_work(recordings, one, count, args.repetitions) for count in (1, 16)}
    runs = []
    for _ in range(args.repetitions):
        with serving("fleet", folder, "--threads", "1", "--workers", str(args.workers)) as fleet:
            runs.append(kill_one(recordings, fleet, args.sessions))
    rows = [
        [
            run["sessions"],
            run["hit"],
            run["finished"],
            "yes" if run["identical"] else "no",
            run["longest_gap_s"] and run["longest_gap_s"]["p50"],
            run["longest_gap_s"] and run["longest_gap_s"]["max"],
            run["others_longest_gap_s"] and run["others_longest_gap_s"]["p50"],
            run["replacement_s"],
        ]
        for run in runs
    ]
    headers = ["sessions", "on the killed worker", "finished", "identical"]
    headers += ["their longest gap, s: p50", "max", "of the others: p50", "s to a new worker"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))
    print(
        f"\nms a token of one session: {cost['serve']:.2f} on a server, {cost['fleet']:.2f} through the front; "
        f"side by side {cost['added']:+.2f}"
    )
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} processors")
    told = ", ".join(f"{ms:.2f} with {count}" for count, ms in work.items())
    print(f"processor ms of the front for a token, by sessions at once: {told}")
    if args.json:
        numbers = {"ms_per_token": cost, "front_processor_ms": work, "killed": runs}
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
