"""Servers that faults happen to, devices that generate meanwhile, and what both must come to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.stream import Generation
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server import server as server_module
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.metrics import parse_metrics
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.authority import Authority
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity
from isthmus.runtime.wire.tokens import issue_token


@pytest.fixture(scope="session")
def folder(tiny: Any) -> Path:
    """The bundle of all devices and servers here."""
    return Path(tiny.bundle(bits=8, split=2))


@pytest.fixture
def serve(folder: Path, start_serving: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Starts ``isthmus serve``, in plaintext at any port unless the arguments say otherwise; see `Serving`."""
    servers: list[Any] = []

    def start(listen: str = "127.0.0.1:0", *options: str | Path, plaintext: bool = True, **limits: Any) -> Any:
        secured = ("--insecure",) if plaintext else ()
        command = ("serve", folder / "server", "--threads", "1", "--listen", listen, *secured, *options)
        servers.append(start_serving("-v", *command, **limits))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(scope="session")
def standby(folder: Path, start_serving: Callable[..., Any]) -> Iterator[Any]:
    """A server that nothing happens to."""
    server = start_serving("serve", folder / "server", "--threads", "1", "--listen", "127.0.0.1:0", "--insecure")
    yield server
    assert server.end() == 0


class Device:
    """What every device here generates, greedily or not: several frames of a prompt, then a text.

    Attributes:
        prompt: token ids.
        new_tokens: that each generation has.
        sampling: of each.
    """

    prompt = tuple(range(1, 200)) * 2
    new_tokens = 40
    sampling = Sampling(temperature=1.1, top_k=40, repetition_penalty=1.1, seed=5)

    def __init__(self, folder: Path, *addresses: str, **options: Any) -> None:
        options = {"codec": "tabq", "threads": 1, "security": ChannelSecurity(insecure=True)} | options
        self.model = EdgeModel(folder / "device", server=",".join(addresses), **options)

    def generate(self, new_tokens: int = new_tokens) -> Generation:
        return self.model.generate(list(self.prompt), max_new_tokens=new_tokens, sampling=self.sampling)

    def tokens(self) -> Any:
        """The running generation."""
        return self.model.tokens(list(self.prompt), max_new_tokens=self.new_tokens, sampling=self.sampling)

    def at(self, chunk: int, action: Callable[[], None]) -> None:
        """Do something when the n-th chunk is computed: the prompt has four, then each token or draft is one."""
        self.model._embedding = _At(self.model._embedding, chunk, action)  # type: ignore[assignment]


class _At:
    def __init__(self, embedding: Any, chunk: int, action: Callable[[], None]) -> None:
        self._embedding, self._left, self._action = embedding, chunk, action

    def rows(self, ids: list[int]) -> Any:
        self._left -= 1
        if self._left == 0:
            self._action()
        return self._embedding.rows(ids)


@pytest.fixture(scope="session")
def device(folder: Path) -> Callable[..., Device]:
    """Makes a `Device` for addresses; keyword arguments are those of `EdgeModel`."""
    return lambda *addresses, **options: Device(folder, *addresses, **options)


@pytest.fixture(scope="session")
def expected(standby: Any, device: Callable[..., Device]) -> list[int]:
    """What an undisturbed `Device` generates."""
    return device(standby.address).generate().token_ids


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices whose deadlines fit tiny models."""
    monkeypatch.setitem(RemoteBack.__init__.__kwdefaults__, "step_timeout", 2.0)
    monkeypatch.setitem(RemoteBack.__init__.__kwdefaults__, "connect_timeout", 2.0)


class Guarded:
    """A server that lets devices of one authority in, each with its certificate and its token.

    Attributes:
        ca: the authority.
        server: in this process.
        audit: path of its audit log.
        bystander: what a device shows that nothing happens to.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        Authority.create(root / "ca")
        self.ca = Authority(root / "ca")
        self.trust = self.ca.folder / "ca-cert.pem"
        self.tokens, self.audit = root / "tokens", root / "audit.jsonl"
        self.token = issue_token(self.tokens, "all")
        self.bystander = self.security("bystander")
        issued = self.ca.server(["127.0.0.1"])
        security = ServerSecurity(
            cert_file=Path(issued.cert_file),
            key_file=Path(issued.key_file),
            client_ca=self.trust,
            revoked=self.ca.folder / "revoked.pem",
            tokens=self.tokens,
        )
        limits = ServerLimits(idle_s=0.4, lease_s=1.0)
        self.server = BackServer.from_bundle(
            folder / "server", threads=1, security=security, limits=limits, metrics="127.0.0.1:0", audit=self.audit
        )

    def security(self, name: str, ca: Authority | None = None, **options: Any) -> ChannelSecurity:
        """What a device of this name shows."""
        return self.shown((ca or self.ca).device(name, **options))

    def shown(self, issued: Any, token: str | None = None) -> ChannelSecurity:
        """A certificate, and a token."""
        files = {"cert_file": Path(issued.cert_file), "key_file": Path(issued.key_file)}
        return ChannelSecurity(ca_file=self.trust, token=token or self.token, **files)

    def metric(self, name: str) -> float:
        with urlopen(f"http://{self.server.metrics_address}/metrics") as answer:
            return parse_metrics(answer.read().decode()).get(name, 0.0)

    def told(self) -> list[dict[str, Any]]:
        """Lines of the audit log."""
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "_WATCH_S", 0.05)
        guarded = Guarded(tmp_path_factory.mktemp("guarded"), folder)
        with guarded.server:
            yield guarded


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many faults were tried, and how many ended as `docs/faults.md` says."""
    reports = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.getreports(outcome)
        if "tests/chaos/" in report.nodeid
    ]
    faults = {report.nodeid for report in reports}
    wrong = {report.nodeid for report in reports if report.failed}
    if faults:
        terminalreporter.write_line(f"chaos: {len(faults)} faults, {len(faults - wrong)} ended as they should")
