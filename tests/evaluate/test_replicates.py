"""Arms trained several times: the run-to-run spread is in the interval, against scipy, a two-level bootstrap and simulated truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from pesc.errors import EvaluationError, RecipeError
from pesc.evaluate.baselines import load_baselines
from pesc.evaluate.comparison import compare
from pesc.evaluate.replicates import Difference, groups_of, runs_difference, score_matrix
from pesc.evaluate.tables import MOST_COLUMNS, results_table, verdict_lines
from tests.evaluate.builders import make_result, make_samples, write_evaluation
from tests.evaluate.test_report import run as build_report


def draw_runs(rng, runs: int, items: np.ndarray, mean: float, spread: float) -> np.ndarray:
    """Right or wrong [runs, items]: a run's own level, the items' own difficulty."""
    levels = np.clip(mean + spread * rng.standard_normal((runs, 1)) + items, 0.02, 0.98)
    return (rng.random((runs, len(items))) < levels).astype(float)


@pytest.mark.parametrize("degrees", [1.0, 3.7, 30.0, math.inf])
def test_a_difference_has_students_interval_and_p(degrees):
    student = stats.t(degrees) if math.isfinite(degrees) else stats.norm
    found = Difference(0.3, ((0.04, degrees),))
    assert found.interval == pytest.approx((0.3 - 0.2 * student.ppf(0.975), 0.3 + 0.2 * student.ppf(0.975)))
    assert found.p_value == pytest.approx(2 * student.sf(1.5))
    assert Difference(-0.3, ((0.04, degrees),)).p_value == found.p_value


def test_each_source_of_variance_has_its_own_quantile_and_p_says_what_the_interval_says():
    few, many = stats.t(2).ppf(0.975), stats.t(129).ppf(0.975)
    found = Difference(0.3, ((0.01, 2), (0.02, 129)))
    assert found.half_width(0.05) == pytest.approx(math.sqrt(few**2 * 0.01 + many**2 * 0.02))
    assert found.stderr == pytest.approx(math.sqrt(0.03))
    edge = Difference(found.half_width(0.05), found.parts)
    assert edge.p_value == pytest.approx(0.05)
    assert edge.interval[0] == pytest.approx(0, abs=1e-12)
    assert found.p_value > 2 * stats.t(2.0).sf(0.3 / 0.1), "the questions are not in the runs alone"
    assert [Difference(value, ((0.0, 2), (0.0, 9))).p_value for value in (0.0, 0.1)] == [1.0, 0.0]
    assert Difference(1e60, ((1e-60, 129),)).p_value == 0.0


def test_without_spread_between_questions_it_is_welchs_test():
    """Scores that are the same for each question of a run leave Welch's t-test of the runs' scores."""
    ours, theirs = np.array([0.51, 0.55, 0.56, 0.50]), np.array([0.48, 0.47, 0.52, 0.49])
    found = runs_difference([np.repeat(ours[:, None], 50, axis=1)], [np.repeat(theirs[:, None], 50, axis=1)])
    assert found.p_value == pytest.approx(float(stats.ttest_ind(ours, theirs, equal_var=False).pvalue), abs=1e-6)
    assert found.difference == pytest.approx(0.04)
    fewer = runs_difference([np.repeat(ours[:, None], 50, axis=1)], [np.repeat(theirs[:3, None], 50, axis=1)])
    assert [degrees for _, degrees in fewer.parts] == [3, 2, 49], "of unequal numbers of runs Welch's test is too sure"


@pytest.mark.parametrize("spread", [0.0, 0.04])
def test_the_standard_error_is_the_spread_over_new_runs_and_new_questions(spread):
    """Over 300 repetitions with 4 runs of each arm; a two-level bootstrap of one of them is wider, as it counts scatter three times."""
    found, bootstrapped = [], []
    for trial in range(300):
        rng = np.random.default_rng(trial)
        items = 0.2 * rng.standard_normal(200)
        ours, theirs = draw_runs(rng, 4, items, 0.55, spread), draw_runs(rng, 4, 0.5 * items, 0.5, spread)
        found.append(runs_difference([ours], [theirs]))
        if trial < 2:
            for _ in range(300):
                chosen = rng.integers(200, size=200)
                ours_again, theirs_again = ours[rng.integers(4, size=4)][:, chosen], theirs[rng.integers(4, size=4)][:, chosen]
                bootstrapped.append(ours_again.mean() - theirs_again.mean() - found[-1].difference)
    true = np.std([f.difference for f in found])
    assert np.sqrt(np.mean([f.stderr**2 for f in found])) == pytest.approx(true, rel=0.12)
    assert np.std(bootstrapped) > 0.95 * true


@pytest.mark.parametrize(("runs", "others"), [(2, 2), (3, 3), (2, 5), (5, 5)])
@pytest.mark.parametrize("questions", [0.0, 2.0, 6.0])
def test_equal_arms_of_few_runs_are_told_apart_no_more_often_than_the_level(runs, others, questions):
    """The questions' own differences between the arms beside the spread of 1 from run to run; three standard errors above 5 % and 1 %."""
    trials, wrong = 1000, {0.05: 0, 0.01: 0}
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        ours, theirs = (rng.standard_normal((m, 1)) + rng.standard_normal((m, 120)) for m in (runs, others))
        found = runs_difference([ours + questions * rng.standard_normal(120)], [theirs])
        for level in wrong:
            wrong[level] += abs(found.difference) > found.half_width(level)
    assert wrong[0.05] <= 70, wrong
    assert wrong[0.01] <= 19, wrong


def test_one_run_an_arm_is_wrong_in_a_third_of_the_cases_where_seeds_matter():
    wrong = wrong_single = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        items = 0.1 * rng.standard_normal(400)
        ours, theirs = ([draw_runs(rng, 3, items, 0.5, 0.04) for _ in range(2)] for _ in range(2))
        low, high = runs_difference(ours, theirs).interval
        wrong += not low <= 0 <= high
        single = ours[0][0] - theirs[0][0]
        wrong_single += abs(single.mean()) > 1.96 * single.std() / 20
    assert wrong <= 19
    assert wrong_single > 60


def test_compare_takes_runs_together_and_reads_their_spread():
    rng = np.random.default_rng(0)
    answers, results, shares = {}, {}, {}
    for arm, level in (("pesc", 0.7), ("qlora", 0.4)):
        for number, name in enumerate((arm, f"{arm}-s1", f"{arm}-s2")):
            for task in ("mmlu", "gsm8k"):
                right = (rng.random(300) < level + 0.02 * number).astype(int).tolist()
                answers[name, task], results[name, task] = make_samples(right, task), make_result(right, task=task)
                shares[name, task] = sum(right) / 3
    arms = tuple(dict.fromkeys(arm for arm, _ in results))
    replicates = {"pesc": ["pesc-s1", "pesc-s2"], "qlora": ["qlora-s1", "qlora-s2"]}
    comparison = compare(results, answers, arms, "qlora", (), load_baselines(), replicates)
    first, second, mean = comparison.replicated
    assert (first.benchmark, second.benchmark, mean.benchmark) == ("mmlu", "gsm8k", None)
    assert {pair.verdict for pair in comparison.replicated} == {"better"}
    assert (mean.runs_arm, mean.runs_control, mean.num_items) == (3, 3, 600)
    ours = [shares[name, "mmlu"] for name in ("pesc", "pesc-s1", "pesc-s2")]
    assert first.spread_arm == pytest.approx(np.std(ours, ddof=1), abs=1e-3)
    assert mean.difference == pytest.approx((first.difference + second.difference) / 2, abs=1e-3)
    assert compare(results, answers, arms, "qlora", (), load_baselines()).replicated == ()


def test_runs_of_other_items_are_not_taken_together():
    with pytest.raises(EvaluationError, match="mmlu, pesc: its training runs were asked different items"):
        score_matrix([make_samples([1, 0]), make_samples([1, 0, 1])], "mmlu, pesc")
    with pytest.raises(ValueError, match="two runs"):
        runs_difference([np.ones((1, 3))], [np.ones((2, 3))])
    assert groups_of(("a", "a1", "b"), {"a": ["a1", "gone"]}) == {"a": ("a", "a1"), "b": ("b",)}


def test_the_report_shows_runs_and_no_longer_says_that_the_spread_is_unknown(tmp_path):
    rng = np.random.default_rng(1)
    inputs = {}
    for arm, level in (("sparse", 0.6), ("control", 0.5)):
        for name in (arm, f"{arm}-s1"):
            for task in ("mmlu", "gsm8k"):
                right = (rng.random(100) < level).astype(int).tolist()
                folder = write_evaluation(tmp_path / "in" / name / task, right, task=task, kind="pesc" if arm == "sparse" else "dense")
                inputs[f"evaluate[{name}/{task}]"] = folder
    out = build_report(tmp_path, inputs, replicates={"sparse": ("sparse-s1",), "control": ("control-s1",)})
    results = json.loads((out / "results.json").read_text())
    assert len(results["comparison"]["replicated"]) == 3
    for view in ("report.html", "report.md"):
        text = (out / view).read_text()
        assert "Over several training runs" in text
        assert "2 and 2 runs that spread by" in text
    assert "how much another seed would differ is not known" not in (out / "report.html").read_text()
    assert "Of each arm, its first training run.</figcaption>" in (out / "report.html").read_text()
    lines = verdict_lines(results)
    assert len(lines) == len({line.partition(":")[0] for line in lines})
    assert [line for line in lines if "against control" in line] == [line for line in lines if "over training runs" in line], "no run alone"


def test_many_arms_are_rows_of_the_results_table(tmp_path):
    arms = ["control", *(f"sparse-{index}" for index in range(MOST_COLUMNS))]
    inputs = {
        f"evaluate[{arm}/{task}]": write_evaluation(tmp_path / arm / task, [1, 0] * 50, task=task)
        for arm in arms
        for task in ("mmlu", "gsm8k")
    }
    out = build_report(tmp_path, inputs)
    assert "first training run" not in (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    head, rule, setting, *rows = results_table(results).split("\n\n")[0].splitlines()
    assert head == "| benchmark | MMLU | GSM8K |"
    assert rule == "| :-- | --: | --: |"
    assert setting.startswith("| setting | ")
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [*results["comparison"]["arms"], *results["systems"].values()]
    assert all(row.count(" | ") == 2 for row in rows)


def test_a_recipe_whose_replicates_are_no_arms_is_refused(tiny_recipe):
    with pytest.raises(RecipeError, match=r"report\.replicates names the arm 'pesc-s1', which is not among the arms \(pesc, qlora\)"):
        tiny_recipe(report={"replicates": {"pesc": ["pesc-s1"]}})
    arms = {"pesc-s1": {"method": "pesc", "train": {"seed": 1}}}
    with pytest.raises(RecipeError, match="names the arm 'pesc-s1' twice"):
        tiny_recipe(arms=arms, report={"replicates": {"pesc": ["pesc-s1"], "qlora": ["pesc-s1"]}})
    assert tiny_recipe(arms=arms, report={"replicates": {"pesc": ["pesc-s1"]}}).report.replicates == {"pesc": ("pesc-s1",)}


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"method": "pesc"}, r"pesc-s1 are pesc trained with other seeds, but train\.seed 42 is there twice"),
        (
            {"method": "qlora", "train": {"seed": 1}},
            r"pesc-s1 is pesc trained with another seed, but method differs \('pesc' and 'qlora'\)",
        ),
        ({"method": "pesc", "train": {"seed": 1, "learning_rate": 1e-5}}, r"but train\.learning_rate differs"),
        ({"method": "pesc", "train": {"seed": 1}, "upcycle": {"adapter_dim": 12}}, r"but upcycle\.adapter_dim differs"),
    ],
)
def test_a_further_run_is_the_arm_itself_with_another_seed(tiny_recipe, arm, message):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(arms={"pesc-s1": arm}, report={"replicates": {"pesc": ["pesc-s1"]}})
