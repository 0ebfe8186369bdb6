"""How far to draft, without clocks: times are given."""

from __future__ import annotations

import pytest

from isthmus.runtime.edge.draft_pace import DraftPace, Guess


def guess(chance: float, source: str = "draft") -> Guess:
    return Guess(1, source, 0, chance)


def pace(answer_s: float, draft_s: float) -> DraftPace:
    made = DraftPace()
    for _ in range(8):
        made.answered(answer_s, 0.01)
        made.drafted("draft", draft_s)
    return made


def length(made: DraftPace, chance: float, *, overlap: bool) -> int:
    """How many drafts of that chance are made after each other."""
    before: list[Guess] = []
    while len(before) < 100 and made.pays(guess(chance), before, overlap=overlap):
        before.append(guess(chance))
    return len(before)


def tokens_per_s(chance: float, drafts: int, answer_s: float, draft_s: float) -> float:
    expected = sum(chance**number for number in range(drafts + 1))
    return expected / (answer_s + drafts * draft_s)


@pytest.mark.parametrize("chance", [0.1, 0.3, 0.55, 0.8, 0.95])
@pytest.mark.parametrize("answer_s", [0.01, 0.025, 0.1, 0.3])
def test_a_device_that_waits_drafts_as_far_as_gives_most_tokens_a_second(chance, answer_s):
    best = max(range(100), key=lambda drafts: tokens_per_s(chance, drafts, answer_s, 0.004))
    assert length(pace(answer_s, 0.004), chance, overlap=False) == best


def test_a_longer_way_and_a_better_draft_make_longer_chains():
    for overlap in (True, False):
        lengths = [length(pace(answer_s, 0.004), 0.6, overlap=overlap) for answer_s in (0.001, 0.02, 0.1, 0.4)]
        assert lengths == sorted(lengths)
        assert lengths[0] == 0 < lengths[1] < lengths[-1]
        chances = [length(pace(0.1, 0.004), chance, overlap=overlap) for chance in (0.01, 0.3, 0.6, 0.9)]
        assert chances == sorted(chances)
        assert chances[0] == 0


def test_chances_follow_what_guesses_came_to():
    made = DraftPace()
    first = made.ngram(7, 3)
    sure = made.trained(7, 0.99)
    assert (first.token, first.source, sure.source) == (7, "ngram", "draft")
    assert sure.chance > made.trained(7, 0.2).chance
    for _ in range(200):
        made.learn(first, right=False)
        made.learn(sure, right=False)
    assert made.ngram(7, 3).chance < 0.05
    assert made.trained(7, 0.99).chance < 0.1
    assert made.ngram(7, 6).chance > 0.5
    for _ in range(200):
        made.learn(first, right=True)
    assert made.ngram(7, 3).chance > 0.9


def test_drafts_are_tried_as_soon_as_the_link_is_known():
    made = DraftPace()
    assert not made.pays(made.ngram(1, 2), [], overlap=False)
    made.answered(0.01, 0.005)
    assert made.pays(made.ngram(1, 2), [], overlap=False)
