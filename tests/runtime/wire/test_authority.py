"""Certificates of the operator's own, and who gets in with them: real handshakes."""

from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from isthmus.errors import LinkError, ProtocolError, SecurityError
from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire.authority import Authority, read_revoked
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

PROMPT = [1, 2, 3]


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    Authority.create(tmp_path / "ca")
    return Authority(tmp_path / "ca")


@pytest.fixture
def mutual(ca: Authority) -> ServerSecurity:
    issued = ca.server(["localhost", "127.0.0.1"])
    return ServerSecurity(
        cert_file=Path(issued.cert_file),
        key_file=Path(issued.key_file),
        client_ca=ca.folder / "ca-cert.pem",
        revoked=ca.folder / "revoked.pem",
    )


def device(ca: Authority, name: str, **options: float) -> ChannelSecurity:
    issued = ca.device(name, **options)
    return ChannelSecurity(
        ca_file=ca.folder / "ca-cert.pem", cert_file=Path(issued.cert_file), key_file=Path(issued.key_file)
    )


def test_a_device_of_the_authority_gets_in(ca, mutual, make_server, make_generation, expected):
    server = make_server(mutual)
    assert make_generation(server.address, PROMPT, security=device(ca, "one")).run(3) == expected(PROMPT, 3)


def refused(make_link, server, **options) -> str:
    link = make_link(server.address, **options)
    with pytest.raises(LinkError) as caught:
        link.open(8, Sampling())
    return str(caught.value)


def test_all_others_are_refused_and_disturb_nobody(
    ca, mutual, make_server, make_generation, make_link, expected, tmp_path
):
    server = make_server(mutual)
    good = make_generation(server.address, PROMPT, security=device(ca, "good"))
    good.run(2)
    trust = ca.folder / "ca-cert.pem"
    refused(make_link, server, security=ChannelSecurity(insecure=True))
    refused(make_link, server, security=ChannelSecurity(ca_file=trust))
    Authority.create(tmp_path / "other")
    stranger = Authority(tmp_path / "other").device("stranger")
    pair = {"cert_file": Path(stranger.cert_file), "key_file": Path(stranger.key_file)}
    refused(make_link, server, security=ChannelSecurity(ca_file=trust, **pair))
    expired = device(ca, "late", days=0.5 / 86400)
    time.sleep(1.2)
    refused(make_link, server, security=expired)
    assert server.sessions == 1
    assert good.run(3) == expected(PROMPT, 5)


def test_a_revoked_device_is_refused_from_its_next_stream_on(
    ca, mutual, make_server, make_generation, make_link, expected
):
    server = make_server(mutual)
    good, bad = device(ca, "good"), device(ca, "bad")
    running = make_generation(server.address, PROMPT, security=good)
    assert make_generation(server.address, PROMPT, security=bad).run(1) == expected(PROMPT, 1)
    ca.revoke(bad.cert_file)
    with pytest.raises(SecurityError, match="not accepted"):
        make_link(server.address, security=bad).open(8, Sampling())
    assert running.run(4) == expected(PROMPT, 4)
    make_link(server.address, security=good).open(8, Sampling())


def test_a_stream_that_runs_ends_when_its_device_is_revoked(
    ca, mutual, make_server, make_generation, expected, eventually
):
    server = make_server(mutual)
    good, bad = device(ca, "good"), device(ca, "bad")
    running, lost = (make_generation(server.address, PROMPT, security=each) for each in (good, bad))
    running.run(2)
    lost.run(2)
    ca.revoke(bad.cert_file)
    assert eventually(lambda: server.sessions == 1)
    with pytest.raises(SecurityError, match="not accepted"):
        lost.run(1)
    assert running.run(3) == expected(PROMPT, 5)


def test_a_list_that_is_damaged_while_it_is_read_leaves_the_one_before(ca, mutual, make_server, make_link):
    bad = device(ca, "bad")
    ca.revoke(bad.cert_file)
    server = make_server(mutual)
    (ca.folder / "revoked.pem").write_text("nothing")
    with pytest.raises(SecurityError, match="not accepted"):
        make_link(server.address, security=bad).open(8, Sampling())


def test_another_devices_session_does_not_exist(ca, mutual, make_server, make_generation, make_link, expected):
    server = make_server(mutual)
    owner = make_generation(server.address, PROMPT, security=device(ca, "owner"))
    owner.run(1)
    thief: RemoteBack = make_link(server.address, security=device(ca, "thief"))
    thief.open(8, Sampling())
    thief._session.id = owner.link._session.id
    thief._session._disconnect()
    with pytest.raises(ProtocolError) as caught:
        thief._session._attach()
    assert caught.value.code == "SESSION_UNKNOWN"
    assert owner.run(2) == expected(PROMPT, 3)


def test_a_device_has_its_share_and_no_more(ca, mutual, make_server, make_link):
    server = make_server(mutual, max_sessions_per_device=2)
    one, two = device(ca, "one"), device(ca, "two")
    links = [make_link(server.address, security=one) for _ in range(3)]
    for link in links[:2]:
        link.open(8, Sampling())
    with pytest.raises(ProtocolError, match="SERVER_FULL: all 2 sessions of a device"):
        links[2].open(8, Sampling())
    make_link(server.address, security=two).open(8, Sampling())
    links[0].close()
    links[2].open(8, Sampling())


def test_a_device_has_its_share_of_the_kv_and_no_more(ca, mutual, make_server, make_link):
    server = make_server(mutual, kv_bytes_per_device=64 * 20)
    one, two = device(ca, "one"), device(ca, "two")
    first, second = (make_link(server.address, security=one, on_server_loss="fail") for _ in range(2))
    first.open(12, Sampling())
    with pytest.raises(ProtocolError, match="SERVER_FULL: 512 bytes of KV cache are left of the device's share"):
        second.open(9, Sampling())
    with pytest.raises(ProtocolError, match=r"BAD_REQUEST.*a device may have 1280"):
        make_link(server.address, security=two).open(21, Sampling())
    make_link(server.address, security=two).open(20, Sampling())
    first.close()
    make_link(server.address, security=one).open(20, Sampling())


def test_a_servers_certificate_can_be_replaced_while_it_runs(ca, mutual, make_server, make_link, tmp_path):
    server = make_server(mutual)
    make_link(server.address, security=device(ca, "one")).open(8, Sampling())
    Authority.create(tmp_path / "next")
    newer = Authority(tmp_path / "next").server(["localhost", "127.0.0.1"])
    shutil.copy(newer.key_file, mutual.key_file)
    shutil.copy(newer.cert_file, mutual.cert_file)
    two = device(ca, "two")
    refused(make_link, server, security=two)
    trusting = ChannelSecurity(
        ca_file=tmp_path / "next" / "ca-cert.pem", cert_file=two.cert_file, key_file=two.key_file
    )
    make_link(server.address, security=trusting).open(8, Sampling())


def test_a_server_for_other_names_is_not_trusted(ca, mutual, make_server, make_link):
    other = ca.server(["elsewhere.example"])
    security = ServerSecurity(cert_file=Path(other.cert_file), key_file=Path(other.key_file))
    server = make_server(security)
    with pytest.raises(SecurityError, match="another host name"):
        make_link(server.address, security=ChannelSecurity(ca_file=ca.folder / "ca-cert.pem")).open(8, Sampling())


def test_keys_are_their_owners_alone_and_nothing_is_overwritten(ca):
    issued = ca.device("one")
    for path in (issued.key_file, ca.folder / "ca-key.pem"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    before = Path(issued.cert_file).read_bytes()
    with pytest.raises(SecurityError, match="never overwritten"):
        ca.device("one")
    with pytest.raises(SecurityError, match="never overwritten"):
        Authority.create(ca.folder)
    assert Path(issued.cert_file).read_bytes() == before


def test_revoking_adds_to_the_list(ca, tmp_path):
    first, second = ca.device("one"), ca.device("two")
    assert ca.revoke(first.cert_file) == [first.serial]
    assert set(ca.revoke(second.serial)) == {first.serial, second.serial}
    listed = read_revoked(ca.folder / "revoked.pem", ca.folder / "ca-cert.pem")
    assert listed == {int(first.serial, 16), int(second.serial, 16)}
    Authority.create(tmp_path / "other")
    with pytest.raises(SecurityError, match="not signed by"):
        read_revoked(ca.folder / "revoked.pem", tmp_path / "other" / "ca-cert.pem")
    with pytest.raises(SecurityError, match="another authority"):
        ca.revoke(Authority(tmp_path / "other").device("x").cert_file)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda ca: ca.device("a b"), "name 'a b'"),
        (lambda ca: ca.device(""), "name ''"),
        (lambda ca: ca.device("x", days=0), "days=0"),
        (lambda ca: ca.device("x", days=1e9), "days="),
        (lambda ca: ca.server([]), "without a host"),
        (lambda ca: ca.server(["*"]), "name '\\*'"),
        (lambda ca: ca.revoke("nothing here"), "neither a file"),
        (lambda ca: Authority(ca.folder / "none"), "isthmus certs ca"),
    ],
)
def test_bad_input_is_named(ca, action, message):
    with pytest.raises(SecurityError, match=message):
        action(ca)


@pytest.mark.parametrize(
    "options",
    [
        {"insecure": True, "client_ca": Path("x")},
        {"revoked": Path("x")},
    ],
)
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(SecurityError):
        ServerSecurity(**options)
    with pytest.raises(SecurityError, match="go together"):
        ChannelSecurity(cert_file=Path("x"))
    with pytest.raises(SecurityError, match="exclude"):
        ChannelSecurity(insecure=True, cert_file=Path("x"), key_file=Path("y"))
