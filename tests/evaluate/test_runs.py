"""`pesc compare`: runs of a store side by side, as a user asks for them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from pesc import pipeline
from pesc.cli import app
from pesc.errors import EvaluationError
from pesc.evaluate.results import ModelFacts, write_results
from pesc.evaluate.runs import compare_runs, find_run
from pesc.run import run_recipe
from pesc.stage import BuildResult, StageContext
from tests.evaluate.builders import make_result, make_samples, write_evaluation

RIGHT = {1234: 0.5, 7: 0.8}
"""Share of right answers by the benchmark's seed; the sparse arm has a tenth more."""


def evaluate(ctx: StageContext) -> BuildResult:
    """A real result with samples: 400 questions, answered by the benchmark's seed and the arm."""
    sparse = "[pesc/" in ctx.address
    draws = np.random.default_rng(5).random(ctx.config.limit or 400)
    right = (draws < RIGHT[ctx.config.seed] + (0.1 if sparse else 0.0)).astype(int).tolist()
    block = {"num_experts": 4, "top_k": 2, "adapter_dim": 8} if sparse else None
    model = ModelFacts(kind="pesc" if sparse else "dense", model_type="llama", parameters=1000, pesc=block)
    write_results(ctx.out, make_result(right, task=ctx.config.task, model=model), make_samples(right, ctx.config.task))
    return BuildResult(metrics={})


@pytest.fixture
def built(store, tiny_recipe, fakes, monkeypatch, tmp_path):
    """A factory: run the tiny recipe with changed benchmark settings; returns the path of its YAML file."""
    stage = replace(pipeline._BY_NAME["evaluate"], builder="tests.evaluate.test_runs:evaluate", isolated=False)
    monkeypatch.setitem(pipeline._BY_NAME, "evaluate", stage)
    monkeypatch.setitem(pipeline._BY_NAME, "report", replace(pipeline._BY_NAME["report"], builder="pesc.evaluate.report:build"))

    def run(name: str = "tiny", **benchmark):
        recipe = tiny_recipe(name=name, evaluate={"benchmarks": {"quiz": {"task": "mmlu", "num_fewshot": 5, **benchmark}}})
        run_recipe(recipe, store)
        path = tmp_path / f"{name}.json.yaml"
        path.write_text(recipe.model_dump_json())
        return str(path)

    return run


def pesc_compare(*arguments):
    return CliRunner().invoke(app, ["compare", *arguments], catch_exceptions=False)


def test_two_recipes_are_compared_arm_by_arm_on_the_same_items(built, tmp_path):
    old, new = built("old"), built("new", seed=7)
    done = pesc_compare(old, new, "--against", "gpt-3.5", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("| new:")]
    assert [line.split(" | ")[0] for line in lines[:2]] == ["| new:pesc − old:pesc", "| new:qlora − old:qlora"]
    assert all(line.endswith("| better |") for line in lines[:2])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["comparison"]["arms"] == ["old:pesc", "old:qlora", "new:pesc", "new:qlora"]
    pair = results["comparison"]["paired"][1]
    draws = np.random.default_rng(5).random(400)
    assert pair["only_arm"] == int(((draws >= 0.5) & (draws < 0.8)).sum())
    assert pair["only_control"] == 0
    assert (tmp_path / "out" / "compare.md").read_text() in done.stdout + "\n"


def test_an_earlier_run_is_found_by_its_time(built, store):
    built()
    (first,) = [path.stem for path in (store.root / "runs" / "tiny").glob("*.json")]
    path = built(seed=7)
    results = json.loads(pesc_compare(path, f"tiny@{first}", "--json").stdout)
    assert results["comparison"]["paired"][0]["difference"] < -20
    assert results["runs"][0]["objects"] != results["runs"][1]["objects"]
    assert f"tiny@{first}:pesc" in results["comparison"]["arms"]
    with pytest.raises(EvaluationError, match=rf"2 runs start with '20'.*latest: {first}"):
        find_run("tiny@20", store)


def test_an_object_of_the_store_and_a_directory_are_runs_too(built, store, tmp_path):
    path = built()
    report = next(iter(store.manifests("report"))).output.digest
    single = next(m for m in store.manifests("evaluate") if "pesc" in m.address).output.digest
    assert set(find_run(report[:16], store).folders) == {("pesc", "quiz"), ("qlora", "quiz")}
    elsewhere = write_evaluation(tmp_path / "elsewhere", [1] * 400)
    results = compare_runs([find_run(path, store), find_run(single, store), find_run(str(elsewhere), store)], control="tiny:qlora")
    arms = {pair["arm"]: pair for pair in results["comparison"]["paired"]}
    assert set(arms) == {"tiny:pesc", f"{single[:12]}:pesc", str(elsewhere)}
    assert arms["tiny:pesc"]["difference"] == arms[f"{single[:12]}:pesc"]["difference"] == pytest.approx(10, abs=3)
    assert arms[str(elsewhere)]["benchmark"] == "quiz"


def test_holes_other_items_and_other_arms_are_said(built, store, tmp_path):
    whole = find_run(built("whole"), store)
    other = find_run(built("other", limit=50), store)
    other.folders["new", "quiz"] = other.folders["pesc", "quiz"]
    other.missing.append("evaluate[pesc/gone]")
    results = compare_runs([whole, other])
    assert results["comparison"]["paired"] == []
    problems = " ".join(results["comparison"]["not_paired"])
    assert "other:pesc and whole:pesc were asked different items (350 differ)" in problems
    assert "other:new has no counterpart: whole has no arm 'new'" in problems
    assert results["runs"][1]["missing"] == ["evaluate[pesc/gone]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "demo has no evaluation in the store"),
        (["dmo"], "Did you mean 'demo'"),
        (["demo@2026"], "no run starts with '2026'"),
        (["../demo@2026"], "no run starts with"),
        (["0123456789abcdef"], "no evaluation and no report starts with 0123456789abcdef"),
        (["."], "has no samples.jsonl"),
    ],
)
def test_what_is_not_there_is_a_sentence(arguments, message, store):
    with pytest.raises(Exception, match=message) as caught:
        find_run(arguments[0], store)
    assert type(caught.value).__module__ == "pesc.errors"


def test_a_run_given_twice_and_a_control_that_is_not_there_are_sentences(built, store):
    run = find_run(built(), store)
    with pytest.raises(EvaluationError, match="named twice"):
        compare_runs([run, run])
    with pytest.raises(EvaluationError, match="--control dense is none of the arms that are compared: pesc, qlora"):
        compare_runs([run], control="dense")
    with pytest.raises(EvaluationError, match="Did you mean 'gpt-3"):
        compare_runs([run], systems=("gpt-35",))


def test_one_run_with_a_control_is_its_own_paired_table(built, store):
    results = compare_runs([find_run(built(), store)], control="qlora")
    assert [(p["arm"], p["control"], p["verdict"]) for p in results["comparison"]["paired"]] == [("pesc", "qlora", "better")]


def test_a_damaged_result_and_an_unwritable_folder_are_sentences(built, store, tmp_path):
    path = built()
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="cannot be written to"):
        pesc_compare(path, "--out", str(tmp_path / "file" / "out"))
    broken = write_evaluation(tmp_path / "broken", [1] * 40)
    (broken / "results.json").write_text("{}")
    with pytest.raises(EvaluationError, match="unusable field"):
        find_run(str(broken), store)
