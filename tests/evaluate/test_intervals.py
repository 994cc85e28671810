"""Interval and test mathematics against scipy and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.evaluate.intervals import (
    bootstrap_p,
    difference_of,
    holm,
    mcnemar_exact,
    mean_estimate,
    mean_of,
    p_of_zero,
    paired_mean_estimate,
    paired_share_estimate,
    resampled_means,
    share_estimate,
    wilson_interval,
)


@settings(deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(pair):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    successes, total = pair
    expected = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_known_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for successes, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, total):
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(successes, total)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_test(first, second):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_survives_thousands_of_discordant_pairs():
    assert 0 < mcnemar_exact(2100, 2300) < 0.01


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_never_below_the_raw_value(values):
    adjusted = holm(values)
    assert all(raw <= new <= 1 for raw, new in zip(values, adjusted, strict=True))
    order = sorted(range(len(values)), key=lambda index: values[index])
    assert [adjusted[index] for index in order] == sorted(adjusted)


def test_holm_known_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_bootstrap_of_counts_is_the_bootstrap_of_items():
    """Drawing counts of distinct values has the distribution of drawing items: same mean and spread."""
    differences = [1.0] * 12 + [-1.0] * 5 + [0.0] * 43
    counted = resampled_means(differences, seed=1, resamples=40_000)
    rng = np.random.default_rng(2)
    drawn = rng.choice(differences, size=(40_000, len(differences))).mean(axis=1)
    assert counted.mean() == pytest.approx(drawn.mean(), abs=2e-3)
    assert counted.std() == pytest.approx(drawn.std(), rel=0.02)
    assert np.percentile(counted, [2.5, 97.5]) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.018)


def test_bootstrap_is_seeded():
    differences = [1.0, 0.0, 0.0, -1.0, 1.0] * 20
    assert paired_mean_estimate(differences, 3).interval == paired_mean_estimate(differences, 3).interval
    assert resampled_means(differences, 3).tolist() != resampled_means(differences, 4).tolist()


@pytest.mark.parametrize("kind", ["shares", "means"])
def test_paired_intervals_cover_the_true_difference_about_95_times_in_100(kind):
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        differences = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=150).tolist()
        shares = paired_share_estimate(differences.count(1.0), differences.count(-1.0), 150)
        low, high = (shares if kind == "shares" else paired_mean_estimate(differences, trial)).interval
        covered += low <= 0.1 <= high
    assert 366 <= covered <= 394  # 380 ± 3.2 standard deviations


def test_paired_shares_known_values_and_few_equal_answers_are_no_certainty():
    """1 and 7 discordant of 21 by hand: (2 - 8)/23 ± 1.96 sqrt((10/23 - (6/23)²)/23), Bonett and Price 2012, equation 4."""
    assert paired_share_estimate(1, 7, 21).value == pytest.approx(-6 / 21)
    assert paired_share_estimate(1, 7, 21).interval == pytest.approx((-0.5084, -0.0134), abs=1e-4)
    low, high = paired_share_estimate(0, 0, 8).interval
    assert -low == high == pytest.approx(1.96 * math.sqrt(0.2 / 10), abs=1e-3)
    assert paired_share_estimate(3, 0, 3).interval[1] == 1.0


def test_difference_of_two_shares_known_values():
    """Newcombe 1998 (Statistics in Medicine 17, 873), table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/20, 0/10 - 0/20."""
    for first, second, low, high in (
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((0, 10), (0, 20), -0.1611, 0.2775),
    ):
        found = difference_of(*(share_estimate(k / n, n) for k, n in (first, second))).interval
        assert found == pytest.approx((low, high), abs=5e-5)


def test_p_of_zero_is_the_level_of_the_interval_that_touches_zero():
    assert p_of_zero(mean_estimate(1.96, 1.0)) == pytest.approx(0.05, abs=1e-4)
    assert p_of_zero(mean_estimate(-3.0, 1.0)) == pytest.approx(0.0026998, abs=1e-6)
    assert p_of_zero(mean_estimate(0.0, 1.0)) == pytest.approx(1.0)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 60))
def test_a_small_p_and_an_interval_without_zero_are_the_same_thing(first, second):
    difference = difference_of(share_estimate(first / 50, 50), share_estimate(second / 60, 60))
    low, high = difference.interval
    assert (p_of_zero(difference) < 0.05) == (low > 0 or high < 0)


def test_the_mean_of_normal_estimates_has_the_root_of_summed_variances():
    mean = mean_of([mean_estimate(1.0, 0.3), mean_estimate(3.0, 0.4)])
    assert (mean.value, *mean.interval) == pytest.approx((2.0, 2.0 - 1.959964 * 0.25, 2.0 + 1.959964 * 0.25))
    with pytest.raises(ValueError, match="no estimate"):
        mean_of([])


def test_bootstrap_p_agrees_with_its_interval():
    means = resampled_means([1.0] * 30 + [-1.0] * 12 + [0.0] * 60, seed=1)
    assert bootstrap_p(means) == pytest.approx(2 * (1 + int((means <= 0).sum())) / 10_001)
    assert bootstrap_p(np.zeros(99)) == 1.0
