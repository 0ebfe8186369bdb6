import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.quant.noise import gumbel

MASK = (1 << 64) - 1


def splitmix64(seed, index):
    """The published generator, in Python integers."""
    word = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def seed_with_word(word, position, token):
    """The one seed whose random word for a token at a position is the given one."""
    step = 0x9E3779B97F4A7C15
    for index in (token, position):
        word = (unmix(word) - (index + 1) * step) & MASK
    return (unmix(word) * pow(step, -1, 1 << 64) - 1) & MASK


def unmix(word):
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        word ^= word >> shift ^ word >> 2 * shift
        word = word * pow(factor, -1, 1 << 64) & MASK
    return word


def uniform(seed, position, vocab_size):
    return np.exp(-np.exp(-gumbel(seed, position, np.arange(vocab_size))))


def chi_square_limit(degrees, z=3.09):
    """Quantile 0.999 of the chi-square distribution (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def test_reference_generator_gives_the_published_numbers():
    assert [splitmix64(1234567, n) for n in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.integers(0, MASK), st.integers(0, (1 << 32) - 1), st.integers(0, 300_000))
def test_noise_equals_the_reference_in_python_integers(seed, position, token):
    word = splitmix64(splitmix64(splitmix64(0, seed), position), token)
    expected = -math.log(-math.log(((word >> 11) | 1) * 2.0**-53))
    assert gumbel(seed, position, np.array([token]))[0] == pytest.approx(expected, rel=1e-13, abs=1e-14)


def test_noise_never_changes_between_releases():
    golden = {
        (0, 0): [-0.6807578025137786, 3.5293597414235305, -0.4168699086247647],
        (42, 7): [0.5455746758864878, 0.35864195611521293, 0.2914447455142483],
        (MASK, (1 << 32) - 1): [0.40772954252279636, 0.6725736964516829, 4.384253386406794],
    }
    for (seed, position), values in golden.items():
        np.testing.assert_allclose(gumbel(seed, position, np.array([0, 1, 49151])), values, rtol=1e-13)


@given(st.lists(st.integers(0, 49_151), max_size=300), st.integers(0, MASK), st.integers(0, 10_000))
def test_noise_of_a_token_does_not_depend_on_the_others_asked_for(tokens, seed, position):
    everything = gumbel(seed, position, np.arange(49_152))
    ids = np.array(tokens, np.int64)
    np.testing.assert_array_equal(gumbel(seed, position, ids), everything[ids])


def test_noise_is_finite_and_leaves_the_ids_alone():
    ids = np.arange(49_152, dtype=np.uint64)
    noise = gumbel(3, 5, ids)
    assert noise.dtype == np.float64
    assert np.isfinite(noise).all()
    assert noise.min() > -3.7
    assert noise.max() < 36.8
    np.testing.assert_array_equal(ids, np.arange(49_152))


@pytest.mark.parametrize(
    ("word", "expected"), [(0, -math.log(53 * math.log(2))), (MASK, 53 * math.log(2)), (1 << 63, 0.36651292)]
)
def test_extreme_random_words_give_finite_noise(word, expected):
    seed = seed_with_word(word, 11, 4321)
    assert splitmix64(splitmix64(splitmix64(0, seed), 11), 4321) == word
    assert gumbel(seed, 11, np.array([4321]))[0] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 0), (0, 1), (123_456_789, 2047)])
def test_noise_is_gumbel_distributed(seed, position):
    values = np.sort(uniform(seed, position, 49_152))
    steps = np.arange(values.size + 1) / values.size
    distance = max(np.abs(values - steps[1:]).max(), np.abs(values - steps[:-1]).max())
    assert distance * math.sqrt(values.size) < 1.95  # Kolmogorov-Smirnov, p > 0.001
    counts = np.histogram(values, bins=256, range=(0, 1))[0]
    expected = values.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(255)


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_one_token_is_uniform_over_neighbouring_seeds_and_positions(axis):
    draws = [gumbel(*((n, 9) if axis == "seed" else (9, n)), np.array([17]))[0] for n in range(4096)]
    counts = np.histogram(np.exp(-np.exp(-np.array(draws))), bins=64, range=(0, 1))[0]
    assert ((counts - 64) ** 2 / 64).sum() < chi_square_limit(63)


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (1, 1), (0, 2), (1 << 63, 0), (0x9E3779B97F4A7C15, 0)])
def test_other_seeds_and_positions_give_unrelated_noise(other):
    one, two = uniform(0, 0, 49_152), uniform(*other, 49_152)
    limit = 4 / math.sqrt(one.size)
    for shift in range(-3, 4):
        assert abs(np.corrcoef(one, np.roll(two, shift))[0, 1]) < limit
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < limit


@pytest.mark.parametrize(("seed", "position"), [(-1, 0), (1 << 64, 0), (0, -1)])
def test_seed_and_position_out_of_range_are_refused(seed, position):
    with pytest.raises(OverflowError):
        gumbel(seed, position, np.arange(4))
