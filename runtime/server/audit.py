"""The audit log: who came, what sessions they held, and who was turned away, a line of JSON each."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from ...errors import LinkError

logger = logging.getLogger(__name__)


class AuditLog:
    """Appends to a file that others may rotate: it is opened anew when it is no longer the one at its path.

    A line that cannot be written is counted and lost: a full disk ends no generation. Nothing secret is in any.

    Args:
        path: of the file; made, for its owner alone, if it is not there.

    Attributes:
        lost: lines that could not be written.

    Raises:
        LinkError: it cannot be opened at the start.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self.lost = 0
        self._failing = False
        try:
            self._file = self._open()
        except OSError as error:
            raise LinkError(f"{path}: no audit log there ({error.strerror or error}); choose another file") from error

    def record(self, event: str, **fields: str | int) -> None:
        """Write a line: the time in UTC, the event, and what is known of it."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = (json.dumps({"time": time, "event": event} | fields, ensure_ascii=False) + "\n").encode()
        with self._lock:
            try:
                self._write(line)
            except OSError as error:
                self.lost += 1
                if not self._failing:
                    logger.error("%s: %s; lines of the audit log are lost", self._path, error.strerror or error)
                self._failing = True
                return
            if self._failing:
                logger.warning("%s: written again; %d lines were lost so far", self._path, self.lost)
            self._failing = False

    def _write(self, line: bytes) -> None:
        if not self._is_current():
            self._close()
            self._file = self._open()
        end = os.lseek(self._file, 0, os.SEEK_END)
        whole = False
        try:
            whole = os.write(self._file, line) == len(line)
        finally:
            if not whole:
                os.ftruncate(self._file, end)  # no half line
        if not whole:
            raise OSError(errno.ENOSPC, "no space left")

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except OSError:
            return False

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class Visitor:
    """A stream's peer, as the audit log calls it. Without a log nothing is written.

    Args:
        log: to write to, if there is one.
        peer: its address.
        device: its name.
    """

    def __init__(self, log: AuditLog | None, peer: str, device: str) -> None:
        self._log, self._peer, self._device = log, peer, device

    def note(self, event: str, session: bytes = b"", **fields: str | int) -> None:
        """Write what happened, and in which session."""
        if self._log is not None:
            named = {"session": session.hex()[:8]} if session else {}
            self._log.record(event, peer=self._peer, device=self._device, **fields, **named)
