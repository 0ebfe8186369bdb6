"""Who a peer is, and whether it may come in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import SecurityError
from ..wire.security import ServerSecurity, file_stamps

logger = logging.getLogger(__name__)

ANYONE = ""  # the identity of all peers where none is asked for


@dataclass
class Admission:
    """Tells peers apart by the certificates that their handshakes have verified.

    Raises:
        SecurityError: the list of revoked certificates cannot be read, or is another authority's.
    """

    security: ServerSecurity

    def __post_init__(self) -> None:
        self._revoked: frozenset[int] = frozenset()
        self._stamp: object = None
        self._read_revoked(at_start=True)

    def identity(self, auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
        """A peer's name, `ANYONE` where nobody is asked for one; None if its certificate was revoked."""
        if self.security.client_ca is None:
            return ANYONE
        self._read_revoked()
        pem = _first(auth_context, "x509_pem_cert")
        name = _first(auth_context, "x509_common_name").decode("utf-8", "replace")
        if not pem or not name:
            return None
        from ..wire.authority import serial_of

        return None if serial_of(pem) in self._revoked else name

    def _read_revoked(self, *, at_start: bool = False) -> None:
        """Read the list anew if its file has changed; one that cannot be read leaves the one before it in force."""
        path, authority = self.security.revoked, self.security.client_ca
        if path is None or authority is None:
            return
        stamp = file_stamps(path)
        if stamp == self._stamp:
            return
        from ..wire.authority import read_revoked

        try:
            self._revoked = read_revoked(Path(path), Path(authority))
        except SecurityError as error:
            if at_start:
                raise
            logger.warning("%s; the list before it stays in force", error)
            return
        self._stamp = stamp
        logger.info("%s: %d certificates are revoked", path, len(self._revoked))


def _first(auth_context: Mapping[str, Iterable[bytes]], key: str) -> bytes:
    return next(iter(auth_context.get(key, ())), b"")
