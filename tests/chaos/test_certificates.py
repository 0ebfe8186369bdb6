"""Certificates that are swapped, expire or are revoked while devices generate."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import LinkError, SecurityError
from isthmus.runtime.wire.authority import Authority
from isthmus.runtime.wire.security import ChannelSecurity

pytestmark = pytest.mark.usefixtures("impatient")

HOSTS = ("localhost", "127.0.0.1")


def take(stream: Any, count: int) -> list[int]:
    """The next tokens of a generation."""
    return [next(iter(stream)).id for _ in range(count)]


def rest(stream: Any) -> list[int]:
    """Its other ones."""
    tokens = [token.id for token in stream]
    stream.close()
    return tokens


@pytest.fixture
def authority(tmp_path: Path) -> Callable[[str], Authority]:
    def make(name: str) -> Authority:
        Authority.create(tmp_path / name, name)
        return Authority(tmp_path / name)

    return make


@pytest.mark.parametrize("told", [False, True], ids=["seen by itself", "told by SIGHUP"])
def test_a_servers_certificate_is_swapped(serve, device, expected, authority, tmp_path, told):
    old, new = authority("old"), authority("new")
    before, after = old.server(HOSTS), new.server(HOSTS)
    files = ("--tls-cert", before.cert_file, "--tls-key", before.key_file)
    server = serve("127.0.0.1:0", *files, plaintext=False)
    trusts_old, trusts_new = (ChannelSecurity(ca_file=ca.folder / "ca-cert.pem") for ca in (old, new))
    running = device(server.address, security=trusts_old).tokens()
    tokens = take(running, 5)
    shutil.copy(after.key_file, before.key_file)  # for a moment the two do not belong together
    assert device(server.address, security=trusts_old).generate(3).token_ids == expected[:3]
    shutil.copy(after.cert_file, before.cert_file)
    if told:
        server.process.send_signal(signal.SIGHUP)
    assert device(server.address, security=trusts_new).generate().token_ids == expected
    with pytest.raises(SecurityError, match="not trusted here"):
        device(server.address, security=trusts_old).generate()
    assert tokens + rest(running) == expected
    assert not running.replays


def test_a_broken_stream_goes_on_under_a_servers_new_certificate(
    serve, device, expected, authority, make_proxy, tmp_path
):
    old, new = authority("old"), authority("new")
    before, after = old.server(HOSTS), new.server(HOSTS)
    server = serve("127.0.0.1:0", "--tls-cert", before.cert_file, "--tls-key", before.key_file, plaintext=False)
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join((ca.folder / "ca-cert.pem").read_bytes() for ca in (old, new)))
    proxy = make_proxy(server.address)
    running = device(proxy.address, security=ChannelSecurity(ca_file=both)).tokens()
    tokens = take(running, 5)
    shutil.copy(after.key_file, before.key_file)
    shutil.copy(after.cert_file, before.cert_file)
    proxy.cut()
    assert tokens + rest(running) == expected
    assert running._back._session.reattached == 1
    assert not running.replays


def test_a_devices_certificate_is_renewed(guarded, device, expected, make_proxy, tmp_path):
    """Its session is its name's: the new certificate gets it back."""
    security = guarded.security("renewing")
    proxy = make_proxy(guarded.server.address)
    running = device(proxy.address, security=security).tokens()
    tokens = take(running, 5)
    for path in (security.cert_file, security.key_file):
        path.rename(tmp_path / path.name)
    guarded.ca.device("renewing")
    proxy.cut()
    assert tokens + rest(running) == expected
    assert running._back._session.reattached == 1
    assert not running.replays


def test_a_devices_certificate_expires(guarded, device, expected, make_proxy, monkeypatch, eventually):
    """What runs goes on; once its stream breaks, it does not come back, which the error tells."""
    monkeypatch.setattr("isthmus.runtime.edge.remote_session.MAX_ATTEMPTS", 3)
    security = guarded.security("ending", days=2.0 / 86400)
    proxy = make_proxy(guarded.server.address)
    running = device(guarded.server.address, security=security).tokens()
    cut = device(proxy.address, security=security).tokens()
    tokens = take(running, 5)
    assert take(cut, 5) == tokens
    time.sleep(3.1)  # certificates know seconds
    with pytest.raises(LinkError):
        device(guarded.server.address, security=security).generate()
    proxy.cut()
    with pytest.raises(LinkError, match="attempts to restore the session failed"):
        rest(cut)
    cut.close()
    assert tokens + rest(running) == expected
    assert eventually(lambda: guarded.server.sessions == 0)


def test_a_device_is_revoked(guarded, device, expected, eventually):
    """Its stream and its session end, and no other's."""
    bad, good = (guarded.security(name) for name in ("bad", "good"))
    lost, running = (device(guarded.server.address, security=security).tokens() for security in (bad, good))
    tokens = take(running, 5)
    assert take(lost, 5) == tokens
    guarded.ca.revoke(bad.cert_file)
    assert eventually(lambda: guarded.server.sessions == 1)
    with pytest.raises(SecurityError, match="not accepted"):
        rest(lost)
    lost.close()
    assert tokens + rest(running) == expected
    assert [line["event"] for line in guarded.told() if line.get("device") == "bad"][-3:] == [
        "expelled",
        "closed",
        "disconnected",
    ]
