"""What the front and its workers know each other by: certificates that are made at each start and kept nowhere else."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..wire.security import ServerSecurity
from ..wire.transport import CLIENT_OPTIONS

_WORKER = "isthmus-worker"  # in every worker's certificate, as their addresses are not known before they run


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class WorkerIdentity:
    """What a worker is given: its own certificate, and the authority by which it knows the front."""

    authority: bytes
    own: Pair

    def write(self, folder: Path) -> ServerSecurity:
        """TLS with these, for clients of this authority alone; a server looks at the files at each handshake."""
        files = {"ca.pem": self.authority, "cert.pem": self.own.certificate, "key.pem": self.own.key}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return ServerSecurity(
            cert_file=folder / "cert.pem",
            key_file=folder / "key.pem",
            client_ca=folder / "ca.pem",
            behind_front=True,
        )


@dataclass(frozen=True)
class FrontIdentity:
    """An authority's certificate, and the front's and the workers' pairs of it."""

    authority: bytes
    own: Pair
    workers: Pair

    @classmethod
    def create(cls) -> FrontIdentity:
        """A new authority, whose own key is forgotten at once."""
        from ..wire.authority import CA_CERT, Authority, Issued

        with tempfile.TemporaryDirectory(prefix="isthmus-fleet-") as name:
            folder = Path(name)
            Authority.create(folder, "isthmus-fleet")
            authority = Authority(folder)

            def pair(issued: Issued) -> Pair:
                return Pair(Path(issued.cert_file).read_bytes(), Path(issued.key_file).read_bytes())

            # A fleet may run for years.
            workers, front = authority.server([_WORKER], days=3650), authority.device("front", days=3650)
            return cls((folder / CA_CERT).read_bytes(), pair(front), pair(workers))

    @property
    def for_workers(self) -> WorkerIdentity:
        """What a worker is given."""
        return WorkerIdentity(self.authority, self.workers)

    def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to a worker."""
        credentials = grpc.ssl_channel_credentials(self.authority, self.own.key, self.own.certificate)
        options = [*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", _WORKER)]
        return grpc.aio.secure_channel(address, credentials, options)
