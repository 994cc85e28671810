"""Faults of benchmarks that are found before anything runs, by the real index of lm-eval in the real child."""

from __future__ import annotations

import json
import sys

import pytest

from pesc.evaluate import preflight
from pesc.evaluate.preflight import check, find_faults

OWN = {"task": "pesc_openbookqa", "metric": "acc", "source": "items", "files": {"test": "rows.jsonl"}}
CODE = {"task": "pesc_humaneval", "metric": "pass@1", "source": "items", "files": {"test": "rows.jsonl"}}


def _ask(benchmarks, methods=None, chat_template="pesc", base=None):
    return find_faults({"benchmarks": benchmarks, "methods": methods or {"pesc": "pesc"}, "chat_template": chat_template, "base": base})


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**OWN, "metric": "f1"}, "task pesc_openbookqa does not measure 'f1'; it measures acc, acc_norm."),
        ({**OWN, "filter": "strict-match"}, "task pesc_openbookqa has no filter 'strict-match'; it has none."),
        ({**OWN, "num_fewshot": 3}, "task pesc_openbookqa is always asked without examples; set num_fewshot to 0 or null."),
        ({**OWN, "files": {}}, "it names the source 'items' but no files in it; set files (split: file)."),
    ],
)
def test_each_fault_is_a_sentence_that_names_its_benchmark(row, fault):
    assert _ask({"good": OWN, "bad": row}) == [f"evaluate.benchmarks.bad: {fault}"]


def test_a_task_over_files_without_any(monkeypatch):
    faults = _ask({"bad": {"task": "pesc_mmlu", "metric": "acc"}})
    assert faults == ["evaluate.benchmarks.bad: the task reads its items from files; set source and files (split test)."]


def test_a_machine_without_sandbox(monkeypatch):
    from pesc.errors import EvaluationError

    def refuse():
        raise EvaluationError("The sandbox does not hold.")

    assert _ask({"code": CODE}) == []
    monkeypatch.setattr("pesc.evaluate.sandbox.require_isolation", refuse)
    assert _ask({"choice": OWN, "code": CODE}) == ["evaluate.benchmarks.code: The sandbox does not hold."]


def test_arms_without_a_chat_template(tmp_path):
    chat = {"own": {**OWN, "apply_chat_template": True}}
    (tmp_path / "tokenizer_config.json").write_text("{}")
    arms = {"pesc": "pesc", "base": "dense"}
    assert _ask(chat, arms) == [], "the model is not there yet"
    (fault,) = _ask(chat, arms, base=str(tmp_path))
    assert fault.startswith("evaluate[base/own]: apply_chat_template is on, but the model of arm base has no chat template")
    assert len(_ask(chat, arms, "model", str(tmp_path))) == 2
    assert _ask({"own": OWN}, arms, "model", str(tmp_path)) == []
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert _ask(chat, arms, base=str(tmp_path)) == []


@pytest.mark.slow
def test_the_check_runs_in_a_child_that_keeps_this_process_clean(tiny_recipe):
    recipe = tiny_recipe(evaluate={"benchmarks": {"x": {**OWN, "source": None, "files": {}}}})
    before = set(sys.modules)
    assert any(fault.startswith("evaluate.benchmarks.x: the task reads its items from files") for fault in check(recipe))
    assert not {"lm_eval.tasks", "torch"} & (set(sys.modules) - before)


@pytest.mark.slow
def test_stock_tasks_and_the_shipped_recipes(monkeypatch, tmp_path):
    """lm-eval's whole index: near names, code without isolation, the hub; and nothing wrong with what ships, but that there is no hub here."""
    from pesc.recipe import load_recipe, recipe_names

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    faults = _ask(
        {
            "typo": {"task": "hellaswagg"}, "unguarded": {"task": "humaneval", "metric": "pass@1"}, "filters": {"task": "gsm8k", "metric": "exact_match"},
            "hub": {"task": "piqa", "metric": "acc_norm"}, "metric": {"task": "minerva_math", "metric": "acc"},
        }
    )  # fmt: skip
    text = "\n".join(faults)
    assert "evaluate.benchmarks.typo: lm-eval knows no task 'hellaswagg'. Did you mean hellaswag" in text
    assert "evaluate.benchmarks.unguarded: Task humaneval runs model-written code without any isolation; use pesc_humaneval" in text
    assert "evaluate.benchmarks.filters: task gsm8k has the filters strict-match, flexible-extract" in text
    assert "evaluate.benchmarks.hub: its items are baber/piqa on the hub, but HF_HUB_OFFLINE is set" in text
    assert "evaluate.benchmarks.metric: task minerva_math does not measure 'acc'; it measures exact_match, math_verify" in text
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in recipe_names():
        assert _ask({key: row.model_dump(mode="json") for key, row in load_recipe(name).evaluate.benchmarks.items()}) == [], name
    assert preflight.TIMEOUT_SECONDS > 60
