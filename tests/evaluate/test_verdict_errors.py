"""A known effect is found and a null is not: the verdicts' error rates over 200 simulated repetitions through the real `compare`."""

from __future__ import annotations

import math

import pytest

from pesc.evaluate.power import paired_power
from tests.evaluate.simulate import compare_once

REPETITIONS = 200
SMALL = {"a": 450, "b": 700}
LIKE_GSM8K = {"a": 1319, "b": 2000, "c": 500}
MOST_WRONG = 20
"""Binomial(200, 0.05) is above it once in 1,600 times, so a rule that errs in 5 % of the repetitions passes."""


@pytest.fixture(scope="module", params=[SMALL, pytest.param(LIKE_GSM8K, marks=pytest.mark.slow)], ids=["small", "like-gsm8k"])
def sizes(request):
    return request.param


@pytest.fixture(scope="module")
def nulls(sizes):
    return [compare_once(seed, sizes, difference=0.0) for seed in range(REPETITIONS)]


@pytest.fixture(scope="module")
def planted(sizes):
    return [compare_once(10_000 + seed, sizes, difference=0.03) for seed in range(REPETITIONS)]


def within_power(found: int, power: float) -> bool:
    """Whether so many of the repetitions fit the promised power, less three standard deviations."""
    return found >= REPETITIONS * power - 3 * math.sqrt(REPETITIONS * power * (1 - power))


def power_of_mean(variances: list[float]) -> float:
    """Chance to find three points in the mean of independent differences."""
    spread = math.sqrt(sum(variances)) / len(variances)
    return 0.5 * math.erfc((1.959964 - 0.03 / spread) / math.sqrt(2))


def test_equal_arms_are_told_apart_no_more_often_than_the_level(nulls):
    assert sum(any(pair.verdict != "cannot tell" for pair in c.paired) for c in nulls) <= MOST_WRONG
    assert sum(c.paired_means[0].verdict != "cannot tell" for c in nulls) <= MOST_WRONG


def test_an_arm_as_good_as_a_published_system_is_said_to_be_so_no_less_often(nulls):
    for arm in ("arm", "control"):
        overall = [next(v for v in c.verdicts if v.arm == arm) for c in nulls]
        assert sum(v.outperforms != "cannot tell" for v in overall) <= MOST_WRONG
        assert sum(v.yes + v.no > 0 for v in overall) <= MOST_WRONG


def test_three_planted_points_are_found_as_often_as_the_power_says(sizes, planted):
    for index, (benchmark, count) in enumerate(sizes.items()):
        pairs = [c.paired[index] for c in planted]
        assert {pair.benchmark for pair in pairs} == {benchmark}
        assert within_power(sum(pair.p_value < 0.05 and pair.difference > 0 for pair in pairs), paired_power(count, 0.1, 0.03))
        assert sum(pair.verdict == "worse" for pair in pairs) <= 1
    power = power_of_mean([(0.1 - 0.03**2) / count for count in sizes.values()])
    assert power > (0.99 if sizes is LIKE_GSM8K else 0.8)
    assert within_power(sum(c.paired_means[0].verdict == "better" for c in planted), power)


def test_three_planted_points_against_a_published_system_are_found_and_never_turned_round(sizes, planted):
    overall = [next(v for v in c.verdicts if v.arm == "arm") for c in planted]
    power = power_of_mean([2 * 0.24 / count for count in sizes.values()])
    assert within_power(sum(v.outperforms == "yes" for v in overall), power)
    assert sum(v.outperforms == "no" for v in overall) <= 1


def test_what_is_said_to_be_the_smallest_difference_is_about_the_one_found_four_times_in_five(sizes, nulls):
    for index, count in enumerate(sizes.values()):
        resolves = sum(c.paired[index].resolves for c in nulls) / len(nulls) / 100
        assert paired_power(count, 0.1, resolves) == pytest.approx(0.8, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_fourteen_benchmarks_together_err_no_more_often_than_one(correlation):
    sizes = {f"t{index}": 60 + 20 * index for index in range(14)}
    wrong_pair = wrong_figure = wrong_overall = 0
    for seed in range(REPETITIONS):
        c = compare_once(20_000 + seed, sizes, difference=0.0, system_correlation=correlation)
        wrong_pair += any(pair.verdict != "cannot tell" for pair in c.paired)
        verdict = next(v for v in c.verdicts if v.arm == "control")
        wrong_figure += verdict.yes + verdict.no > 0
        wrong_overall += verdict.outperforms != "cannot tell"
    assert max(wrong_pair, wrong_figure, wrong_overall) <= MOST_WRONG
