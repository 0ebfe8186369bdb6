"""Multiple-choice tasks in files on this machine, as the documents that the harness' own task definitions read.

The harness (lm-evaluation-harness) would fetch its documents from a hub; these files hold the same sets in the forms
in which others publish them. Only their form is changed here: the wording of prompts is the harness'.
"""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError

Doc = dict[str, Any]
Numbered = list[tuple[int, str]]  # lines, counted from 1

HELLASWAG_LINES = 6  # context, label, four endings


@dataclass(frozen=True)
class Task:
    """A task of the harness and the form of its file.

    Attributes:
        folder: of the harness' tasks, with the definition.
        read: turns the file's lines into documents.
    """

    folder: str
    read: Callable[[Path, Numbered], Iterator[Doc]]


def read_docs(task: str, data: str | Path, *, labels: str | Path | None = None, limit: int | None = None) -> list[Doc]:
    """Read a task's documents.

    Args:
        task: a key of `TASKS`.
        data: the file; ``.bz2`` and ``.gz`` are read through.
        labels: of piqa, one 0 or 1 a line; by default the file beside it that its name leads to.
        limit: take that many from the beginning; by default all.

    Raises:
        RequestError: an unknown task, or a file that is missing or not of the task's form; tells the line.
    """
    if task not in TASKS:
        raise RequestError(f"task {task!r} is unknown; choose one of {', '.join(sorted(TASKS))}")
    if limit is not None and limit < 1:
        raise RequestError(f"limit={limit}: must be at least 1")
    if labels and task != "piqa":
        raise RequestError(f"labels {labels}: {task} has its labels in the data file; leave --labels out")
    path = Path(data)
    docs = list(TASKS[task].read(path, _lines(path)))
    if not docs:
        raise RequestError(f"{path}: holds no items; give the data of {task}")
    if task == "piqa":
        _add_labels(docs, path, Path(labels) if labels else _labels_beside(path))
    return docs[:limit]


def _lines(path: Path) -> Numbered:
    """Lines of a text file that may be compressed, but for empty ones at its end."""
    opener: Any = {".bz2": bz2.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = file.read().rstrip("\r\n").split("\n")
    except FileNotFoundError as error:
        raise RequestError(f"{path}: no such file; give the task's data with --data, labels with --labels") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read ({error}); fetch it again") from error
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1)] if lines != [""] else []


def _malformed(path: Path, number: int, rule: str) -> RequestError:
    return RequestError(f"{path}, line {number}: {rule}; this is not the data of that task, or it is damaged")


def _hellaswag(path: Path, lines: Numbered) -> Iterator[Doc]:
    """Context, label and endings on a line each; they are cleaned as the harness cleans them."""
    for first in range(0, len(lines), HELLASWAG_LINES):
        item = lines[first : first + HELLASWAG_LINES]
        number = item[0][0]
        if len(item) < HELLASWAG_LINES:
            raise _malformed(path, number, f"an item of {len(item)} lines where {HELLASWAG_LINES} belong")
        query, label, *endings = (text for _, text in item)
        if label not in ("0", "1", "2", "3"):
            raise _malformed(path, number + 1, f"label {label[:40]!r} is not 0 to 3")
        yield {"query": query, "choices": endings, "label": label}


def _rows(path: Path, lines: Numbered, fields: dict[str, type]) -> Iterator[tuple[int, Doc]]:
    """JSON objects with these fields."""
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _malformed(path, number, f"not JSON ({error})") from error
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise _malformed(path, number, f"no {name} of type {kind.__name__}")
        yield number, row


def _choices(path: Path, lines: Numbered) -> Iterator[tuple[int, Doc]]:
    """Rows ``{"query": str, "choices": [str, …], "gold": int}``."""
    for number, row in _rows(path, lines, {"query": str, "choices": list, "gold": int}):
        if not all(isinstance(choice, str) and choice for choice in row["choices"]):
            raise _malformed(path, number, "a choice that is no text")
        if not 0 <= row["gold"] < len(row["choices"]):
            raise _malformed(path, number, f"gold {row['gold']} of {len(row['choices'])} choices")
        yield number, row


def _lettered(row: Doc) -> Doc:
    """Choices and answer as ARC has them, with letters."""
    letters = [chr(ord("A") + at) for at in range(len(row["choices"]))]
    return {"choices": {"text": row["choices"], "label": letters}, "answerKey": letters[row["gold"]]}


def _arc(path: Path, lines: Numbered) -> Iterator[Doc]:
    for number, row in _choices(path, lines):
        if not row["query"].startswith("Question: "):
            raise _malformed(path, number, "a query that does not begin with 'Question: '")
        yield {"question": row["query"].removeprefix("Question: ")} | _lettered(row)


def _openbookqa(path: Path, lines: Numbered) -> Iterator[Doc]:
    for _, row in _choices(path, lines):
        yield {"question_stem": row["query"]} | _lettered(row)


def _boolq(path: Path, lines: Numbered) -> Iterator[Doc]:
    for number, row in _choices(path, lines):
        passage, mark, question = row["query"].rpartition("\nQuestion: ")
        if not mark or not passage.startswith("Passage: ") or row["choices"] != ["no", "yes"]:
            raise _malformed(path, number, "not 'Passage: …', 'Question: …' and the choices no, yes")
        # The harness' prompt has the question mark.
        yield {
            "passage": passage.removeprefix("Passage: "),
            "question": question.removesuffix("?"),
            "label": row["gold"],
        }


def _piqa(path: Path, lines: Numbered) -> Iterator[Doc]:
    for _, row in _rows(path, lines, {"goal": str, "sol1": str, "sol2": str}):
        yield {name: row[name] for name in ("goal", "sol1", "sol2")}


def _labels_beside(data: Path) -> Path:
    """``valid-labels.lst`` for ``valid.jsonl``, whatever stands between; or the only one in the folder."""
    name, _, rest = data.name.partition(".")
    named = data.with_name(f"{name}-labels.{rest}").with_suffix(".lst")
    found = [named] if named.is_file() else sorted(data.parent.glob("*-labels*.lst"))
    if len(found) != 1:
        raise RequestError(f"{data}: {len(found)} files of labels (*-labels*.lst) beside it; give one with --labels")
    return found[0]


def _add_labels(docs: list[Doc], data: Path, labels: Path) -> None:
    lines = _lines(labels)
    if len(lines) != len(docs):
        raise RequestError(f"{labels}: {len(lines)} labels for the {len(docs)} items of {data}; give those of one set")
    for doc, (number, line) in zip(docs, lines, strict=True):
        if line not in ("0", "1"):
            raise _malformed(labels, number, f"label {line[:40]!r} is not 0 or 1")
        doc["label"] = int(line)


TASKS = {
    "hellaswag": Task("hellaswag", _hellaswag),
    "piqa": Task("piqa", _piqa),
    "arc_easy": Task("arc", _arc),
    "boolq": Task("super_glue/boolq", _boolq),
    "openbookqa": Task("openbookqa", _openbookqa),
}
