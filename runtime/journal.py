"""The journal of a long evaluation: what is done already, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from .._version import __version__
from ..errors import RequestError


class Journal:
    """Results by name, one line of JSON each, appended as they come and kept in memory.

    The first line tells what the evaluation is. A line that a kill cut short is passed over: its result is
    computed again.

    Args:
        path: the file; its folder is made.
        subject: everything that determines the results, `versions` among them, as JSON can hold it.

    Raises:
        RequestError: the file is no journal, is another evaluation's, or cannot be written.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self.path = path
        self._results: dict[str, Any] = {}
        header = json.dumps({"isthmus evaluation": subject_key(subject), "subject": subject}, sort_keys=True) + "\n"
        try:
            if path.exists():
                self._read(header)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                # In one step: a file without its first line would be nobody's journal.
                temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                temporary.write_text(header, encoding="utf-8")
                os.replace(temporary, path)
            self._file = path.open("a", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"journal {path}: {error}; give another file with --journal") from error

    @property
    def names(self) -> list[str]:
        """Names of the results it holds."""
        return list(self._results)

    def get(self, name: str) -> Any:
        """The result of that name, or None."""
        return self._results.get(name)

    def put(self, name: str, result: Any) -> None:
        """Append a result; once this returns, killing the process no longer loses it."""
        self._results[name] = result
        self._file.write(json.dumps({"name": name, "result": result}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file and keep it."""
        self._file.close()

    def remove(self) -> None:
        """Close the file and delete it: the evaluation is done."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _read(self, header: str) -> None:
        text = self.path.read_text(encoding="utf-8", errors="replace")
        first, *lines = text.split("\n")
        if first + "\n" != header:
            ours = first.startswith('{"isthmus evaluation"')
            raise RequestError(
                f"journal {self.path}: {'of another evaluation' if ours else 'not a journal'}; give another file, or "
                "delete this one"
            )
        for line in lines:
            try:
                entry = json.loads(line)
                self._results[entry["name"]] = entry["result"]
            except (ValueError, TypeError, KeyError):
                continue
        if not text.endswith("\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")


def versions() -> dict[str, str]:
    """Of Isthmus and onnxruntime: another may compute other bits."""
    return {"isthmus": __version__, "onnxruntime": onnxruntime.__version__}


def subject_key(subject: Mapping[str, Any]) -> str:
    """Hex digits that stand for what determines an evaluation's results."""
    return hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:32]
