"""Log lines for machines."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

FIELDS = ("session", "step")  # given to a logger as ``extra``, where a line is about one


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time in UTC, level, logger and message; session and step where it is about one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": time, "level": record.levelname, "logger": record.name}
        line["message"] = record.getMessage()
        line |= {field: getattr(record, field) for field in FIELDS if hasattr(record, field)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
