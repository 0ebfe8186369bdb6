"""A certificate authority of the operator's own: for servers, for devices, and a list of what is revoked.

A folder holds it: ``ca-cert.pem``, which both ends are given; ``ca-key.pem``, which stays where it is; ``revoked.pem``,
the list that servers read; and each certificate that was issued, with its key, to be moved to where it is used.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...errors import SecurityError

CA_DAYS, SERVER_DAYS, DEVICE_DAYS = 3650.0, 365.0, 30.0
MAX_DAYS = 3650.0
_CLOCK_SKEW = datetime.timedelta(hours=1)  # a device's clock may be behind
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

CA_CERT, CA_KEY, REVOKED = "ca-cert.pem", "ca-key.pem", "revoked.pem"


@dataclass(frozen=True)
class Issued:
    """A certificate that was written.

    Attributes:
        name: of the authority, the server or the device.
        expires: UTC, ISO 8601.
    """

    name: str
    serial: str
    cert_file: str
    key_file: str
    expires: str


class Authority:
    """An authority that is there already, see `create`.

    Raises:
        SecurityError: the folder holds none, or its files cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self._certificate = x509.load_pem_x509_certificate((self.folder / CA_CERT).read_bytes())
            key = serialization.load_pem_private_key((self.folder / CA_KEY).read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise SecurityError(
                f"{self.folder}: no certificate authority can be read there ({error}); make one with `isthmus certs ca`"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._certificate.public_key():
            raise SecurityError(f"{self.folder / CA_KEY}: not the key of {CA_CERT}; give the folder as it was made")
        self._key = key

    @classmethod
    def create(cls, folder: str | Path, name: str = "isthmus", *, days: float = CA_DAYS) -> Issued:
        """Make an authority in a folder, with an empty list of revoked certificates.

        Raises:
            SecurityError: there is one, a value is out of range, or the folder cannot be written.
        """
        root = Path(folder)
        _check(name, days)
        if (root / CA_KEY).exists() or (root / CA_CERT).exists():
            raise SecurityError(f"{root}: holds an authority, which is never overwritten; choose another folder")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")]), key, days)
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")]))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        issued = _write_pair(root, "ca", name, certificate, key)
        cls(root)._write_revoked([])
        return issued

    def server(self, hosts: Sequence[str], *, days: float = SERVER_DAYS) -> Issued:
        """Issue a certificate for a server that clients reach by these host names or addresses.

        Raises:
            SecurityError: no host, a value out of range, a file in the way, or the folder cannot be written.
        """
        if not hosts:
            raise SecurityError("a server's certificate without a host: give each name or address that clients use")
        _check(hosts[0].replace(":", "-"), days)
        names = [_general_name(host) for host in hosts]
        return self._issue("server", hosts[0].replace(":", "-"), names, ExtendedKeyUsageOID.SERVER_AUTH, days)

    def device(self, name: str, *, days: float = DEVICE_DAYS) -> Issued:
        """Issue a certificate for a device; its name is the identity that its sessions and limits belong to.

        Raises:
            SecurityError: a value out of range, a file in the way, or the folder cannot be written.
        """
        _check(name, days)
        names = [x509.UniformResourceIdentifier(f"isthmus:device:{name}")]
        return self._issue("device", name, names, ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def revoke(self, certificate: str | Path) -> list[str]:
        """Revoke a certificate, by its file or its serial number in hexadecimal; all serial numbers on the list.

        Raises:
            SecurityError: no such certificate, one of another authority, or the folder cannot be written.
        """
        path = Path(certificate)
        if path.is_file():
            try:
                found = x509.load_pem_x509_certificate(path.read_bytes())
            except ValueError as error:
                raise SecurityError(f"{path}: no certificate can be read from it ({error}); give a PEM file") from error
            try:
                found.verify_directly_issued_by(self._certificate)
            except (ValueError, TypeError, InvalidSignature) as error:
                raise SecurityError(f"{path}: issued by another authority than that in {self.folder}") from error
            serial = found.serial_number
        elif re.fullmatch(r"[0-9a-fA-F]{1,40}", str(certificate)):
            serial = int(str(certificate), 16)
        else:
            raise SecurityError(f"{certificate}: neither a file nor a serial number in hexadecimal; give one of them")
        revoked = sorted({*read_revoked(self.folder / REVOKED, self.folder / CA_CERT), serial})
        self._write_revoked(revoked)
        return [f"{number:x}" for number in revoked]

    def _issue(
        self, kind: str, name: str, names: Sequence[x509.GeneralName], use: x509.ObjectIdentifier, days: float
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, days)
            .issuer_name(self._certificate.subject)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _write_pair(self.folder, f"{kind}-{name}", name, certificate, key)

    def _write_revoked(self, serials: Sequence[int]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(now)
            .next_update(now + datetime.timedelta(days=CA_DAYS))
        )
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        signed = builder.sign(self._key, hashes.SHA256())
        _write(self.folder / REVOKED, signed.public_bytes(serialization.Encoding.PEM), 0o644)


def read_revoked(path: Path, ca_file: Path) -> frozenset[int]:
    """Serial numbers on a list that this authority has signed.

    Raises:
        SecurityError: the file cannot be read, or another one has signed it.
    """
    try:
        revoked = x509.load_pem_x509_crl(path.read_bytes())
        authority = x509.load_pem_x509_certificate(ca_file.read_bytes())
    except (OSError, ValueError) as error:
        raise SecurityError(
            f"{path}: no revocation list can be read from it ({error}); give the file that `isthmus certs` keeps"
        ) from error
    public_key = authority.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not revoked.is_signature_valid(public_key):
        raise SecurityError(f"{path}: not signed by {ca_file}; give the list of the authority that devices come from")
    return frozenset(entry.serial_number for entry in revoked)


def serial_of(pem: bytes) -> int:
    """Serial number of a certificate that a handshake has verified."""
    return x509.load_pem_x509_certificate(pem).serial_number


def _check(name: str, days: float) -> None:
    if not _NAME.fullmatch(name):
        raise SecurityError(
            f"name {name!r}: must begin with a letter or digit and hold only these, dots, dashes and underscores, at "
            "most 63"
        )
    if not 0 < days <= MAX_DAYS:
        raise SecurityError(f"days={days}: must be above 0 and at most {MAX_DAYS:g}")


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        _check(host, 1)
        return x509.DNSName(host)


def _builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: float) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(
    folder: Path, stem: str, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> Issued:
    cert_file, key_file = folder / f"{stem}-cert.pem", folder / f"{stem}-key.pem"
    for path in (cert_file, key_file):
        if path.exists():
            raise SecurityError(f"{path}: is there already and is never overwritten; move it away, or choose a name")
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SecurityError(f"{folder}: {error.strerror or error}; choose another folder") from error
    _write(key_file, private, 0o600)
    _write(cert_file, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    expires = certificate.not_valid_after_utc.isoformat(timespec="seconds")
    return Issued(name, f"{certificate.serial_number:x}", str(cert_file), str(key_file), expires)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file at once; a key is never readable by others, not even for a moment."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
        partial.replace(path)
    except OSError as error:
        raise SecurityError(
            f"{path}: {error.strerror or error}; make the folder writable, or choose another"
        ) from error
