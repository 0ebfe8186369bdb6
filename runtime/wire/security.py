"""Secure channels: what each end trusts or shows, and what a failed connection means."""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from ...errors import LinkError, SecurityError
from .development import certificate_path, development_certificate
from .transport import CLIENT_OPTIONS, split_address

logger = logging.getLogger(__name__)

TOKEN_HEADER, TOKEN_SCHEME = "authorization", "Bearer "
DEVICE_HEADER = "isthmus-device-bin"  # by which a front says whose a stream is


@dataclass(frozen=True)
class ChannelSecurity:
    """How a client connects.

    Args:
        insecure: plaintext; for a link that something else protects, or for a test.
        ca_file: PEM certificates to trust in place of the system's. Without it, a server on this machine is
            also trusted by the user's own development certificate.
        cert_file: PEM certificate chain that tells the server who this is; with ``key_file`` or not at all.
        key_file: PEM private key.
        token: that the server asks for, see `isthmus.runtime.wire.tokens`.
    """

    insecure: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.insecure and self.ca_file is not None:
            raise SecurityError(f"insecure and a CA file ({self.ca_file}) exclude each other; give one of them")
        if (self.cert_file is None) != (self.key_file is None):
            raise SecurityError("a certificate and its key go together; give both --cert and --key")
        if self.insecure and self.cert_file is not None:
            raise SecurityError(f"insecure and a certificate ({self.cert_file}) exclude each other; give one of them")

    def channel(self, address: str) -> grpc.Channel:
        """A channel to ``HOST:PORT``; it connects on first use.

        Raises:
            LinkError: the address has another form.
            SecurityError: a file is missing, holds no certificate, or the key is another certificate's.
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

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call says beside its messages."""
        return () if self.token is None else ((TOKEN_HEADER, f"{TOKEN_SCHEME}{self.token}"),)

    def _credentials(self, address: str) -> grpc.ChannelCredentials | None:
        host, _ = split_address(address)
        if self.insecure:
            if self.token is not None and not is_loopback(host):
                raise SecurityError(
                    f"{address}: a token in plaintext is everybody's on the way; leave --insecure out, or the token"
                )
            return None
        key, chain = None, None
        if self.cert_file is not None and self.key_file is not None:
            key, chain = _read_pair(self.cert_file, self.key_file)
        return grpc.ssl_channel_credentials(self._roots(host), key, chain)

    def _roots(self, host: str) -> bytes | None:
        if self.ca_file is not None:
            return _read_certificates(self.ca_file)
        own = certificate_path()
        return _read_certificates(own) if is_loopback(host) and own.is_file() else None

    def explain(self, address: str, code: grpc.StatusCode, details: str) -> LinkError:
        """What a connection's failure means for the user; a `SecurityError` where trying again is useless."""
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
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return SecurityError(f"{address}: {details}")
        if self.cert_file is None and ("CERTIFICATE_REQUIRED" in details or "certificate required" in details.lower()):
            return SecurityError(f"{address}: wants to know who connects; pass this device's --cert and --key")
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
        client_ca: PEM certificates of the authority whose devices may connect; without it anyone may.
        revoked: that authority's list of revoked certificates, see `isthmus.runtime.wire.authority`.
        tokens: file of the tokens with which devices may connect, see `isthmus.runtime.wire.tokens`.
        behind_front: who comes with a certificate is a fleet's front, and says of each stream whose it is.

    Certificate, key and list are looked at again at each handshake, so that files may be replaced while it runs.
    """

    insecure: bool = False
    cert_file: Path | None = None
    key_file: Path | None = None
    client_ca: Path | None = None
    revoked: Path | None = None
    tokens: Path | None = None
    behind_front: bool = False

    def __post_init__(self) -> None:
        if self.behind_front and self.client_ca is None:
            raise SecurityError("behind a front, but without the authority by which that is known; give its client_ca")
        if (self.cert_file is None) != (self.key_file is None):
            raise SecurityError("a certificate and its key go together; give both --tls-cert and --tls-key")
        if self.insecure and self.client_ca is not None:
            raise SecurityError("insecure and an authority for clients exclude each other; give one of them")
        if self.revoked is not None and self.client_ca is None:
            raise SecurityError(f"a revocation list ({self.revoked}) without the authority's --client-ca; give both")
        if self.insecure and self.cert_file is not None:
            raise SecurityError("insecure and a certificate exclude each other; give one of them")

    def credentials(self, begins: Callable[[], None] = lambda: None) -> grpc.ServerCredentials | None:
        """Credentials for `grpc`, `None` for plaintext; makes the development certificate if it is needed.

        Args:
            begins: called as each connection begins, on a thread of gRPC's.

        Raises:
            SecurityError: a file is missing, is not PEM, or the key is another certificate's.
        """
        if self.insecure:
            return None
        if self.cert_file is not None and self.key_file is not None:
            cert_file, key_file = self.cert_file, self.key_file
        else:
            cert_file, key_file = development_certificate()
        roots = None if self.client_ca is None else _read_certificates(self.client_ca)

        def configuration() -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([_read_pair(cert_file, key_file)], roots)

        shown = configuration()
        stamp = file_stamps(cert_file, key_file)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """A new pair, if the files have changed and belong together; gRPC asks at each handshake."""
            nonlocal stamp
            begins()
            found = file_stamps(cert_file, key_file)
            if found == stamp:
                return None
            try:
                renewed = configuration()
            except SecurityError as error:
                logger.warning("%s; the certificate before it stays in use", error)
                return None
            stamp = found
            logger.info("certificate %s was replaced", cert_file)
            return renewed

        return grpc.dynamic_ssl_server_credentials(
            shown,
            changed,  # type: ignore[arg-type]  # None, which grpc takes for no change, is not in its stubs
            require_client_authentication=roots is not None,
        )

    def bind(self, server: grpc.aio.Server, listen: str, begins: Callable[[], None] = lambda: None) -> str:
        """Have a server listen at ``HOST:PORT``; the address as bound.

        Args:
            server: not started yet.
            listen: the address.
            begins: see `credentials`.

        Raises:
            LinkError: the address has another form, or cannot be bound.
            SecurityError: see `credentials`; or tokens would cross a network in plaintext.
        """
        host, _ = split_address(listen)
        if self.insecure and self.tokens is not None and not is_loopback(host):
            raise SecurityError(f"{listen}: tokens in plaintext are everybody's on the way; leave insecure out")
        credentials = self.credentials(begins)
        try:
            if credentials is None:
                port = server.add_insecure_port(listen)
            else:
                port = server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise LinkError(
                f"cannot listen on {listen}: the port is taken or the address is not this machine's; choose another, "
                "port 0 picks a free one"
            ) from error
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def describe(self) -> str:
        """A few words for the user, with the file that a client must trust."""
        if self.insecure:
            return "plaintext"
        return f"tls, certificate {self.cert_file if self.cert_file is not None else certificate_path()}"


def _read_pair(cert_file: Path, key_file: Path) -> tuple[bytes, bytes]:
    """Key and certificate chain; gRPC takes anything and fails at the first handshake, this says now what is wrong."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password=_no_password)
        return key_file.read_bytes(), cert_file.read_bytes()
    except OSError as error:  # ssl.SSLError is one
        raise SecurityError(
            f"certificate {cert_file} with key {key_file}: {error}; both must be PEM files that belong "
            "together, the key without a password"
        ) from error


def file_stamps(*paths: Path) -> tuple[tuple[int, int], ...]:
    """What changes when a file does; zeros for one that is away for the moment."""
    stamps = []
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            stamps.append((0, 0))
            continue
        stamps.append((found.st_mtime_ns, found.st_ino))
    return tuple(stamps)


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
