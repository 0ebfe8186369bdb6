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


def length(made: DraftPace, chance: float, waited_s: float | None = None) -> int:
    """How many drafts of that chance are made after each other."""
    before: list[Guess] = []
    while len(before) < 100 and made.pays(guess(chance), before, waited_s=waited_s):
        before.append(guess(chance))
    return len(before)


def tokens_per_s(chance: float, drafts: int, answer_s: float, draft_s: float) -> float:
    expected = sum(chance**number for number in range(drafts + 1))
    return expected / (answer_s + drafts * draft_s)


@pytest.mark.parametrize("chance", [0.1, 0.3, 0.55, 0.8, 0.95])
@pytest.mark.parametrize("answer_s", [0.01, 0.025, 0.1, 0.3])
def test_a_device_that_waits_drafts_as_far_as_gives_most_tokens_a_second(chance, answer_s):
    best = max(range(100), key=lambda drafts: tokens_per_s(chance, drafts, answer_s, 0.004))
    assert length(pace(answer_s, 0.004), chance) == best


@pytest.mark.parametrize("waited_s", [None, 1.0])
def test_a_longer_way_and_a_better_draft_make_longer_chains(waited_s):
    lengths = [length(pace(answer_s, 0.004), 0.6, waited_s) for answer_s in (0.001, 0.02, 0.1, 0.4)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0 < lengths[1] < lengths[-1]
    chances = [length(pace(0.1, 0.004), chance, waited_s) for chance in (0.01, 0.3, 0.6, 0.9)]
    assert chances == sorted(chances)
    assert chances[0] == 0


def test_while_the_answer_is_far_off_drafts_are_free():
    made = pace(0.1, 0.004)
    assert length(made, 0.18, 0.0) > length(made, 0.18, 0.099) > 0
    assert not made.pays(guess(0.01), [], waited_s=0.0)
    assert made.pays(guess(0.03), [], waited_s=0.09)
    assert not made.pays(guess(0.03), [], waited_s=0.098)


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
    for waited_s in (None, 1.0):
        assert not made.pays(made.ngram(1, 2), [], waited_s=waited_s)
    made.answered(0.01, 0.005)
    for waited_s in (None, 1.0):
        assert made.pays(made.ngram(1, 2), [], waited_s=waited_s)


def run(made: DraftPace, tokens: int, drafted_s: float, plain_s: float) -> list[bool]:
    """Tokens that take so long with drafts and without; whether each was drafted."""
    ways = []
    for _ in range(tokens):
        ways.append(made.drafting)
        made.emitted(drafted_s if made.drafting else plain_s, 1)
    return ways


def test_the_faster_way_is_taken_and_the_slower_one_hardly_ever():
    made = DraftPace()
    assert sum(run(made, 2000, 0.04, 0.1)) > 1960
    made = DraftPace()
    assert sum(run(made, 4000, 0.014, 0.01)) < 4000 * 0.05


def test_drafts_come_back_when_they_pay_and_go_when_they_do_not():
    made = DraftPace()
    run(made, 1000, 0.014, 0.01)
    assert sum(run(made, 3000, 0.03, 0.1)[-500:]) > 480
    assert sum(run(made, 3000, 0.2, 0.1)[-500:]) < 60


def test_a_bad_spell_is_soon_forgotten():
    made = DraftPace()
    run(made, 500, 0.04, 0.1)
    run(made, 40, 0.4, 0.1)
    assert sum(run(made, 400, 0.04, 0.1)[-200:]) > 190
