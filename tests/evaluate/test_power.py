"""Power and the smallest resolvable difference against exact sums and published tables."""

from __future__ import annotations

import numpy as np
import pytest

from pesc.evaluate.power import paired_power, smallest_against_figure, smallest_of_stderr, smallest_paired


def exact_mcnemar_power(count: int, discordant: float, difference: float) -> float:
    """Chance that the exact test is below 5 % in the arm's favour: a sum over the number of discordant items and their split."""
    binom = pytest.importorskip("scipy.stats").binom
    total = 0.0
    for number, weight in enumerate(binom.pmf(np.arange(count + 1), count, discordant)):
        if weight > 1e-12:
            split = np.arange(number + 1)
            p_values = np.minimum(1, 2 * binom.cdf(np.minimum(split, number - split), number, 0.5))
            wins = (p_values < 0.05) & (split > number / 2)
            total += weight * binom.pmf(split, number, (1 + difference / discordant) / 2)[wins].sum()
    return total


@pytest.mark.parametrize(("count", "discordant", "difference"), [(500, 0.2, 0.06), (1319, 0.1, 0.03), (164, 0.3, 0.1)])
def test_paired_power_is_near_the_exact_sum_and_not_below_it(count, discordant, difference):
    exact = exact_mcnemar_power(count, discordant, difference)
    assert 0 <= paired_power(count, discordant, difference) - exact < 0.08


def test_paired_power_at_the_sample_sizes_of_mcnemars_formula():
    """Connor's formula for 80 % power, two-sided 5 %: n = (1.96 sqrt(psi) + 0.8416 sqrt(psi - d^2))^2 / d^2, by hand."""
    for discordant, difference, count in ((0.2, 0.1, 155), (0.3, 0.1, 234), (0.1, 0.05, 312)):
        assert paired_power(count, discordant, difference) == pytest.approx(0.8, abs=0.003)


def test_the_smallest_difference_of_known_sets():
    assert 100 * smallest_paired(1319, 0.1) == pytest.approx(2.44, abs=0.01)
    assert 100 * smallest_against_figure(0.481, 164, 10**9) == pytest.approx(10.93, abs=0.01)
    assert 100 * smallest_against_figure(0.57, 1319, 1319) == pytest.approx(3.82 * 2**0.5, abs=0.01)
    assert smallest_of_stderr(1.0) == pytest.approx(1.959964 + 0.841621)


def test_arms_that_never_differed_could_still_not_have_shown_a_tiny_difference():
    """With no discordant item there must be six in one direction for McNemar's p to fall below 5 %, of 100 items 6 points."""
    assert smallest_paired(100, 0.0) > 0.06
    assert paired_power(100, 0.0, 0.01) < 0.2
