"""Bootstrap intervals against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrag_lib import stats
from vrag_lib.stats import bootstrap_mean, crossed_mean, paired_difference

VALUES = st.lists(st.floats(-100, 100), min_size=1, max_size=40)


def test_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(5).normal(3.0, 2.0, 400)
    interval = bootstrap_mean(values)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_interval_of_hits_agrees_with_the_exact_binomial():
    """A resample of n zeros and ones with m ones has Binomial(n, m/n) ones."""
    from scipy.stats import binom

    hits = np.array([1.0] * 30 + [0.0] * 70)
    interval = bootstrap_mean(hits, samples=40_000)
    assert interval.low == pytest.approx(binom.ppf(0.025, 100, 0.3) / 100, abs=0.0101)
    assert interval.high == pytest.approx(binom.ppf(0.975, 100, 0.3) / 100, abs=0.0101)


def test_two_values_have_a_known_distribution():
    """Means of resamples of (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    means = stats._resampled_means(np.array([0.0, 1.0]), 40_000, seed=0)
    shares = [(means == value).mean() for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_a_share_of_nothing_or_all_has_exact_limits():
    """Of a share at the upper limit, n misses in a row would be seen in 2.5 % of cases."""
    for n in (5, 588):
        none, every = bootstrap_mean([0.0] * n, most=1), bootstrap_mean([100.0] * n, most=100)
        assert (1 - none.high) ** n == pytest.approx(0.025) and none[:2] == (0, 0)
        assert (every.low / 100) ** n == pytest.approx(0.025) and every[::2] == (100, 100)
    counts = np.array([[2.0, 3.0, 0.0]] * 2)
    assert crossed_mean(np.zeros((2, 3)), counts, most=1).high == pytest.approx(1 - 0.025 ** (1 / 2))
    assert crossed_mean(counts, counts, most=1).low == pytest.approx(0.025 ** (1 / 2))
    apart = crossed_mean(np.array([[0.0] * 9, [0.5] * 9]), most=1)
    assert apart.low == 0 and 0.5 < apart.high <= 1
    hits, asked = np.array([[0.1] * 100, [0.0] * 100]), np.array([[1.0] * 100, [0.0] * 100])
    assert crossed_mean(hits, asked) == pytest.approx((0.1, 0.1, 0.1))  # a seed without values adds nothing
    assert bootstrap_mean([0.0] * 5) == (0, 0, 0)  # counts, say, of what cannot happen


def test_wider_confidence_and_fewer_values_widen_the_interval():
    values = np.random.default_rng(1).random(50)
    narrow, wide = bootstrap_mean(values, confidence=0.8), bootstrap_mean(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_seed_decides(monkeypatch):
    values = np.random.default_rng(2).random(30)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    whole = bootstrap_mean(values, seed=3)
    monkeypatch.setattr(stats, "_DRAWS_AT_ONCE", 7 * 30)  # chunked drawing is the same stream
    assert bootstrap_mean(values, seed=3) == whole


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(7)
    difficulty = rng.normal(0, 10, 200)
    a, b = difficulty + 0.5 + rng.normal(0, 0.1, 200), difficulty
    difference = paired_difference(a, b)
    assert difference.low > 0.4 and difference.high < 0.6 and difference.p_value < 0.001
    assert bootstrap_mean(a).low < bootstrap_mean(b).mean  # unpaired intervals could not tell


def test_no_difference_is_not_significant():
    assert paired_difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]) == (0.0, 0.0, 0.0, 1.0)


@given(VALUES)
@settings(max_examples=50, deadline=None)
def test_limits_enclose_the_mean_within_the_range(values):
    interval = bootstrap_mean(values, samples=300)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack


@given(VALUES, st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_difference_is_antisymmetric(values, shift):
    a, b = np.array(values) + shift, np.array(values)[::-1]
    forth, back = paired_difference(a, b, samples=300), paired_difference(b, a, samples=300)
    assert forth[:3] == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-9)
    assert forth.p_value == back.p_value


@pytest.mark.parametrize(
    ("values", "message"), [([], "non-empty"), ([1.0, float("nan")], "value 1"), ([[1.0]], "shape")]
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_mean([1.0], confidence=95)
    with pytest.raises(ValueError, match="samples"):
        bootstrap_mean([1.0], samples=0)
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
