"""Secure channels: what each end trusts or shows, and what a failed connection means."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from ...errors import LinkError, SecurityError
from .development import certificate_path, development_certificate
from .transport import CLIENT_OPTIONS, split_address


@dataclass(frozen=True)
class ChannelSecurity:
    """How a client connects.

    Args:
        insecure: plaintext; for a link that something else protects, or for a test.
        ca_file: PEM certificates to trust in place of the system's. Without it, a server on this machine is
            also trusted by the user's own development certificate.
    """

    insecure: bool = False
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        if self.insecure and self.ca_file is not None:
            raise SecurityError(f"insecure and a CA file ({self.ca_file}) exclude each other; give one of them")

    def channel(self, address: str) -> grpc.Channel:
        """A channel to ``HOST:PORT``; it connects on first use.

        Raises:
            LinkError: the address has another form.
            SecurityError: the CA file is missing or holds no certificate.
        """
        credentials = self._credentials(address)
        if credentials is None:
            return grpc.insecure_channel(address, CLIENT_OPTIONS)
        return grpc.secure_channel(address, credentials, CLIENT_OPTIONS)

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """The same for an event loop, which must run."""
        credentials = self._credentials(address)
        if credentials is None:
            return grpc.aio.insecure_channel(address, CLIENT_OPTIONS)
        return grpc.aio.secure_channel(address, credentials, CLIENT_OPTIONS)

    def _credentials(self, address: str) -> grpc.ChannelCredentials | None:
        host, _ = split_address(address)
        return None if self.insecure else grpc.ssl_channel_credentials(self._roots(host))

    def _roots(self, host: str) -> bytes | None:
        if self.ca_file is not None:
            return _read_certificates(self.ca_file)
        own = certificate_path()
        return _read_certificates(own) if is_loopback(host) and own.is_file() else None

    def explain(self, address: str, error: grpc.RpcError) -> LinkError:
        """What a connection's failure means for the user; a `SecurityError` where trying again is useless."""
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        details = (error.details() if isinstance(error, grpc.Call) else None) or ""
        reason = details.rpartition("last error: ")[2] or code.name
        if "Hostname Verification" in details:
            return SecurityError(
                f"{address}: its certificate is not trusted here, because it was made for another host name; "
                "connect by a name or an address that is in it"
            )
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return SecurityError(
                f"{address}: its certificate is not trusted here; pass the file that `isthmus serve` names when it "
                "starts, or its CA's, with --tls-ca"
            )
        if "WRONG_VERSION_NUMBER" in details:
            return SecurityError(
                f"{address}: does not speak TLS; if it is an Isthmus server that was started with "
                "--insecure and the link is safe, pass --insecure here too"
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return LinkError(f"{address}: answers, but is no Isthmus server ({reason}); check the address")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return LinkError(f"{address}: refuses more streams ({reason}); try again later")
        if self.insecure and "refused" not in details and "lookup" not in details:
            return LinkError(
                f"{address}: closed the plaintext connection ({reason}); if it expects TLS, drop "
                "--insecure and pass its certificate with --tls-ca; otherwise check that it is an Isthmus server"
            )
        return LinkError(f"{address}: cannot be reached ({reason}); check the address, and that the server runs")


@dataclass(frozen=True)
class ServerSecurity:
    """What a server shows: a certificate of the user's, else the development certificate, else plaintext.

    Args:
        insecure: plaintext; only where something else protects the link.
        cert_file: PEM certificate chain; with ``key_file`` or not at all.
        key_file: PEM private key.
    """

    insecure: bool = False
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise SecurityError("a certificate and its key go together; give both --tls-cert and --tls-key")
        if self.insecure and self.cert_file is not None:
            raise SecurityError("insecure and a certificate exclude each other; give one of them")

    def credentials(self) -> grpc.ServerCredentials | None:
        """Credentials for `grpc`, `None` for plaintext; makes the development certificate if it is needed.

        Raises:
            SecurityError: a file is missing, is not PEM, or the key is another certificate's.
        """
        if self.insecure:
            return None
        if self.cert_file is not None and self.key_file is not None:
            cert_file, key_file = self.cert_file, self.key_file
        else:
            cert_file, key_file = development_certificate()
        try:
            # gRPC takes anything and fails at the first handshake; this says now what is wrong.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password=_no_password)
            pair = key_file.read_bytes(), cert_file.read_bytes()
        except OSError as error:  # ssl.SSLError is one
            raise SecurityError(
                f"certificate {cert_file} with key {key_file}: {error}; both must be PEM files that belong "
                "together, the key without a password"
            ) from error
        return grpc.ssl_server_credentials([pair])

    def describe(self) -> str:
        """A few words for the user, with the file that a client must trust."""
        if self.insecure:
            return "plaintext"
        return f"tls, certificate {self.cert_file if self.cert_file is not None else certificate_path()}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_certificates(path: Path) -> bytes:
    try:
        pem = path.read_bytes()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (OSError, ValueError) as error:
        raise SecurityError(
            f"{path}: no certificates can be read from it ({error}); give a PEM file, as `isthmus serve` prints one"
        ) from error
    return pem


def _no_password() -> str:
    """Stands in for OpenSSL's prompt, which would wait for a terminal."""
    return ""
