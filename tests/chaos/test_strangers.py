"""Peers that must not come in: each is refused, counted and written down, and a generation beside them goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import LinkError, ProtocolError, SecurityError
from isthmus.runtime.wire.authority import Authority
from isthmus.runtime.wire.security import ChannelSecurity

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def bystander(guarded: Any, device: Callable[..., Any], expected: list[int], eventually: Any) -> Iterator[None]:
    """A generation that has begun when the test begins, ends after it, and comes out right."""
    stream = device(guarded.server.address, security=guarded.bystander).tokens()
    tokens = [next(iter(stream)).id for _ in range(5)]
    yield
    tokens += [token.id for token in stream]
    stream.close()
    assert tokens == expected
    assert not stream.replays
    assert eventually(lambda: guarded.server.sessions == 0)


def revoked(guarded: Any, root: Path) -> ChannelSecurity:
    security = guarded.security("revoked")
    guarded.ca.revoke(security.cert_file)
    return security


def expired(guarded: Any, root: Path) -> ChannelSecurity:
    security = guarded.security("expired", days=1e-9)
    time.sleep(1.1)  # certificates know seconds
    return security


def of_another_authority(guarded: Any, root: Path) -> ChannelSecurity:
    Authority.create(root / "other", "another")
    return guarded.security("kitchen", Authority(root / "other"))


def with_the_name_of_another(guarded: Any, root: Path) -> ChannelSecurity:
    """Signed by an authority that calls itself as ours does, for the name of a device that is there."""
    Authority.create(root / "same")
    return guarded.security("bystander", Authority(root / "same"))


def with_a_servers_certificate(guarded: Any, root: Path) -> ChannelSecurity:
    return guarded.shown(guarded.ca.server(["10.1.2.3"]))


def with_a_wrong_token(guarded: Any, root: Path) -> ChannelSecurity:
    return guarded.shown(guarded.ca.device("guesser"), "A" * 43)


FAILED, REFUSED = "connections_failed_total", "peers_refused_total"
STRANGERS: dict[str, tuple[Callable[[Any, Path], ChannelSecurity], type[LinkError], str, str]] = {
    "in plaintext": (lambda guarded, root: ChannelSecurity(insecure=True), LinkError, "plaintext", FAILED),
    "without a certificate": (
        lambda guarded, root: ChannelSecurity(ca_file=guarded.trust, token=guarded.token),
        LinkError,
        "cannot be reached|--cert",
        FAILED,
    ),
    "of another authority": (of_another_authority, LinkError, "cannot be reached", FAILED),
    "of another authority, with a device's name": (with_the_name_of_another, LinkError, "cannot be reached", FAILED),
    "expired": (expired, LinkError, "cannot be reached", FAILED),
    "with a server's certificate": (with_a_servers_certificate, LinkError, "cannot be reached", FAILED),
    "revoked": (revoked, SecurityError, "not accepted", REFUSED),
    "with a wrong token": (with_a_wrong_token, SecurityError, "not accepted", REFUSED),
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_refused(guarded, bystander, device, eventually, tmp_path, stranger):
    make, error, message, metric = stranger
    security = make(guarded, tmp_path)
    counted, told = guarded.metric(metric), len(guarded.told())
    with pytest.raises(error, match=message):
        device(guarded.server.address, security=security).generate()
    assert eventually(lambda: guarded.metric(metric) == counted + 1)
    [line] = guarded.told()[told:]
    assert line["event"] == "turned away"
    assert line["reason"] == ("certificate or token" if metric == REFUSED else "TLS handshake, or no call after it")


def test_a_server_by_another_name_is_refused_by_the_device(guarded, bystander, device, eventually):
    counted = guarded.metric(FAILED)
    security = guarded.security("misled")
    with pytest.raises(SecurityError, match="another host name"):
        device(guarded.server.address.replace("127.0.0.1", "localhost"), security=security).generate()
    assert eventually(lambda: guarded.metric(FAILED) == counted + 1)


@pytest.mark.parametrize("guess", ["another device's", "nobody's"])
def test_a_session_that_is_not_ones_own_does_not_exist(guarded, bystander, device, make_thief, eventually, guess):
    owner = device(guarded.server.address, security=guarded.security(f"owner-{len(guess)}")).tokens()
    next(iter(owner))
    session = owner._back._session.id if guess == "another device's" else bytes(16)
    counted = guarded.metric("faults_total{code=SESSION_UNKNOWN}")
    with pytest.raises(ProtocolError) as caught:
        make_thief(guarded, f"thief-{len(guess)}", session)
    assert caught.value.code == "SESSION_UNKNOWN"
    assert guarded.metric("faults_total{code=SESSION_UNKNOWN}") == counted + 1
    assert eventually(lambda: any(line.get("reason") == "SESSION_UNKNOWN" for line in guarded.told()))
    owner.close(cancel=True)


@pytest.fixture
def make_thief(device: Callable[..., Any]) -> Callable[[Any, str, bytes], None]:
    """A device that attaches to a session by its id."""

    def steal(guarded: Any, name: str, session: bytes) -> None:
        stream = device(guarded.server.address, security=guarded.security(name)).tokens()
        next(iter(stream))
        link = stream._back._session
        link._disconnect()
        link.id = session
        try:
            link._attach()
        finally:
            link._disconnect()

    return steal
