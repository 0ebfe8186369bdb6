"""Who a peer is, and whether it may come in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import SecurityError
from ..wire.security import DEVICE_HEADER, TOKEN_HEADER, TOKEN_SCHEME, ServerSecurity, file_stamps
from ..wire.tokens import TokenFile

logger = logging.getLogger(__name__)

Metadata = Iterable[tuple[str, str | bytes]]

NOT_ACCEPTED = "this device's certificate or token is not accepted; ask for a new one"
ANYONE = ""  # the identity of all peers where none is asked for


@dataclass
class Admission:
    """Tells peers apart by the certificates that their handshakes have verified, or by the tokens that they show.

    Raises:
        SecurityError: the list of revoked certificates cannot be read, or is another authority's; or the tokens cannot.
    """

    security: ServerSecurity

    def __post_init__(self) -> None:
        self._revoked: frozenset[int] = frozenset()
        self._stamp: object = None
        self._tokens = None if self.security.tokens is None else TokenFile(Path(self.security.tokens))
        self._read_revoked(at_start=True)
        self._seen: object = None
        self.changed()

    def identity(self, auth_context: Mapping[str, Iterable[bytes]], metadata: Metadata = ()) -> str | None:
        """A peer's name, that in its certificate first, or as a front calls it; `ANYONE` where nobody is asked.

        None if its certificate was revoked, or it shows no token where one is asked for.
        """
        certified, named = self._certified(auth_context), self._named(metadata)
        if certified is None or named is None:
            return None
        if self.security.behind_front:
            return _text(next((value for key, value in metadata if key == DEVICE_HEADER), ANYONE))
        return certified if certified != ANYONE else named

    def changed(self) -> bool:
        """Whether a file that says who may come in was replaced since the last call."""
        stamp = file_stamps(*(path for path in (self.security.revoked, self.security.tokens) if path is not None))
        changed, self._seen = stamp != self._seen, stamp
        return changed

    def _named(self, metadata: Metadata) -> str | None:
        """Whose token a call shows; None if it is nobody's."""
        if self._tokens is None:
            return ANYONE
        shown = next((value for key, value in metadata if key == TOKEN_HEADER), b"")
        text = _text(shown)
        return self._tokens.name_of(text.removeprefix(TOKEN_SCHEME)) if text.startswith(TOKEN_SCHEME) else None

    def _certified(self, auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
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


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _first(auth_context: Mapping[str, Iterable[bytes]], key: str) -> bytes:
    return next(iter(auth_context.get(key, ())), b"")
