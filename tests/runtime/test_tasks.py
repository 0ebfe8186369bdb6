"""Task files: what is read from each form, and what is refused with its line."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import RequestError
from isthmus.runtime.tasks import TASKS, read_docs

ROW = {"query": "Question: What is wet?", "choices": ["stone", "water", "wood"], "gold": 1}
BOOLQ = {"query": "Passage: Some\nQuestion: text.\nQuestion: is it so?", "choices": ["no", "yes"], "gold": 1}
PIQA = {"goal": "To open a door", "sol1": "push it", "sol2": "eat it"}


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_arc_becomes_the_harness_documents(tmp_path: Path) -> None:
    assert read_docs("arc_easy", write(tmp_path, ROW)) == [
        {
            "question": "What is wet?",
            "choices": {"text": ["stone", "water", "wood"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
    ]


def test_openbookqa_becomes_the_harness_documents(tmp_path: Path) -> None:
    assert read_docs("openbookqa", write(tmp_path, ROW | {"query": "Wet is"})) == [
        {
            "question_stem": "Wet is",
            "choices": {"text": ["stone", "water", "wood"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
    ]


def test_boolq_becomes_the_harness_documents(tmp_path: Path) -> None:
    assert read_docs("boolq", write(tmp_path, BOOLQ)) == [
        {"passage": "Some\nQuestion: text.", "question": "is it so", "label": 1}
    ]


@pytest.mark.parametrize("name", ["valid-labels.lst", "valid-labels.part.lst", "other-labels.lst"])
def test_piqa_finds_its_labels(tmp_path: Path, name: str) -> None:
    data = write(tmp_path, PIQA, PIQA | {"goal": "two"}, name="valid.part.jsonl")
    (tmp_path / name).write_text("1\n0\n")
    assert read_docs("piqa", data) == [PIQA | {"label": 1}, PIQA | {"goal": "two", "label": 0}]
    (tmp_path / "mine").write_text("0\n1")
    assert [doc["label"] for doc in read_docs("piqa", data, labels=tmp_path / "mine")] == [0, 1]


def test_of_several_labels_the_one_of_that_name_is_taken(tmp_path: Path) -> None:
    data = write(tmp_path, PIQA, name="valid.items-1.jsonl")
    (tmp_path / "valid-labels.items-1.lst").write_text("1\n")
    (tmp_path / "valid-labels.items-2.lst").write_text("0\n")
    assert read_docs("piqa", data)[0]["label"] == 1


def test_hellaswag_has_six_lines_an_item(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("Doing: A man. he\n2\na\nb\nc\nd\nNext\n0\ne\nf\ng\nh\n")
    assert read_docs("hellaswag", path) == [
        {"query": "Doing: A man. he", "choices": ["a", "b", "c", "d"], "label": "2"},
        {"query": "Next", "choices": ["e", "f", "g", "h"], "label": "0"},
    ]
    assert len(read_docs("hellaswag", path, limit=1)) == 1


@pytest.mark.parametrize(("suffix", "module"), [(".bz2", bz2), (".gz", gzip)])
def test_compressed_files_are_read_through(tmp_path: Path, suffix: str, module: Any) -> None:
    path = tmp_path / f"data.jsonl{suffix}"
    path.write_bytes(module.compress((json.dumps(ROW) + "\r\n" + json.dumps(ROW) + "\n\n").encode()))
    assert len(read_docs("arc_easy", path)) == 2
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RequestError, match="cannot be read"):
        read_docs("arc_easy", path)


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("arc_easy", '{"query": "Question: x"}', "line 1: no choices of type list"),
        ("arc_easy", json.dumps(ROW) + "\nnot json", "line 2: not JSON"),
        ("arc_easy", "[1]", "line 1: no query of type str"),
        ("arc_easy", json.dumps(ROW | {"gold": 3}), "line 1: gold 3 of 3 choices"),
        ("arc_easy", json.dumps(ROW | {"gold": -1}), "line 1: gold -1"),
        ("arc_easy", json.dumps(ROW | {"choices": ["a", 1]}), "line 1: a choice that is no text"),
        ("arc_easy", json.dumps(ROW | {"query": "x"}), "line 1: a query that does not begin"),
        ("openbookqa", json.dumps(ROW) + "\n\n" + json.dumps(ROW), "line 2: not JSON"),
        ("boolq", json.dumps(ROW), "line 1: not 'Passage"),
        ("piqa", json.dumps(ROW), "line 1: no goal of type str"),
        ("hellaswag", "context\n0\na\nb\nc\nd\nnext\n1\na", "line 7: an item of 3 lines where 6 belong"),
        ("hellaswag", "context\n4\na\nb\nc\nd", "line 2: label '4' is not 0 to 3"),
        ("hellaswag", "", "holds no items"),
        ("swag", "", "task 'swag' is unknown; choose one of arc_easy, boolq, hellaswag, openbookqa, piqa"),
    ],
)
def test_what_is_not_the_tasks_form_is_refused(tmp_path: Path, task: str, text: str, message: str) -> None:
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(RequestError) as error:
        read_docs(task, path)
    assert message in str(error.value)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path, PIQA, PIQA)
    labels = tmp_path / "x-labels.lst"
    with pytest.raises(RequestError, match="0 files of labels"):
        read_docs("piqa", data)
    with pytest.raises(RequestError, match="no such file"):
        read_docs("piqa", data, labels=tmp_path / "missing")
    for text, message in (("1\n", "1 labels for the 2 items"), ("1\n2\n", "line 2: label '2' is not 0 or 1")):
        labels.write_text(text)
        with pytest.raises(RequestError, match=message):
            read_docs("piqa", data)
    (tmp_path / "y-labels.lst").write_text("0\n1\n")
    with pytest.raises(RequestError, match="2 files of labels"):
        read_docs("piqa", data)


def test_options_of_no_use_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path, ROW)
    with pytest.raises(RequestError, match="limit=0"):
        read_docs("arc_easy", data, limit=0)
    with pytest.raises(RequestError, match="leave --labels out"):
        read_docs("arc_easy", data, labels=data)
    with pytest.raises(RequestError, match="no such file"):
        read_docs("arc_easy", tmp_path / "missing")


def test_every_task_has_a_folder_of_the_harness() -> None:
    lm_eval = pytest.importorskip("lm_eval.tasks")
    for task in TASKS.values():
        assert list((Path(next(iter(lm_eval.__path__))) / task.folder).glob("*.yaml"))
