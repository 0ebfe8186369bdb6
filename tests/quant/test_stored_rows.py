"""Rows are those of the file's array, and no part of the file stays in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isthmus.quant.stored_rows import StoredRows

ARRAY = np.arange(120, dtype=np.int16).reshape(20, 6)


def test_rows_of_an_array_at_an_offset(tmp_path):
    path = tmp_path / "array"
    path.write_bytes(b"12345" + ARRAY.tobytes())
    rows = StoredRows(path, np.int16, 5, ARRAY.shape)
    assert len(rows) == 20
    for ids in ([0], [19, 0, 7, 7], list(range(20)), []):
        assert np.array_equal(rows[ids], ARRAY[ids])


def test_rows_of_an_npy_file(tmp_path):
    np.save(tmp_path / "array.npy", ARRAY)
    rows = StoredRows.of_npy(tmp_path / "array.npy")
    assert rows.shape == ARRAY.shape
    assert np.array_equal(rows[[3, 4]], ARRAY[[3, 4]])


@pytest.mark.parametrize("array", [ARRAY[0], np.asfortranarray(ARRAY), np.array([[None]])])
def test_an_npy_file_of_something_else_is_refused(tmp_path, array):
    np.save(tmp_path / "array.npy", array)
    with pytest.raises(ValueError, match="not rows of numbers"):
        StoredRows.of_npy(tmp_path / "array.npy")


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_a_file_that_was_cut_is_refused(tmp_path, size):
    path = tmp_path / "array.npy"
    np.save(path, ARRAY)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError):
        StoredRows.of_npy(path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps of a process are not told here")
def test_nothing_is_mapped_and_the_file_is_closed_at_the_end(tmp_path):
    np.save(tmp_path / "array.npy", ARRAY)
    rows = StoredRows.of_npy(tmp_path / "array.npy")
    assert rows[[1]].size
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert tmp_path / "array.npy" in held
    del rows
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert tmp_path / "array.npy" not in held
