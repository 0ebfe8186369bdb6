from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.runtime.edge.ngrams import LONGEST, SHORTEST, NGramIndex


def searched(text: list[int], tail: list[int]) -> tuple[int, int] | None:
    """The same by looking through the text."""
    for length in range(min(LONGEST, len(tail)), SHORTEST - 1, -1):
        for at in range(len(text) - 1, length - 1, -1):
            if text[at - length : at] == tail[len(tail) - length :]:
                return text[at], length
    return None


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=4), st.lists(st.integers(0, 3), max_size=5))
def test_the_last_place_of_the_longest_run_tells_what_follows(parts, guesses):
    index, text = NGramIndex(), []
    for part in parts:
        index.extend(part)
        text += part
    assert index.follow(text + guesses) == searched(text, text + guesses)


def test_a_longer_run_counts_more_than_a_later_one():
    index = NGramIndex()
    index.extend([1, 2, 3, 9, 3, 4, 1, 2, 3])
    assert index.follow([1, 2, 3]) == (9, 3)
    assert index.follow([7, 7, 3]) == (4, 1)
    assert index.follow([8]) is None
