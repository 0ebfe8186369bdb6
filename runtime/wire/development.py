"""A development certificate: self-signed, for this machine, made once."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import time
from pathlib import Path

from platformdirs import user_config_path

from ...errors import SecurityError

_LIFETIME = datetime.timedelta(days=365)
_RENEW_BEFORE_S = 7 * 86400.0  # a server that starts now should not outlive its certificate


def certificate_path() -> Path:
    """Where the development certificate lies, or will; its key lies beside it."""
    return user_config_path("isthmus") / "tls" / "dev-cert.pem"


def development_certificate() -> tuple[Path, Path]:
    """Certificate and key of this machine, made anew if missing or about to expire.

    Raises:
        SecurityError: the package `cryptography` is missing, or the files cannot be written.
    """
    cert_file = certificate_path()
    key_file = cert_file.with_name("dev-key.pem")
    if _seconds_left(cert_file, key_file) > _RENEW_BEFORE_S:
        return cert_file, key_file
    try:
        cert_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        certificate, key = _make()
        _write(key_file, key)
        _write(cert_file, certificate)
    except OSError as error:
        raise SecurityError(
            f"development certificate {cert_file}: {error}; make the folder writable, or pass --tls-cert and --tls-key"
        ) from error
    return cert_file, key_file


def _seconds_left(cert_file: Path, key_file: Path) -> float:
    """Seconds until a certificate expires; negative if there is no usable pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert_file, key_file)
        context.load_verify_locations(cert_file)
    except OSError:  # ssl.SSLError is one
        return -1.0
    ends = [str(found["notAfter"]) for found in context.get_ca_certs() if "notAfter" in found]
    return min(map(ssl.cert_time_to_seconds, ends), default=0.0) - time.time()


def _write(path: Path, content: bytes) -> None:
    """Replace a file at once, readable by its owner only."""
    partial = path.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    partial.replace(path)


def _make() -> tuple[bytes, bytes]:
    """PEM of a fresh certificate and its key."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError as error:
        raise SecurityError(
            "a development certificate needs the package `cryptography`; install isthmus[server], or pass "
            "--tls-cert and --tls-key"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "isthmus development")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.DNSName(host) for host in dict.fromkeys(("localhost", socket.gethostname()))]
    loopback = [x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # the device's clock may be behind
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([*hosts, *loopback]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private
