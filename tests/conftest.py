"""Tiny source models, and the bundles exported from them, shared by all tests."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from isthmus.export.export import export_bundle
from isthmus.runtime.back import BackEngine
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.generate import LocalBack, StepReport, generate_tokens
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.segments import Embedding, Head, LayerStack, StackSession
from isthmus.runtime.skipping import NO_BYPASS, Bypass

BASE_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

# What each kind changes in the base config.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "llama-linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama3-rope": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-yarn-rope": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    # Wide enough that products are cut along the inner dimension and between threads.
    "llama-wide": {
        "hidden_size": 320,
        "intermediate_size": 832,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 64,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 24, "tie_word_embeddings": False},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 0,
    },
    "qwen2-untied": {"model_type": "qwen2", "use_sliding_window": False, "tie_word_embeddings": False},
}

END_BYTE = "\0"  # its token ends a generation

# A shell without job control has what it starts in the background ignore this, and whatever that starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test asserts a time: a shared machine may take any.
settings.register_profile("isthmus", deadline=None)
settings.load_profile("isthmus")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end, none is left to one process alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def byte_tokenizer() -> Tokenizer:
    """One token for each of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def random_weights(config: dict[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights that keep activations and logits near unit scale; norms and biases are not the neutral ones."""
    rng = np.random.default_rng(seed)
    d_model, d_ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int, gain: float) -> NDArray[np.float32]:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(gain / columns**0.5)

    def gamma() -> NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, d_model).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocab, d_model, 1.0), "model.norm.weight": gamma()}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocab, d_model, 1.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}input_layernorm.weight": gamma(),
            f"{prefix}self_attn.q_proj.weight": matrix(width, d_model, 1.5),
            f"{prefix}self_attn.k_proj.weight": matrix(kv_width, d_model, 1.5),
            f"{prefix}self_attn.v_proj.weight": matrix(kv_width, d_model, 1.0),
            f"{prefix}self_attn.o_proj.weight": matrix(d_model, width, 1.0),
            f"{prefix}post_attention_layernorm.weight": gamma(),
            f"{prefix}mlp.gate_proj.weight": matrix(d_ff, d_model, 1.5),
            f"{prefix}mlp.up_proj.weight": matrix(d_ff, d_model, 1.0),
            f"{prefix}mlp.down_proj.weight": matrix(d_model, d_ff, 1.0),
        }
        if config["model_type"] == "qwen2":
            for role, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
                weights[f"{prefix}self_attn.{role}_proj.bias"] = rng.standard_normal(rows, np.float32) * 0.5
    return weights


def write_tiny_checkpoint(folder: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a Hugging Face directory with random weights; ``changes`` replace keys of the kind's config."""
    config = BASE_CONFIG | KINDS[kind] | changes
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    end = tokenizer.encode(END_BYTE).ids[0]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(random_weights(config, seed), folder / "model.safetensors")
    return folder


class TinyModels:
    """Writes each tiny checkpoint once and exports each bundle once; treat what it returns as read-only."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def checkpoint(self, kind: str = "llama") -> Path:
        """Folder of the checkpoint of a kind (a key of ``KINDS``)."""
        key = f"checkpoint-{kind}"
        if key not in self._made:
            self._made[key] = write_tiny_checkpoint(self._root / key, kind)
        return self._made[key]

    def bundle(self, kind: str = "llama", *, bits: int = 4, split: int | None = None, **options: Any) -> Path:
        """Folder of a bundle with one bit width everywhere, unless ``options`` of the export say otherwise."""
        every = dict.fromkeys(("front_bits", "back_bits", "embed_bits", "head_bits"), bits)
        options = every | {"layers_per_block": 2, "split": split, "calibration_tokens": 0} | options
        key = "-".join([kind, *(f"{name}={value}" for name, value in sorted(options.items()))])
        if key not in self._made:
            out = self._root / f"bundle-{len(self._made)}"
            export_bundle(str(self.checkpoint(kind)), out, **options)
            self._made[key] = out
        return self._made[key]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """Writes a checkpoint of its own: ``(folder, kind, seed, **config)``."""
    return write_tiny_checkpoint


@pytest.fixture
def altered_checkpoint(tiny: TinyModels, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a kind's checkpoint whose config was changed and whose weights were not."""

    def alter(kind: str, **changes: Any) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(tiny.checkpoint(kind), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return alter


class InProcessBack:
    """The server half in this process: what `RemoteBack` reaches, without a wire between."""

    source = "server"
    round_trips = 0

    def __init__(self, engine: BackEngine, chunk: int) -> None:
        self._engine, self._chunk = engine, chunk

    def open(self, max_tokens: int, sampling: Sampling, context_ids: Sequence[int], bypass: Bypass = NO_BYPASS) -> None:
        self._session = self._engine.new_session(max_tokens, sampling, context_ids, bypass)

    def chunk_limit(self) -> int:
        return self._chunk

    def step(
        self, hidden: NDArray[np.float32], position: int, token_ids: Sequence[int] = (), *, sample: bool
    ) -> StepReport:
        assert position == self._session.length
        self._session.advance(hidden)
        return StepReport(token=self._session.sample() if sample else None)

    def close(self, *, cancel: bool = False) -> None:
        self._session.close()


class LocalModel:
    """A whole model in this process, split or not."""

    def __init__(self, folder: Path, threads: int = 2) -> None:
        self._threads = threads
        device = open_bundle(folder, "device")
        self.manifest = device.manifest
        self.embedding = Embedding(device)
        self.front = LayerStack(device, threads)
        self._last = device if device.manifest.device_only else open_bundle(folder, "server")

    @cached_property
    def stacks(self) -> list[LayerStack]:
        return [self.front] if self.manifest.device_only else [self.front, LayerStack(self._last, self._threads)]

    @cached_property
    def head(self) -> Head:
        return Head(self._last, self._threads)

    @cached_property
    def _engine(self) -> BackEngine:
        return BackEngine(self._last, self._threads)

    def session(self, capacity: int = 256) -> LocalSession:
        return LocalSession(self, [stack.session(capacity) for stack in self.stacks])

    def run(self, ids: list[int], chunks: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Hidden states after the last layer, and logits, of a text run in the given chunks."""
        assert sum(chunks) == len(ids)
        session = self.session(len(ids))
        starts = np.cumsum([0, *chunks])
        parts = [session.forward(ids[first : first + n]) for first, n in zip(starts, chunks, strict=False)]
        hidden, logits = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return hidden, logits

    def generate(
        self, ids: list[int], new_tokens: int, *, sampling: Sampling | None = None, chunk: int = 128
    ) -> list[int]:
        """Generated tokens, never ended early; ``chunk`` bounds a prefill step of a split model."""
        sampling, capacity = sampling or Sampling(), len(ids) + new_tokens
        back = LocalBack(self.head) if self.manifest.device_only else InProcessBack(self._engine, chunk)
        back.open(capacity, sampling, ids)
        tokens = generate_tokens(
            self.embedding,
            self.front.session(capacity),
            back,
            ids,
            layers=self.manifest.architecture.layers,
            max_new_tokens=new_tokens,
            end_tokens=(),
        )
        return [token.id for token in tokens]


class LocalSession:
    """One text in a `LocalModel`."""

    def __init__(self, model: LocalModel, stages: list[StackSession]) -> None:
        self._model = model
        self._stages = stages

    def forward(self, ids: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Hidden states and logits of the next tokens, in memory of their own."""
        hidden = self._model.embedding.rows(ids)
        for stage in self._stages:
            hidden = stage.forward(hidden)
        hidden = hidden.copy()
        return hidden, np.stack([self._model.head.logits(row).copy() for row in hidden])

    def truncate(self, length: int) -> None:
        for stage in self._stages:
            stage.cache.truncate(length)


@pytest.fixture(scope="session")
def local_model() -> Callable[..., LocalModel]:
    """Opens each bundle once as a `LocalModel`, or once for each number of threads."""
    return cache(LocalModel)


class Proxy:
    """Forwards TCP to a server, until it is told to cut."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepting = True
        self.after_bytes_up: int | None = None  # cut once that many more bytes went up
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.accepting = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self.accepting:
                client.close()
                continue
            server = socket.create_connection(self._upstream)
            with self._lock:
                self._pairs.append((client, server))
            thread = threading.Thread(target=self._forward, args=(client, server), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, client, server:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    try:
                        data = key.fileobj.recv(1 << 16)
                        if data and key.fileobj is client and self.after_bytes_up is not None:
                            self.after_bytes_up -= len(data)
                            if self.after_bytes_up < 0:
                                self.after_bytes_up = None
                                return
                        if not data:
                            return
                        key.data.sendall(data)
                    except OSError:
                        return


@pytest.fixture
def make_proxy() -> Iterator[Callable[[str], Proxy]]:
    proxies = []

    def make(upstream: str) -> Proxy:
        proxies.append(Proxy(upstream))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


@pytest.fixture
def eventually() -> Callable[..., bool]:
    """Whether something becomes true within ten seconds, or as many as are given."""

    def wait(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    return wait


class Serving:
    """A process of ``isthmus serve`` or ``isthmus fleet``, from the moment at which it serves.

    Args:
        home: folder for its configuration and its log, of its own.
        arguments: of the command, its name first.
        temporary: its folder for temporary files.
        limits: of resources, by the number in `resource`.

    Attributes:
        address: where it serves.
    """

    def __init__(
        self,
        home: Path,
        *arguments: str | Path,
        temporary: Path | None = None,
        limits: dict[int, int] | None = None,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"HOME": str(home), "XDG_CONFIG_HOME": str(home)}
        if temporary is not None:
            environment["TMPDIR"] = str(temporary)
        self._log = home / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.cli.main", *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        if limits:
            import resource

            for number, value in limits.items():
                resource.prlimit(self.process.pid, number, (value, value))
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " on " in line, self.log
        self.address = line.split(" on ")[1].split()[0]

    @property
    def log(self) -> list[str]:
        """Lines of its log so far."""
        return self._log.read_text().splitlines()

    @property
    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def drain(self) -> None:
        self.process.terminate()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> int:
        """Have it drain; its status. Safe twice, and on one that was stopped or killed."""
        self.go_on()
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="session")
def start_serving(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Serving]:
    """Starts an `isthmus` process that serves, see `Serving`; whoever calls ends it."""

    def start(*arguments: str | Path, **options: Any) -> Serving:
        return Serving(tmp_path_factory.mktemp("home"), *arguments, **options)

    return start
