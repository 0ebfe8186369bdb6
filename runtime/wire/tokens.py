"""Bearer tokens: what a device says to a server to be let in, and the file that lets the server recognise it.

A token is 256 random bits; the file has a name and the token's SHA-256 a line. Whoever reads the file learns no token,
and random ones of that length need no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

from ...errors import SecurityError
from .security import file_stamps

logger = logging.getLogger(__name__)

ENVIRONMENT = "ISTHMUS_TOKEN"
_TOKEN_BYTES = 32
_NAME = re.compile(r"[\w.-]{1,64}")
_LINE = re.compile(r"([\w.-]{1,64}) ([0-9a-f]{64})")


def issue_token(path: str | Path, name: str) -> str:
    """Add a device to a token file, which is made if it is not there; returns its token, which is kept nowhere.

    Raises:
        SecurityError: the name is taken or of another form, or the file cannot be read or written.
    """
    path = Path(path)
    if not _NAME.fullmatch(name):
        raise SecurityError(f"name {name!r}: must be 1 to 64 letters, digits, dots, dashes or underscores")
    known = _read(path) if path.exists() else {}
    if name in known.values():
        raise SecurityError(f"{path}: {name} has a token already; remove its line to issue another")
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    lines = [f"{other} {hashed}\n" for hashed, other in known.items()] + [f"{name} {_hash(token)}\n"]
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(lines)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SecurityError(f"{path}: {error.strerror or error}; choose a folder that can be written") from error
    return token


def read_token(path: str | Path) -> str:
    """A device's token from the file that holds it alone.

    Raises:
        SecurityError: it cannot be read, or holds no token.
    """
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SecurityError(f"{path}: no token can be read from it ({error}); give the file that has it") from error
    return checked_token(token, str(path))


def checked_token(token: str, source: str) -> str:
    """The token, if it has the form of one; raises `SecurityError` that names where it came from, not what it is."""
    if not re.fullmatch(r"[\w-]{32,128}", token):
        raise SecurityError(f"{source}: holds no token; it is what `isthmus certs token` printed, in one line")
    return token


class TokenFile:
    """The names of tokens, read anew when the file changes; one that cannot be read leaves the one before in force.

    Raises:
        SecurityError: it cannot be read at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = file_stamps(path)
        self._names = _read(path)

    def name_of(self, token: str) -> str | None:
        """Whose token this is; takes as long for a wrong one as for any."""
        self._reread()
        hashed, found = _hash(token), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, hashed):
                found = name
        return found

    def _reread(self) -> None:
        stamp = file_stamps(self._path)
        if stamp == self._stamp:
            return
        try:
            self._names = _read(self._path)
        except SecurityError as error:
            logger.warning("%s; the tokens before it stay in force", error)
        else:
            logger.info("%s: %d tokens", self._path, len(self._names))
        self._stamp = stamp


def _read(path: Path) -> dict[str, str]:
    """Names by hash."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SecurityError(f"{path}: {error}; give a file that `isthmus certs token` has written") from error
    names = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise SecurityError(f"{path}, line {number}: not a name and a SHA-256; write it with `isthmus certs token`")
        names[match[2]] = match[1]
    return names


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()
