"""What may be said about two arms, and about a published figure."""

from __future__ import annotations

import pytest

from pesc.errors import EvaluationError
from pesc.evaluate.baselines import load_baselines
from pesc.evaluate.comparability import comparability, score_interval
from pesc.evaluate.comparison import compare
from pesc.evaluate.paired import compare_paired
from tests.evaluate.builders import make_result, make_samples

BASELINES = load_baselines()


def run(results, answers=None, systems=("gpt-3.5",), control="qlora"):
    arms = tuple(dict.fromkeys(arm for arm, _ in results))
    return compare(results, answers or {}, arms, control, systems, BASELINES)


def reasons_beside(system: str, row: str, result):
    return comparability(result, BASELINES.figure(system, row), BASELINES.benchmarks[row])


def mmlu(right: int, total: int = 14042, **changes):
    return make_result([1] * right + [0] * (total - right), **changes)


def test_same_settings_and_an_interval_above_the_figure_outperform():
    comparison = run({("pesc", "mmlu"): mmlu(10100)})  # 71.9 %
    figure = comparison.cells[0].figures[0]
    assert (figure.comparable, figure.outperforms, figure.reasons) == (True, "yes", ())
    assert comparison.verdicts[0].outperforms == "yes"


def test_an_interval_below_the_figure_does_not_outperform():
    assert run({("pesc", "mmlu"): mmlu(9600)}).cells[0].figures[0].outperforms == "no"


def test_an_interval_around_the_figure_cannot_tell():
    assert run({("pesc", "mmlu"): mmlu(9840)}).cells[0].figures[0].outperforms == "cannot tell"


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (mmlu(14042, shots=0), "0-shot, the figure is 5-shot"),
        (mmlu(100, 100, available=14042), "100 of 14,042 items"),
        (mmlu(2850, 2850, task="pesc_mmlu"), "another selection or form"),
        (mmlu(14079, 14079), "14,079 items where MMLU has 14,042"),
        (mmlu(14042, metric="f1"), "f1, the figure is accuracy"),
    ],
)
def test_other_settings_are_named_and_never_outperform(result, reason):
    figure = run({("pesc", "mmlu"): result}).cells[0].figures[0]
    assert not figure.comparable
    assert any(reason in text for text in figure.reasons)
    assert figure.outperforms == "cannot tell"


def test_a_figure_without_a_published_number_of_examples_is_not_comparable():
    reasons = reasons_beside("camel-7b", "arc_challenge", make_result([1] * 1172, task="arc_challenge", metric="acc_norm"))
    assert reasons == ("5-shot, the figure's number of examples is not published",)


def test_exact_match_is_accuracy_on_gsm8k():
    result = make_result([1] * 1319, task="gsm8k", metric="exact_match")
    assert reasons_beside("gpt-3.5", "gsm8k", result) == ()


def gsm8k(right: int, **changes):
    return make_result([1] * right + [0] * (1319 - right), **{"task": "gsm8k", "metric": "exact_match", **changes})


def test_figures_that_no_run_can_be_compared_with_say_why():
    mbpp = make_result([1] * 500, task="pesc_mbpp", metric="pass@1", shots=3)
    assert reasons_beside("gpt-3.5", "mbpp", mbpp) == ("over the hand-verified subset of MBPP, not its 500 test questions",)
    assert reasons_beside("gpt-3.5-turbo-0613", "mbpp", mbpp) == ()


def test_another_way_of_answering_is_another_setting():
    row = BASELINES.benchmarks["mmlu"]
    step_by_step = BASELINES.figure("gpt-3.5", "mmlu").model_copy(update={"method": "chain of thought"})
    assert comparability(mmlu(14042), step_by_step, row) == ("answered by answer alone, the figure by chain of thought",)
    cot = make_result([1] * 5000, task="minerva_math", metric="exact_match", shots=4)
    assert reasons_beside("gpt-3.5-turbo-0613", "math", cot) == ()


def test_what_a_source_does_not_publish_is_said_and_keeps_the_figure_comparable():
    result = gsm8k(700, filter="flexible-extract", chat_template_sha256="0" * 64)
    figure = run({("pesc", "gsm8k"): result}).cells[0].figures[0]
    assert figure.comparable
    assert [text.split(";")[0] for text in figure.caveats] == ["asked in the chat template", "answers found by flexible-extract"]


def test_a_score_without_a_standard_error_is_not_compared():
    result = mmlu(14042, num_correct=None, stderr=None)
    assert run({("pesc", "mmlu"): result}).cells[0].figures[0].outperforms == "cannot tell"


def test_a_figure_has_a_sampling_error_of_its_own():
    """60.0 % of 1,319 lies above 57.1 (Wilson from 57.3), but both are samples: Newcombe's interval of the difference holds 0."""
    result = gsm8k(791)
    assert score_interval(result)[1] > 0.571
    figure = run({("pesc", "gsm8k"): result}).cells[0].figures[0]
    assert (figure.outperforms, figure.comparable) == ("cannot tell", True)
    assert figure.low < 0 < figure.high


def test_overall_is_the_mean_over_comparable_figures():
    better = {("pesc", "mmlu"): mmlu(10500), ("pesc", "gsm8k"): gsm8k(1000)}
    assert run(better).verdicts[0].outperforms == "yes"
    mixed = run({**better, ("pesc", "gsm8k"): gsm8k(100)}).verdicts[0]
    assert (mixed.yes, mixed.no, mixed.outperforms, mixed.counted) == (1, 1, "no", 2)
    made_up_for = run({**better, ("pesc", "gsm8k"): gsm8k(690)}).verdicts[0]
    assert made_up_for.difference == pytest.approx(((10500 / 140.42 - 70) + (690 / 13.19 - 57.1)) / 2, abs=1e-3)


def test_perfect_answers_outperform_although_some_figures_are_not_comparable():
    results = {
        ("pesc", "mmlu"): mmlu(14042), ("pesc", "gsm8k"): gsm8k(1319), ("pesc", "arc"): make_result([1] * 1172, task="arc_challenge", shots=0),
        ("pesc", "mbpp"): make_result([1] * 500, task="pesc_mbpp", metric="pass@1", shots=3),
    }  # fmt: skip
    verdict = run(results).verdicts[0]
    assert (verdict.outperforms, verdict.yes, verdict.not_comparable) == ("yes", 2, 2)


def test_two_settings_of_a_benchmark_count_once_and_the_plain_one_is_taken():
    chat = gsm8k(1319, chat_template_sha256="0" * 64)
    verdict = run({("pesc", "a-chat"): chat, ("pesc", "gsm8k"): gsm8k(600)}).verdicts[0]
    assert (verdict.counted, verdict.yes, verdict.no) == (1, 1, 1)
    assert verdict.difference == pytest.approx(600 / 13.19 - 57.1, abs=1e-3)


def test_nothing_comparable_cannot_be_told():
    verdict = run({("pesc", "mmlu"): mmlu(14042, shots=0)}).verdicts[0]
    assert (verdict.outperforms, verdict.counted, verdict.difference) == ("cannot tell", 0, None)


def test_scores_that_are_not_right_or_wrong_are_tested_by_the_bootstrap():
    first = [s.model_copy(update={"score": 0.8, "correct": None}) for s in make_samples([1] * 40)]
    second = [s.model_copy(update={"score": 0.8 - (s.doc_id % 4) / 10, "correct": None}) for s in make_samples([1] * 40)]
    pair, _ = compare_paired("a", "b", "x", first, second, seed=1)
    assert (pair.only_arm, pair.discordant, pair.power_of_one_point) == (None, 30, None)
    assert pair.p_value == pytest.approx(2 / 10_001)


def test_intervals_are_wilsons_for_shares_and_normal_for_means_of_subtasks():
    assert score_interval(make_result([1, 0, 1, 1]))[0] == "wilson"
    kind, low, high = score_interval(make_result([1, 0, 1, 1], value=0.6, stderr=0.3))
    assert (kind, low, high) == ("normal", pytest.approx(0.012, abs=1e-3), 1.0)
    assert score_interval(make_result([1, 0], num_correct=None, stderr=None))[0] == "none"


def test_paired_counts_and_p_value():
    first, second = [1] * 9 + [0] * 4 + [1] * 20 + [0] * 7, [0] * 9 + [1] * 4 + [1] * 20 + [0] * 7
    pair, _ = compare_paired("pesc", "qlora", "mmlu", make_samples(first), make_samples(second), seed=1)
    assert (pair.only_arm, pair.only_control, pair.both, pair.neither) == (9, 4, 20, 7)
    assert pair.p_value == pytest.approx(0.26684570)  # 2 * P(X <= 4), X ~ Binomial(13, 1/2) = 2 * 1093 / 8192
    assert pair.difference == pytest.approx(12.5)
    assert pair.low < 12.5 < pair.high


def test_arms_that_answer_alike_are_not_certainly_equal():
    """Nor is their mean: no difference on 8 and on 12 items says little."""
    items = {"a": [1, 0] * 4, "b": [0, 0, 1] * 4}
    made = {(arm, b): scores for arm in ("pesc", "qlora") for b, scores in items.items()}
    comparison = run(
        {key: make_result(scores) for key, scores in made.items()}, {key: make_samples(scores) for key, scores in made.items()}
    )
    (mean,) = comparison.paired_means
    assert (mean.difference, mean.verdict) == (0, "cannot tell")
    assert mean.low == -mean.high < -10
    assert mean.resolves > 10
    assert all(pair.low == -pair.high < -19 for pair in comparison.paired)


def test_pairs_do_not_depend_on_the_order_of_samples():
    first, second = make_samples([1, 0, 1, 1, 0, 0]), make_samples([0, 0, 1, 0, 1, 0])
    straight, _ = compare_paired("a", "b", "x", first, second, seed=5)
    turned, _ = compare_paired("a", "b", "x", first[::-1], second, seed=5)
    assert straight == turned


def test_different_items_are_not_paired():
    with pytest.raises(EvaluationError, match="different items"):
        compare_paired("a", "b", "x", make_samples([1, 0]), make_samples([1, 0, 1]), seed=1)
    comparison = run(
        {("pesc", "mmlu"): make_result([1, 0]), ("qlora", "mmlu"): make_result([1, 0, 1])},
        {("pesc", "mmlu"): make_samples([1, 0]), ("qlora", "mmlu"): make_samples([1, 0, 1])},
    )
    assert comparison.paired == ()
    assert "different items" in comparison.not_paired[0]


def test_mean_over_benchmarks_counts_each_once():
    answers = {
        ("pesc", "mmlu"): make_samples([1] * 10), ("qlora", "mmlu"): make_samples([1] * 8 + [0] * 2),
        ("pesc", "gsm8k"): make_samples([0] * 100, "gsm8k"), ("qlora", "gsm8k"): make_samples([1] * 10 + [0] * 90, "gsm8k"),
    }  # fmt: skip
    results = {key: make_result([s.correct for s in samples], task=key[1]) for key, samples in answers.items()}
    mean = run(results, answers).paired_means[0]
    assert (mean.benchmarks, mean.difference) == (2, pytest.approx(5.0))


def test_no_control_means_no_pairs_but_all_scores():
    comparison = run({("pesc", "mmlu"): make_result([1, 0])}, {("pesc", "mmlu"): make_samples([1, 0])})
    assert comparison.paired == ()
    assert len(comparison.cells) == 1
