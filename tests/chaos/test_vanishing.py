"""Device processes that are killed, and what is left of them on a server: nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import urlopen

import pytest

from isthmus.runtime.server.metrics import parse_metrics

# A device that generates up to a chunk, says so, and does nothing more.
DEVICE = """
import sys, threading
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire.security import ChannelSecurity

folder, address, draft, chunk = sys.argv[1:]
model = EdgeModel(folder, server=address, codec="tabq", threads=1, draft=draft, security=ChannelSecurity(insecure=True))

def vanish():
    print("here", flush=True)
    threading.Event().wait()

rows, left = model._embedding.rows, int(chunk)

def counted(ids):
    global left
    left -= 1
    if left == 0:
        vanish()
    return rows(ids)

model._embedding.rows = counted
stream = model.tokens(list(range(1, 200)) * 2, max_new_tokens=40, sampling=Sampling())
for _ in stream:
    pass
vanish()
"""
PHASES = {
    "as the prompt begins": ("off", 1),
    "in the prompt": ("off", 3),
    "in the text": ("off", 17),
    "with drafts": ("auto", 8),
    "before it closes": ("off", 10_000),
}


@pytest.fixture(scope="module")
def server(folder, start_serving, device) -> Iterator[Any]:
    options = ("--threads", "1", "--lease", "0.3", "--metrics", "127.0.0.1:0", "--insecure")
    server = start_serving("-v", "serve", folder / "server", "--listen", "127.0.0.1:0", *options)
    for _ in range(3):
        device(server.address).generate(3)  # whatever is made once
    yield server
    assert server.end() == 0


@pytest.fixture
def metric(server: Any) -> Callable[[str], float]:
    [address] = re.findall(r"metrics on (http://\S+)", "\n".join(server.log))

    def scrape(name: str) -> float:
        with urlopen(address) as answer:
            return parse_metrics(answer.read().decode())[name]

    return scrape


@pytest.fixture(scope="module")
def quiet(server: Any) -> tuple[int, int]:
    """Threads and descriptors of a server that nobody is connected to; connections end a little after their streams."""
    counts = []
    for _ in range(25):
        counts.append((server.threads, server.open_files))
        time.sleep(0.02)
    threads, files = zip(*counts, strict=True)
    return min(threads), min(files)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads Linux' /proc")
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_a_device_that_is_killed_leaves_nothing(folder, server, device, expected, quiet, metric, eventually, phase):
    process = subprocess.Popen(
        [sys.executable, "-c", DEVICE, folder / "device", server.address, *map(str, phase)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "here\n"
        assert metric("sessions") == metric("sessions_carried") == 1
        assert metric("kv_bytes") > 0
        bystander = device(server.address).tokens()
        tokens = [next(iter(bystander)).id for _ in range(5)]
        process.kill()
    assert eventually(lambda: metric("sessions") == metric("sessions_carried") == 1)
    tokens += [token.id for token in bystander]
    bystander.close()
    assert tokens == expected
    assert eventually(lambda: metric("sessions") == metric("kv_bytes") == 0)
    threads, files = quiet
    assert eventually(lambda: server.open_files <= files)
    assert eventually(lambda: server.threads <= threads + 2)  # gRPC's own come and go
