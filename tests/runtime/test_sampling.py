import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import BundleError, RequestError
from isthmus.quant.noise import gumbel
from isthmus.runtime.sampling import Sampler, Sampling


def random_logits(seed, vocab_size=200, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, vocab_size).astype(np.float32)


def draw(logits, count, **options):
    sampler = Sampler(Sampling(**options))
    return np.array([sampler.sample(logits, position) for position in range(count)])


def kept_set(logits, **options):
    """Tokens that pass the filters."""
    sampler = Sampler(Sampling(**options))
    return set(sampler._filter(logits.astype(np.float64) / options["temperature"]).tolist())


def chi_square_limit(degrees, z=3.09):
    """Quantile 0.999 of the chi-square distribution (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


# --- the request ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e4),
        ("seed", -1),
        ("seed", 1 << 64),
        ("accept_distance", -0.1),
        ("accept_distance", 0.91),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(field, value):
    with pytest.raises(RequestError, match=f"^{field}="):
        Sampling(**{field: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None])
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Sampling)])
def test_what_is_no_number_is_refused(field, value):
    with pytest.raises(RequestError, match=f"^{field}="):
        Sampling(**{field: value})


@pytest.mark.parametrize("field", ["top_k", "seed"])
def test_counts_must_be_integers(field):
    with pytest.raises(RequestError, match="integer"):
        Sampling(**{field: 1.5})


def test_bounds_themselves_and_numpy_numbers_are_accepted():
    Sampling(temperature=100, top_p=1e-9, min_p=1, repetition_penalty=1e3, seed=(1 << 64) - 1)
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(5)).temperature == 0.5


# --- greedy -----------------------------------------------------------------------------------------------


def test_greedy_takes_the_greatest_logit_and_the_lowest_id_of_equals():
    assert Sampler(Sampling()).sample(np.array([1, 3, 2, 3], np.float32), 5) == 1


def test_greedy_ignores_the_filters_and_the_seed():
    sampling = Sampling(top_k=3, top_p=0.5, min_p=0.5, seed=9)
    for seed in range(10):
        logits = random_logits(seed)
        assert Sampler(sampling).sample(logits, seed) == logits.argmax()


# --- the draw ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = random_logits(1, vocab_size=12, scale=1.0)
    counts = np.bincount(draw(logits, 8000, temperature=temperature, seed=7), minlength=12)
    expected = 8000 * softmax(logits / temperature)
    enough = expected >= 5
    assert enough.sum() >= 8
    statistic = ((counts - expected) ** 2 / expected)[enough].sum()
    assert statistic < chi_square_limit(int(enough.sum()) - 1)


def test_draws_over_seeds_follow_the_softmax_of_the_kept_tokens():
    logits = random_logits(2, vocab_size=50, scale=1.0)
    options = {"temperature": 0.8, "top_k": 8}
    kept = sorted(kept_set(logits, **options))
    samples = [Sampler(Sampling(**options, seed=seed)).sample(logits, 31) for seed in range(6000)]
    counts = np.bincount(samples, minlength=50)
    assert counts.sum() == counts[kept].sum()
    expected = 6000 * softmax(logits[kept] / 0.8)
    assert ((counts[kept] - expected) ** 2 / expected).sum() < chi_square_limit(len(kept) - 1)


def test_draw_is_the_argmax_under_the_noise_of_its_position():
    logits = random_logits(3)
    for position in range(50):
        scores = logits.astype(np.float64) + gumbel(4, position, np.arange(logits.size))
        assert Sampler(Sampling(temperature=1.0, seed=4)).sample(logits, position) == scores.argmax()


def test_draw_depends_on_seed_and_position_but_not_on_the_draws_before():
    logits = random_logits(4, scale=0.5)
    forwards = draw(logits, 60, temperature=1.0, seed=1)
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    backwards = [sampler.sample(logits, position) for position in reversed(range(60))]
    np.testing.assert_array_equal(forwards, backwards[::-1])
    assert len(set(forwards.tolist())) > 20
    assert (draw(logits, 60, temperature=1.0, seed=2) != forwards).any()


def test_logits_are_left_unchanged():
    logits = random_logits(5)
    before = logits.copy()
    Sampler(Sampling(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=2.0), [1, 2]).sample(logits, 0)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("options", [{}, {"temperature": 1e-30}, {"temperature": 1e-300}, {"top_p": 1e-9}])
def test_extreme_requests_end_in_the_greatest_logit(options):
    logits = random_logits(6)
    assert Sampler(Sampling(**({"temperature": 1.0, "min_p": 1.0} | options))).sample(logits, 0) == logits.argmax()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    logits = random_logits(7)
    logits[11] = bad
    with pytest.raises(BundleError, match="position 12"):
        Sampler(Sampling(temperature=temperature)).sample(logits, 12)
    with pytest.raises(BundleError, match="position 3"):
        Sampler(Sampling(temperature=temperature)).sample(np.full(8, -np.inf, np.float32), 3)


# --- filters ----------------------------------------------------------------------------------------------

FILTERS = [
    {"top_k": 1},
    {"top_k": 17},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.1},
    {"top_p": 0.6, "min_p": 0.01},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_kept_tokens_are_those_of_transformers(filters, temperature):
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    f32 = {name: float(np.float32(value)) for name, value in filters.items()}
    warpers = [generation.TemperatureLogitsWarper(float(np.float32(temperature)))]
    if "top_k" in filters:
        warpers.append(generation.TopKLogitsWarper(filters["top_k"]))
    if "top_p" in filters:
        warpers.append(generation.TopPLogitsWarper(f32["top_p"]))
    if "min_p" in filters:
        warpers.append(generation.MinPLogitsWarper(f32["min_p"]))
    for seed in range(5):
        logits = random_logits(seed, vocab_size=500)
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        for warper in warpers:
            scores = warper(None, scores)
        expected = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
        assert kept_set(logits, temperature=float(np.float32(temperature)), **filters) == expected


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
@given(values=st.lists(st.integers(-20, 20), min_size=1, max_size=60))
def test_top_p_keeps_the_fewest_likely_tokens_that_reach_it(top_p, values):
    logits = np.array(values, np.float32) / 2
    shares = softmax(logits.astype(np.float64))
    kept = kept_set(logits, temperature=1.0, top_p=top_p)
    least = min(shares[list(kept)])
    assert kept == set(np.flatnonzero(shares >= least).tolist())
    assert shares[list(kept)].sum() >= top_p - 1e-6
    assert shares[shares > least].sum() < top_p + 1e-6  # without the least likely ones it is not reached


def test_equal_logits_are_kept_or_dropped_together():
    logits = np.array([2, 1, 1, 1, 0], np.float32)
    assert kept_set(logits, temperature=1.0, top_k=2) == {0, 1, 2, 3}
    assert kept_set(logits, temperature=1.0, top_p=0.6) == {0, 1, 2, 3}


def test_samples_come_from_the_kept_tokens_only():
    logits = random_logits(8)
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
    assert set(draw(logits, 1000, **options).tolist()) == kept_set(logits, **options)


# --- history ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(temperature, penalty):
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    history = [3, 3, 7, 150, 9, 7]
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=penalty, seed=1), history[:4])
    for token in history[4:]:
        sampler.accept(token)
    processor = generation.RepetitionPenaltyLogitsProcessor(float(np.float32(penalty)))
    for seed in range(20):
        logits = random_logits(seed)
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        expected = processor(torch.tensor([history]), scores)[0].numpy()
        noise = gumbel(1, seed, np.arange(logits.size)) if temperature else 0.0
        assert sampler.sample(logits, seed) == (expected + noise).argmax()


def test_repetition_penalty_makes_greedy_leave_a_repeated_token():
    logits = np.array([1.0, 2.0, 1.9], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.5))
    assert sampler.sample(logits, 0) == 1
    sampler.accept(1)
    assert sampler.sample(logits, 1) == 2
    assert Sampler(Sampling(repetition_penalty=1.5), [1]).sample(logits, 1) == 2


@given(st.lists(st.integers(0, 29), max_size=20), st.lists(st.integers(0, 29), max_size=10), st.data())
def test_rollback_is_as_if_the_tokens_had_never_been_accepted(context, generated, data):
    sampling = Sampling(temperature=1.0, repetition_penalty=5.0, seed=2)
    kept = data.draw(st.integers(0, len(generated)))
    rolled, fresh = Sampler(sampling, context), Sampler(sampling, context)
    for token in generated:
        rolled.accept(token)
    rolled.rollback(kept)
    for token in generated[:kept]:
        fresh.accept(token)
    assert rolled.generated == fresh.generated == kept
    logits = random_logits(9, vocab_size=30)
    for position in range(20):
        assert rolled.sample(logits, position) == fresh.sample(logits, position)


@pytest.mark.parametrize("generated", [-1, 3])
def test_rollback_beyond_the_generated_tokens_is_refused(generated):
    sampler = Sampler(Sampling(), [1, 2, 3])
    sampler.accept(4)
    sampler.accept(5)
    with pytest.raises(RequestError, match="there are 2"):
        sampler.rollback(generated)


@pytest.mark.parametrize("token", [-1, 200])
def test_history_outside_the_vocabulary_is_refused(token):
    with pytest.raises(RequestError, match="history"):
        Sampler(Sampling(repetition_penalty=1.1), [5, token]).sample(random_logits(0), 2)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, top_k=30, seed=4), Sampling(repetition_penalty=1.4)]
)
def test_ranks_are_what_would_be_chosen_if_the_first_were_not_there(sampling):
    logits = np.random.default_rng(3).standard_normal(64).astype(np.float32)
    sampler = Sampler(sampling, [1, 2, 3])
    ranked = sampler.rank(logits, 9, 4)
    for token in ranked:
        assert sampler.sample(logits, 9) == token
        logits[token] = -1e9
    assert sampler.rank(logits[:4], 9, 9) == sampler.rank(logits[:4], 9, 4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=4), Sampling(repetition_penalty=1.4)])
def test_a_trimmed_vocabulary_chooses_as_the_whole_one_does_among_its_tokens(sampling):
    whole = np.random.default_rng(3).standard_normal(64).astype(np.float32)
    vocabulary = np.array([0, 3, 7, 8, 20, 41, 63])
    expected = np.full(64, -1e9, np.float32)
    expected[vocabulary] = whole[vocabulary]
    history = [3, 5, 41]
    token = Sampler(sampling, history).sample(expected, 7)
    trimmed = Sampler(sampling, history, vocabulary)
    assert trimmed.sample(whole[vocabulary], 7) == token
    assert vocabulary[trimmed.index(token)] == token


# --- guesses that are taken although another token was due --------------------------------------------------


@pytest.mark.parametrize("distance", [0.05, 0.3])
@pytest.mark.parametrize("vocab_size", [2, 2000])
def test_even_the_worst_guesses_change_no_more_than_the_share_that_was_allowed(distance, vocab_size):
    """The guess is always the token that came second: every close race is lost to it."""
    logits = random_logits(3, vocab_size, scale=0.1)
    exact = Sampler(Sampling(temperature=1.0))
    relaxed = Sampler(Sampling(temperature=1.0, accept_distance=distance))
    changed = 0
    for position in range(4000):
        first, second = exact.rank(logits, position, 2)
        token = relaxed.sample(logits, position, second)
        assert token in (first, second)
        changed += token != first
    assert changed / 4000 <= distance + 0.02
    if vocab_size > 2:
        assert changed / 4000 >= distance - 0.03, "with so many tokens the bound is all but reached"


def test_without_a_distance_a_guess_changes_nothing():
    logits = random_logits(4)
    sampler = Sampler(Sampling(temperature=1.0))
    for position in range(50):
        assert sampler.sample(logits, position, 7) == sampler.sample(logits, position)


def test_a_greedy_guess_is_taken_if_it_is_almost_as_probable_as_the_best():
    logits = np.log(np.array([0.5, 0.42, 0.08], np.float32))
    sampler = Sampler(Sampling(accept_distance=0.2))
    assert sampler.sample(logits, 0, 1) == 1
    assert sampler.sample(logits, 0, 2) == 0
    assert Sampler(Sampling(accept_distance=0.1)).sample(logits, 0, 1) == 0


def test_a_guess_that_the_filters_leave_out_is_never_taken():
    logits = random_logits(5)
    sampler = Sampler(Sampling(temperature=1.0, top_k=3, accept_distance=0.9))
    kept = kept_set(logits, temperature=1.0, top_k=3)
    for guess in range(len(logits)):
        assert sampler.sample(logits, guess, guess) in kept
