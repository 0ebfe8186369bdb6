"""Who trusts whom, over real handshakes."""

from __future__ import annotations

import datetime
import os
import stat
import sys

import pytest

from isthmus.errors import LinkError, SecurityError
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire import development
from isthmus.runtime.wire.development import certificate_path, development_certificate
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity, is_loopback
from isthmus.runtime.wire.transport import split_address

PROMPT = [1, 2, 3]


@pytest.fixture
def other_user(tmp_path, monkeypatch):
    """Another user's configuration folder: nothing in it is trusted here."""

    def enter() -> None:
        monkeypatch.setattr(development, "user_config_path", lambda name: tmp_path / name)

    return enter


def own_certificate(folder) -> ServerSecurity:
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    certificate, key = development._make()
    cert_file.write_bytes(certificate)
    key_file.write_bytes(key)
    return ServerSecurity(cert_file=cert_file, key_file=key_file)


def test_a_certificate_of_the_users_own_is_served_and_trusted(make_server, make_generation, tmp_path, expected):
    security = own_certificate(tmp_path)
    server = make_server(security)
    trusting = ChannelSecurity(ca_file=security.cert_file)
    assert make_generation(server.address, PROMPT, security=trusting).run(3) == expected(PROMPT, 3)
    assert security.describe() == f"tls, certificate {security.cert_file}"


def test_a_server_with_a_wrong_certificate_is_not_trusted(make_server, make_link, tmp_path, user_config, bystander):
    server = make_server(own_certificate(tmp_path))
    development_certificate()
    with pytest.raises(SecurityError, match=r"not trusted here.*--tls-ca"):
        make_link(server.address).open(8, Sampling())
    with pytest.raises(SecurityError, match="not trusted here"):
        make_link(server.address, security=ChannelSecurity(ca_file=certificate_path())).open(8, Sampling())


def test_a_certificate_for_another_host_is_not_trusted(make_server, make_link, tmp_path, monkeypatch):
    monkeypatch.setattr(development.ipaddress, "ip_address", lambda _: __import__("ipaddress").IPv4Address("10.0.0.1"))
    security = own_certificate(tmp_path)
    monkeypatch.undo()
    server = make_server(security)
    with pytest.raises(SecurityError, match="host name"):
        make_link(server.address, security=ChannelSecurity(ca_file=security.cert_file)).open(8, Sampling())


def test_the_systems_authorities_do_not_vouch_for_a_development_certificate(server, make_link, other_user):
    other_user()
    with pytest.raises(SecurityError, match="not trusted here"):
        make_link(server.address).open(8, Sampling())


def test_plaintext_to_a_tls_server_says_what_to_do(server, make_link, bystander):
    with pytest.raises(LinkError, match="drop --insecure"):
        make_link(server.address, security=ChannelSecurity(insecure=True)).open(8, Sampling())


def test_tls_to_a_plaintext_server_says_what_to_do(make_server, make_link, make_generation, expected):
    server = make_server(ServerSecurity(insecure=True))
    plain = make_generation(server.address, PROMPT, security=ChannelSecurity(insecure=True))
    with pytest.raises(SecurityError, match=r"does not speak TLS.*--insecure"):
        make_link(server.address).open(8, Sampling())
    assert plain.run(3) == expected(PROMPT, 3)


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\xff\xfe"], ids=["missing", "empty", "junk", "binary"])
def test_a_ca_file_without_certificates_is_named(make_link, tmp_path, content):
    ca_file = tmp_path / "ca.pem"
    if content is not None:
        ca_file.write_bytes(content)
    with pytest.raises(SecurityError, match=r"ca\.pem.*PEM"):
        make_link("127.0.0.1:1", security=ChannelSecurity(ca_file=ca_file)).open(8, Sampling())


def test_certificate_and_key_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "other").mkdir()
    first, second = own_certificate(tmp_path), own_certificate(tmp_path / "other")
    with pytest.raises(SecurityError, match=r"cert\.pem.*belong together"):
        ServerSecurity(cert_file=first.cert_file, key_file=second.key_file).credentials()
    with pytest.raises(SecurityError, match="none-such"):
        ServerSecurity(cert_file=tmp_path / "none-such", key_file=first.key_file).credentials()
    first.key_file.write_bytes(b"junk")
    with pytest.raises(SecurityError, match="PEM"):
        first.credentials()


def test_an_encrypted_key_does_not_ask_for_its_password(tmp_path):
    from cryptography.hazmat.primitives import serialization

    security = own_certificate(tmp_path)
    key = serialization.load_pem_private_key(security.key_file.read_bytes(), None)
    security.key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(SecurityError, match="without a password"):
        security.credentials()


def test_options_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(SecurityError, match="both"):
        ServerSecurity(cert_file=tmp_path)
    with pytest.raises(SecurityError, match="exclude"):
        ServerSecurity(insecure=True, cert_file=tmp_path, key_file=tmp_path)
    with pytest.raises(SecurityError, match="exclude"):
        ChannelSecurity(insecure=True, ca_file=tmp_path)


def test_the_development_certificate_is_made_once_and_kept_private(other_user):
    other_user()
    cert_file, key_file = development_certificate()
    assert cert_file == certificate_path()
    content = cert_file.read_bytes(), key_file.read_bytes()
    assert development_certificate() == (cert_file, key_file)
    assert (cert_file.read_bytes(), key_file.read_bytes()) == content
    if os.name == "posix":
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert sorted(path.name for path in cert_file.parent.iterdir()) == ["dev-cert.pem", "dev-key.pem"]


@pytest.mark.parametrize("fault", ["expiring", "damaged", "key missing", "key of another"])
def test_a_development_certificate_that_is_of_no_use_is_made_anew(other_user, monkeypatch, fault):
    other_user()
    if fault == "expiring":
        with monkeypatch.context() as patch:
            patch.setattr(development, "_LIFETIME", datetime.timedelta(days=6))
            development_certificate()
    cert_file, key_file = development_certificate() if fault != "expiring" else (certificate_path(), None)
    if fault == "damaged":
        cert_file.write_bytes(b"junk")
    if fault == "key missing":
        key_file.unlink()
    if fault == "key of another":
        key_file.write_bytes(development._make()[1])
    before = cert_file.read_bytes()
    development_certificate()
    assert cert_file.read_bytes() != before
    assert ServerSecurity().credentials() is not None


def test_a_missing_package_is_named_with_its_remedy(other_user, monkeypatch):
    other_user()
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(SecurityError, match=r"isthmus\[server\]"):
        development_certificate()


def test_a_configuration_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(development, "user_config_path", lambda name: tmp_path / "file" / name)
    with pytest.raises(SecurityError, match="--tls-cert"):
        development_certificate()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("a.b", False)],
)
def test_loopback_hosts_are_known(host, loopback):
    assert is_loopback(host) is loopback


def test_addresses_are_split():
    assert split_address("example.org:7070") == ("example.org", 7070)
    assert split_address("[::1]:0") == ("::1", 0)
