"""Pre-registered questions about held-out losses: better, worse, none and cannot tell, each from data in which that is so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pesc.errors import EvaluationError, RecipeError
from pesc.evaluate.config import Preregistration, Question
from pesc.evaluate.question_tables import primary_sentence, questions_markdown
from pesc.evaluate.questions import compare_losses
from pesc.evaluate.replicates import paired_runs_difference
from pesc.evaluate.verdict import by_loss
from pesc.heldout.results import HeldOutResult, RowLoss, write_result
from tests.evaluate.builders import write_evaluation
from tests.evaluate.test_report import run as build_report

DOMAINS = ("code", "general", "math")
REPLICATES = {arm: (f"{arm}-s2", f"{arm}-s3") for arm in ("pesc", "qlora", "wide")}
ASKED = Preregistration(
    primary=Question(arm="pesc", control="qlora", asks="Is it better?"), secondary=(Question(arm="wide", control="pesc"),), smallest_difference=0.01
)  # fmt: skip
TOKENS = np.random.default_rng(1).integers(4, 200, size=(3, 40))


def losses(change: float, seed: int, spread: float = 0.002, rows: float = 0.05) -> HeldOutResult:
    """40 rows of each domain at 2 nats a token and their own difficulty, moved by `change` and by what a seed does."""
    hard = np.random.default_rng(0).gamma(2.0, 0.5, size=(3, 40))
    random = np.random.default_rng([seed, round(1e6 * abs(change)), 7])
    level = change + spread * random.standard_normal()
    found = []
    for domain, name in enumerate(DOMAINS):
        per_token = 2 + hard[domain] + level + rows * random.standard_normal(40)
        found += [RowLoss(domain=name, tokens=int(t), loss=float(t * p)) for t, p in zip(TOKENS[domain], per_token, strict=True)]
    return HeldOutResult(rows_sha256="r", parameters=1000, layers=6, rows=tuple(found))


def study(pesc: float, wide: float = 0.0, **settings) -> dict[str, HeldOutResult]:
    """Three runs of three arms; qlora is at 0."""
    levels = {"pesc": pesc, "qlora": 0.0, "wide": wide}
    return {name: losses(levels[arm], seed, **settings) for arm in levels for seed, name in enumerate((arm, *REPLICATES[arm]))}


def compare(found, asked=ASKED):
    return compare_losses(found, list(found), REPLICATES, dict.fromkeys(found, 640), asked)


@pytest.mark.parametrize(
    ("change", "settings", "verdict"),
    [
        (-0.2, {}, "better"),
        (+0.2, {}, "worse"),
        (0.0, {"rows": 0.0001, "spread": 0.0001}, "no difference"),
        (-0.003, {"rows": 0.0001, "spread": 0.0001}, "no difference"),
        (-0.02, {"spread": 0.2}, "cannot tell"),
    ],
)
def test_the_primary_verdict_is_what_is_in_the_data(change, settings, verdict):
    result = compare(study(change, **settings))
    primary = next(answer for answer in result.answers if answer.kind == "primary")
    assert primary.verdict == verdict
    assert primary.low <= primary.difference <= primary.high
    assert (primary.runs, primary.rows) == (3, 120)
    assert verdict in primary_sentence(result.model_dump(mode="json"))


def test_exchanging_arm_and_control_reverses_everything():
    found = study(-0.03)
    other = Preregistration(primary=Question(arm="qlora", control="pesc"), smallest_difference=0.01)
    first, second = (next(a for a in compare(found, asked).answers if a.kind == "primary") for asked in (ASKED, other))
    assert (second.difference, second.low, second.high) == pytest.approx((-first.difference, -first.high, -first.low), abs=1e-6)
    assert second.p_value == pytest.approx(first.p_value)
    assert {first.verdict, second.verdict} == {"better", "worse"}


def test_the_difference_is_that_of_the_domains_losses_each_counted_once():
    found = study(-0.05)
    result = compare(found)
    means = {arm: np.mean([found[name].mean for name in (arm, *REPLICATES[arm])]) for arm in REPLICATES}
    by_domain = {a.domain: a.difference for a in result.answers if a.kind == "domain"}
    primary = next(a for a in result.answers if a.kind == "primary")
    assert primary.difference == pytest.approx(means["pesc"] - means["qlora"], abs=1e-6)
    assert set(by_domain) == set(DOMAINS)
    assert primary.difference == pytest.approx(np.mean(list(by_domain.values())), abs=1e-6)
    assert {run.arm: run.mean for run in result.runs} == pytest.approx({name: loss.mean for name, loss in found.items()}, abs=1e-6)
    group = next(group for group in result.groups if group.group == "pesc")
    scores = [found[name].mean for name in ("pesc", *REPLICATES["pesc"])]
    half = 4.302653 * np.std(scores, ddof=1) / np.sqrt(3)  # Student's t of two degrees of freedom
    assert (group.mean, group.high - group.mean) == pytest.approx((np.mean(scores), half), abs=2e-6)


def test_a_secondary_answer_must_pass_the_correction_as_well():
    result = compare(study(-0.05, wide=-0.05))
    assert [answer.kind for answer in result.answers] == ["primary", "domain", "domain", "domain", "secondary"]
    assert all(answer.verdict is None for answer in result.answers if answer.kind == "domain")
    asked = Preregistration(
        primary=ASKED.primary, secondary=(Question(arm="wide", control="pesc"), *[Question(arm="qlora", control="wide")] * 20), smallest_difference=1e-9
    )  # fmt: skip
    for answer in compare(study(-0.05, wide=-0.049), asked).answers:
        if answer.kind == "secondary" and answer.verdict in ("better", "worse"):
            assert answer.p_adjusted < 0.05


def test_seeds_without_scatter_leave_the_test_of_the_rows_and_rows_without_scatter_that_of_the_seeds():
    scipy = pytest.importorskip("scipy.stats")
    rows = np.random.default_rng(0).standard_normal(30) + 0.2
    by_rows = paired_runs_difference([np.repeat(rows[None], 3, axis=0)])
    assert by_rows.p_value == pytest.approx(float(scipy.ttest_1samp(rows, 0).pvalue), abs=1e-7)
    seeds = np.array([0.3, 0.5, 0.1])
    by_seeds = paired_runs_difference([np.repeat(seeds[:, None], 30, axis=1)])
    assert by_seeds.p_value == pytest.approx(float(scipy.ttest_1samp(seeds, 0).pvalue), abs=1e-7)
    assert by_seeds.spread == pytest.approx(0.2)
    with pytest.raises(ValueError, match="two pairs of runs"):
        paired_runs_difference([rows[None]])


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("rows", [0.0, 1.8, 3.6, 6.0])
def test_equal_arms_are_told_apart_no_more_often_than_the_level(seeds, rows):
    """Rows of three domains with differences of their own, beside a spread of 1 from seed to seed; Holm lives on the small levels."""
    trials, wrong = 1000, {0.05: 0, 0.01: 0}
    for trial in range(trials):
        random = np.random.default_rng(trial)
        spread = random.standard_normal((seeds, 1))
        found = paired_runs_difference(
            [spread + rows * random.standard_normal(count) + random.standard_normal((seeds, count)) for count in (36, 48, 48)]
        )
        for level in wrong:
            wrong[level] += abs(found.difference) > found.half_width(level)
    assert wrong[0.05] <= 70, wrong
    assert wrong[0.01] <= 19, wrong


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.03, -0.02), "better"), ((0.02, 0.03), "worse"), ((-0.005, 0.009), "no difference"), ((-0.009, -0.001), "no difference"),
        ((-0.02, 0.005), "cannot tell"), ((-0.02, -0.001), "better"), ((-0.01, 0.01), "cannot tell"),
    ],
)  # fmt: skip
def test_what_an_interval_says(interval, verdict):
    assert by_loss(*interval, 0.01) == verdict


def test_a_lost_run_leaves_its_question_without_an_answer_and_the_others_with_theirs():
    found = study(-0.05)
    del found["qlora-s3"]
    result = compare(found)
    assert result.unanswered == ("pesc against qlora: qlora-s3 has no held-out losses.",)
    assert [answer.kind for answer in result.answers] == ["secondary"]
    assert "no answer. pesc against qlora" in primary_sentence(result.model_dump(mode="json"))
    assert compare({}).unanswered == tuple(f"{q.arm} against {q.control}: no arm has held-out losses." for q in ASKED.questions)
    assert compare_losses({}, [], {}, {}, None) is None


def test_losses_on_other_rows_are_not_compared():
    found = study(-0.05)
    found["wide"] = found["wide"].model_copy(update={"rows_sha256": "other"})
    with pytest.raises(EvaluationError, match="pesc and wide are of different rows"):
        compare(found)


def test_the_page_shows_the_verdict_every_arm_and_every_seed(tmp_path):
    found = study(-0.05)
    inputs = {}
    for name, result in found.items():
        inputs[f"evaluate[{name}/mmlu]"] = write_evaluation(
            tmp_path / "evaluate" / name, [1, 0, 1, 0], kind="dense" if "qlora" in name else "pesc"
        )
        (tmp_path / "heldout" / name).mkdir(parents=True)
        write_result(tmp_path / "heldout" / name, result)
        inputs[f"heldout[{name}]"] = tmp_path / "heldout" / name
    settings = {"preregistration": ASKED, "replicates": REPLICATES, "baselines": ()}
    out = build_report(tmp_path, inputs, **settings)
    results = json.loads((out / "results.json").read_text())["held_out"]
    assert next(a for a in results["answers"] if a["kind"] == "primary")["verdict"] == "better"
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "Primary question, pesc against qlora: better" in page
    assert questions_markdown(results) in text
    for name, result in found.items():
        assert f"| {name} | {result.mean:.4f} |" in text
        assert f'data-from="heldout[{name}]"' in page
    assert "<li>pesc − qlora: Is it better?</li>" in page
    assert "- pesc − qlora: Is it better?" in text
    assert (out / "plots" / "questions.svg").is_file()
    assert not list((out / "plots").glob("*-s2*")), "further runs get no pictures of their own"


def test_questions_that_no_run_could_answer_are_refused_when_the_recipe_is_read(tiny_recipe):
    seeds = {"pesc-2": {"method": "pesc", "train": {"seed": 2}}, "qlora-2": {"method": "qlora", "train": {"seed": 2}}}
    arms = {"pesc": {"method": "pesc"}, "qlora": {"method": "qlora"}, **seeds}
    asked = {"primary": {"arm": "pesc", "control": "qlora"}, "smallest_difference": 0.01}
    good = {
        "arms": arms, "heldout": {"enabled": True},
        "report": {"replicates": {"pesc": ["pesc-2"], "qlora": ["qlora-2"]}, "preregistration": asked},
    }  # fmt: skip
    assert tiny_recipe(**good).report.preregistration.primary.control == "qlora"
    for change, message in (
        ({"heldout": {"enabled": False}}, r"heldout\.enabled must be true"),
        ({"report": {"replicates": {"pesc": ["pesc-2"]}, "preregistration": asked}}, "'qlora', which is trained once"),
        ({"report": {**good["report"], "preregistration": {**asked, "secondary": [{"arm": "moe", "control": "pesc"}]}}}, "the arm 'moe'"),
        ({"arms": {**arms, "qlora-2": {"method": "qlora", "train": {"seed": 3}}}}, r"train\.seed is \[42, 2\] and \[42, 3\]"),
        ({"report": {**good["report"], "preregistration": {**asked, "primary": {"arm": "pesc", "control": "pesc"}}}}, "'pesc' with itself"),
        (
            {"report": {**good["report"], "preregistration": {**asked, "secondary": [{"arm": "qlora", "control": "pesc"}]}}},
            "asks twice about",
        ),
        ({"report": {**good["report"], "control_arm": "nope"}}, r"report\.control_arm names the arm 'nope'"),
        ({"mix": {"held_out": 0}}, r"mix\.held_out is 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            tiny_recipe(**{**good, **change})
