"""Suites against the paper's table, lm-eval's own task files, and the recipes written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pesc.errors import RecipeError
from pesc.evaluate.config import EvaluateConfig
from pesc.evaluate.suites import expand, read_suites
from pesc.evaluate.task_index import OWN_TASKS
from pesc.evaluate.tasks import FOLDER
from pesc.recipe import load_recipe

STOCK_FILES = {
    "mmlu": "mmlu/default/_default_template_yaml", "gsm8k": "gsm8k/gsm8k.yaml", "minerva_math": "minerva_math/minerva_math_algebra.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml", "triviaqa": "triviaqa/default.yaml", "nq_open": "nq_open/nq_open.yaml", "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml", "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml",
}  # fmt: skip


def test_the_papers_suite_is_the_papers_table():
    """Task and examples of its tables; 4-shot MBPP has three examples in the stock task."""
    found = sorted((row["task"], row["num_fewshot"]) for row in read_suites()["pesc-paper"].values())
    assert found == [
        ("arc_challenge", 0), ("arc_easy", 0), ("gsm8k", 5), ("hellaswag", 0), ("hellaswag", 10), ("minerva_math", 4), ("mmlu", 5), ("nq_open", 0),
        ("pesc_humaneval", 0), ("pesc_mbpp", 3), ("piqa", 0), ("triviaqa", 0), ("winogrande", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite, rows in read_suites().items() for name in rows])
def test_the_installed_lm_eval_measures_what_the_suite_names(suite, name):
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    row = read_suites()[suite][name]
    own = row["task"] in OWN_TASKS
    path = FOLDER / f"{row['task']}.yaml" if own else Path(lm_eval.__file__).parent / "tasks" / STOCK_FILES[row["task"]]
    task = load_yaml(path, resolve_func=False)
    metrics = [entry["metric"] for entry in task["metric_list"]]
    assert row["metric"] in metrics
    filters = [entry["name"] for entry in task.get("filter_list", [{"name": "none"}])]
    assert row.get("filter", filters[0]) in filters
    assert "filter" in row or len(filters) == 1
    if task.get("num_fewshot") == 0:
        assert row.get("num_fewshot", 0) == 0


def test_suites_agree_on_names():
    seen = {}
    for suite, rows in read_suites().items():
        EvaluateConfig(benchmarks=rows)
        for name, row in rows.items() if suite != "demo" else ():
            assert seen.setdefault(name, row) == row, name


def test_a_recipe_with_suites_is_the_recipe_written_out():
    short = EvaluateConfig.model_validate(
        {
            "suites": ["chat"], "tasks": ["boolq", "lambada_openai"], "limit": 100,
            "data": {"gsm8k": {"source": "S", "files": {"train": "a.jsonl", "test": "b.jsonl"}}},
            "benchmarks": {"humaneval-chat": {"limit": 7}, "own": {"task": "piqa", "metric": "acc"}},
        }
    )  # fmt: skip
    gsm8k = {"task": "gsm8k", "metric": "exact_match", "filter": "flexible-extract", "num_fewshot": 5, "apply_chat_template": True}
    whole = EvaluateConfig.model_validate(
        {
            "benchmarks": {
                "gsm8k-chat": {**gsm8k, "limit": 100, "source": "S", "files": {"train": "a.jsonl", "test": "b.jsonl"}},
                "humaneval-chat": {"task": "pesc_humaneval_instruct", "metric": "pass@1", "num_fewshot": 0, "apply_chat_template": True, "limit": 7},
                "boolq": {"task": "boolq", "limit": 100},
                "lambada-openai": {"task": "lambada_openai", "limit": 100},
                "own": {"task": "piqa", "metric": "acc", "limit": 100},
            }
        }
    )  # fmt: skip
    assert short == whole
    assert EvaluateConfig.model_validate(short.model_dump(mode="json")) == short


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"suites": ["pesc-papers"]}, r"no suite 'pesc-papers' \(did you mean 'pesc-paper'\?\)"),
        ({"suites": "chat"}, "suites must be a list of names, not 'chat'"),
        ({"suites": ["chat"], "data": {"mmlu": {}}}, "data names the task 'mmlu', which no benchmark"),
        ({"suites": ["chat"], "data": {"gsm8k": "file"}}, "data.gsm8k must be a map"),
        ({"suites": ["chat"], "limit": 0}, "greater than 0"),
        ({"suites": ["pesc-paper", "demo"]}, "suite demo has another benchmark 'mmlu'"),
        ({"suites": []}, "at least 1 item"),
        ({"benchmarks": ["mmlu"], "suites": ["chat"]}, "benchmarks must be a map"),
        ({"suites": ["chat"], "benchmarks": {"x": 3}}, "valid dictionary or instance of BenchmarkConfig"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(raw, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig.model_validate(raw)


def test_an_override_limits_every_benchmark_of_a_shipped_recipe():
    limited = load_recipe("camelidae-8x7b", ["evaluate.limit=20", "evaluate.benchmarks.mmlu.limit=1"]).evaluate.benchmarks
    assert {name: row.limit for name, row in limited.items()} == {**dict.fromkeys(limited, 20), "mmlu": 1}
    assert limited["mmlu"].num_fewshot == 5, "a change of one field keeps the suite's others"
    with pytest.raises(RecipeError, match="no suite 'paper'"):
        load_recipe("demo", ["evaluate.suites=[paper]"])


def test_expansion_leaves_what_it_does_not_know():
    assert expand({"suites": ["chat"], "extra": 1})["extra"] == 1
    assert expand({"benchmarks": {}}) == {"benchmarks": {}}


def test_the_command_lists_them():
    from pesc.cli import app

    listed = CliRunner().invoke(app, ["suites"], env={"COLUMNS": "160"})
    assert listed.exit_code == 0
    for word in ("pesc-paper", "minerva_math", "chat template", "first 57 items"):
        assert word in listed.stdout
    shown = CliRunner().invoke(app, ["suites", "gpt-3.5", "--json"])
    assert json.loads(shown.stdout)["gpt-3.5"]["arc-challenge-25"]["num_fewshot"] == 25
