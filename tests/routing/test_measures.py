"""The measures against outside truth: scipy, known tables, planted effects and their absence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from pesc.routing.config import RoutingConfig
from pesc.routing.measures import entropy, expected_pairs, lift, measure, miller_madow, mutual_information, specialisation
from tests.routing.builders import make_observation

TABLES = arrays(np.int64, st.tuples(st.integers(2, 4), st.integers(2, 9)), elements=st.integers(0, 60)).filter(lambda t: t.sum() > 0)


@given(TABLES)
def test_mutual_information_is_scipys(table):
    """H(D) + H(E) - H(D, E) by scipy.stats.entropy; 2 N I is the likelihood-ratio statistic of the table."""
    expected = stats.entropy(table.sum(1)) + stats.entropy(table.sum(0)) - stats.entropy(table.flatten())
    assert mutual_information(table) == pytest.approx(expected, abs=1e-9)
    if (table.sum(0) > 0).all() and (table.sum(1) > 0).all():
        ratio = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood").statistic
        assert 2 * table.sum() * mutual_information(table) == pytest.approx(ratio, abs=1e-6)


def test_miller_madow_takes_the_bias_away_where_choices_are_independent():
    """Of 3 x 8 tables without dependence, the plug-in is (3-1)(8-1)/(2N) too high on average."""
    draw = np.random.default_rng(1)
    tables = [draw.multinomial(400, np.full(24, 1 / 24)).reshape(3, 8) for _ in range(800)]
    plain, corrected = np.mean([mutual_information(t) for t in tables]), np.mean([miller_madow(t) for t in tables])
    assert plain == pytest.approx(14 / 800, rel=0.08)
    assert abs(corrected) < 14 / 800 / 10


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_are_the_domains_have_all_the_information_there_is(top_k):
    """Three domains, each with its own experts: log 3 nats, and no permutation of 999 reaches it."""
    domain_of = np.repeat([0, 1, 2], 12)
    row_of = np.repeat(np.arange(36), 20)
    first = 2 * domain_of[row_of]
    chosen = np.stack([first, first + 1], axis=1)[:, :top_k]
    balanced = np.stack([np.arange(720) % 6, (np.arange(720) + 1) % 6], axis=1)[:, :top_k]
    result = measure(make_observation([chosen, balanced], row_of, domain_of), RoutingConfig(permutations=999))
    planted, even = (entry.specialisation for entry in result.layers)
    assert planted.mutual_information == pytest.approx(np.log(3), abs=1e-5)
    assert planted.p == 1 / 1000
    assert planted.p_adjusted == 2 / 1000
    assert even.mutual_information < 0.001
    assert even.p > 0.05
    assert result.overall.p == 1 / 1000
    assert result.layers[0].choices["math"][0] == (0, 0, 0, 0, 240, 0)


def _clustered_rows(draw, lengths, experts=6):
    """Counts of rows whose tokens are alike within a row: each row has shares of its own."""
    return np.stack([draw.multinomial(length, draw.dirichlet(np.full(experts, 1.5))) for length in lengths])


def test_random_labels_give_uniform_p():
    """200 models without any specialisation; tokens of one row are alike, so that a test over tokens would nearly always cry wolf."""
    draw, labels = np.random.default_rng(3), np.repeat([0, 1, 2], 10)
    found, naive = [], []
    for seed in range(200):
        counts = _clustered_rows(draw, draw.integers(20, 200, size=30))
        found.append(specialisation([counts], labels, permutations=199, seed=seed)[1].p)
        table = np.stack([counts[labels == d].sum(0) for d in range(3)])
        naive.append(stats.chi2_contingency(table).pvalue)
    jittered = np.array(found) - np.random.default_rng(4).random(200) / 200  # p is a multiple of 1/200
    assert stats.kstest(jittered, "uniform").pvalue > 0.01
    assert stats.binomtest(sum(p <= 0.05 for p in found), 200, 0.05, alternative="greater").pvalue > 0.01
    assert np.mean(np.array(naive) < 0.05) > 0.9


def test_domains_of_other_row_lengths_are_no_specialisation():
    """As above, with rows of one domain four times as long: the level still holds."""
    draw, labels = np.random.default_rng(5), np.repeat([0, 1, 2], [5, 12, 23])
    lengths = np.array([340, 75, 80])[labels]
    found = [specialisation([_clustered_rows(draw, lengths)], labels, permutations=199, seed=seed)[1].p for seed in range(200)]
    assert stats.binomtest(sum(p <= 0.05 for p in found), 200, 0.05, alternative="greater").pvalue > 0.01


def test_a_weak_dependence_is_found_above_the_null_mean():
    draw, labels = np.random.default_rng(6), np.repeat([0, 1, 2], 20)
    tilt = np.ones((3, 6)) + 0.8 * np.eye(3, 6)
    counts = np.stack([draw.multinomial(60, draw.dirichlet(8 * tilt[d] / tilt[d].sum() * 6)) for d in labels])
    found = specialisation([counts], labels, permutations=999, seed=0)[0][0]
    assert found.p < 0.01
    assert 0 < found.null_mean < found.null_95 < found.mutual_information
    assert found.miller_madow < found.mutual_information
    assert found.excess < found.miller_madow, "tokens of a row are alike: chance gives more than independent choices would"


def test_the_seed_decides_the_permutations_and_nothing_else():
    draw, labels = np.random.default_rng(7), np.repeat([0, 1], 9)
    counts = _clustered_rows(draw, np.full(18, 50))
    one, same, other = (specialisation([counts], labels, 199, seed)[0][0] for seed in (1, 1, 2))
    assert one == same
    assert one.mutual_information == other.mutual_information
    assert one.null_mean != other.null_mean


def test_one_domain_says_nothing_of_specialisation():
    result = measure(make_observation([[[0, 1], [2, 3]]], [0, 1], [0, 0], domains=("all",)), RoutingConfig())
    assert result.overall is None
    assert result.layers[0].specialisation is None


def test_load_entropy_and_dead_experts_of_a_known_table():
    """6 experts, 2,000 choices: an even load is 333.3, dead is below 1 % of it (3.33 choices)."""
    counts = [994, 992, 0, 3, 4, 7]
    chosen = np.repeat(np.arange(6), counts)[:, None]
    entry = measure(make_observation([chosen], np.zeros(2000, int), [0], domains=("all",)), RoutingConfig()).layers[0]
    assert entry.load == pytest.approx(np.array(counts) / 2000)
    assert entry.dead == (2, 3)
    assert entry.busiest == pytest.approx(6 * 994 / 2000)
    assert entry.entropy == pytest.approx(stats.entropy(counts) / np.log(6), abs=1e-5)
    assert entry.gate_weight == (1, 1, 0, 1, 1, 1)
    assert entropy(np.array([1.0])) == 1.0
    assert entropy(np.full(8, 1 / 8)) == pytest.approx(1)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (5, 1, 2, 0.3, 0.01), (1, 0, 2, 3)])
def test_pairs_at_random_have_lift_one(weights):
    """Two experts drawn without replacement by weight: pairs are a_e·a_f off the diagonal, and the fit finds just that."""
    pairs = np.outer(weights, weights) * 1e6
    np.fill_diagonal(pairs, 0)
    assert expected_pairs(pairs) == pytest.approx(pairs, rel=1e-6, abs=1e-6)
    known = lift(pairs)[pairs > 1]
    assert known == pytest.approx(np.ones(len(known)))
    assert np.isnan(lift(pairs)[pairs == 0]).all()


def test_experts_that_work_together_stand_out():
    draw = np.random.default_rng(8)
    pairs = [(0, 1), (2, 3), (4, 5)]
    chosen = [pairs[draw.integers(3)] if draw.random() < 0.5 else draw.permutation(6)[:2] for _ in range(6000)]
    entry = measure(make_observation([chosen], np.zeros(6000, int), [0], domains=("all",)), RoutingConfig()).layers[0]
    together = {(e, f) for e in range(6) for f in range(6) if entry.lift[e][f] is not None and entry.lift[e][f] > 1.5}
    assert together == {(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)}
    assert entry.lift[0][1] == pytest.approx((0.5 / 3 + 0.5 / 15) / (1 / 15), rel=0.08)
    assert [entry.lift[e][e] for e in range(6)] == [None] * 6
    assert sum(map(sum, entry.pairs)) == 2 * 6000


def test_an_expert_that_is_always_chosen_has_no_favourite():
    """Its pairs are the others' loads: as at random."""
    chosen = [(0, 1 + n % 3) for n in range(300)]
    found = lift(np.array([[0, 100, 100, 100], [100, 0, 0, 0], [100, 0, 0, 0], [100, 0, 0, 0]]))
    assert found[0, 1:] == pytest.approx(np.ones(3), rel=0.02)
    entry = measure(make_observation([chosen], np.zeros(300, int), [0], domains=("all",), num_experts=4), RoutingConfig()).layers[0]
    assert entry.lift[0][1] == pytest.approx(found[0, 1], rel=1e-5)
