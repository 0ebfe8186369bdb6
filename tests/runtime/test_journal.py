"""The journal of an evaluation: what survives a kill, and whose it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.errors import RequestError
from isthmus.runtime.journal import Journal, subject_key

SUBJECT = {"bundle": "a", "codecs": ["raw32"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "journal.jsonl"


def written(path: Path) -> Path:
    journal = Journal(path, SUBJECT)
    journal.put("window 0", {"kl": 0.1 + 0.2})
    journal.put("window 1", [1, 2.5])
    return path  # not closed: a killed process does not close it either


def test_what_was_put_is_there_again_to_the_last_bit(path: Path) -> None:
    journal = Journal(written(path), SUBJECT)
    assert journal.get("window 0") == {"kl": 0.1 + 0.2}
    assert journal.get("window 1") == [1, 2.5]
    assert journal.get("window 2") is None
    assert journal.names == ["window 0", "window 1"]


@pytest.mark.parametrize("lost", [1, 2, 10])
def test_a_line_that_was_cut_short_is_passed_over_and_the_next_is_whole(path: Path, lost: int) -> None:
    written(path).write_bytes(path.read_bytes()[:-lost])
    journal = Journal(path, SUBJECT)
    assert journal.get("window 0") is not None
    assert journal.get("window 1") == ([1, 2.5] if lost == 1 else None)
    journal.put("window 2", 7)
    journal.close()
    assert Journal(path, SUBJECT).get("window 2") == 7


def test_bytes_that_are_no_text_are_passed_over(path: Path) -> None:
    with written(path).open("ab") as file:
        file.write(b"\xff\x00\n[3]\n")
    assert Journal(path, SUBJECT).names == ["window 0", "window 1"]


def test_another_evaluations_journal_is_refused(path: Path) -> None:
    with pytest.raises(RequestError, match="of another evaluation"):
        Journal(written(path), SUBJECT | {"codecs": ["raw16"]})


def test_a_users_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(RequestError, match="not a journal"):
        Journal(path, SUBJECT)
    assert path.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--journal"):
        Journal(tmp_path / "file" / "journal.jsonl", SUBJECT)


def test_removing_leaves_nothing(path: Path) -> None:
    Journal(path, SUBJECT).remove()
    assert list(path.parent.iterdir()) == []


def test_the_key_does_not_depend_on_the_order_of_names() -> None:
    assert subject_key(SUBJECT) == subject_key(dict(reversed(SUBJECT.items())))
    assert subject_key(SUBJECT) != subject_key({"bundle": "b"})
