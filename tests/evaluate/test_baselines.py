"""Published figures: every number has its source, and the known ones are what their sources say."""

from __future__ import annotations

import pytest

from pesc.errors import EvaluationError
from pesc.evaluate.baselines import Baselines, load_baselines
from pesc.recipe import load_recipe, recipe_names


@pytest.mark.parametrize(
    ("system", "benchmark", "value", "shots"),
    [
        ("gpt-3.5", "mmlu", 70.0, 5), ("gpt-3.5", "gsm8k", 57.1, 5), ("gpt-3.5", "humaneval", 48.1, 0), ("gpt-3.5", "hellaswag", 85.5, 10),
        ("gpt-3.5", "math", 34.1, 4), ("gpt-3.5", "mbpp", 52.2, 3), ("gpt-3.5-turbo-0613", "gsm8k", 76.3, 8), ("camel-7b", "math", 4.8, 4),
        ("camelidae-8x7b", "gsm8k", 44.0, 5), ("camelidae-8x13b", "triviaqa", 59.4, 0), ("camelidae-8x34b", "mmlu", 75.6, 5),
        ("llama-2-7b-chat", "gsm8k", 26.3, 5), ("llama-2-13b-chat", "math", 5.2, 4), ("mixtral-8x7b-instruct", "hellaswag", 86.5, 10),
    ],
)  # fmt: skip
def test_known_figures(system, benchmark, value, shots):
    figure = load_baselines().figure(system, benchmark)
    assert (figure.value, figure.shots) == (value, shots)
    assert "arXiv" in figure.source or "README" in figure.source


def test_the_papers_mean_gains_follow_from_its_table():
    """+0.9, +0.9 and +1.2 points over twelve benchmarks (HellaSwag as in the table, which the notes keep)."""
    baselines = load_baselines()
    for dense, sparse, gain, hellaswag in (
        ("camel-7b", "camelidae-8x7b", 0.90, 0.0),
        ("camel-13b", "camelidae-8x13b", 0.93, 0.3),
        ("camel-34b", "camelidae-8x34b", 1.15, 0.6),
    ):
        shared = [b for b in baselines.benchmarks if b != "hellaswag" and baselines.figure(dense, b) and baselines.figure(sparse, b)]
        assert len(shared) == 11
        total = sum(baselines.figure(sparse, b).value - baselines.figure(dense, b).value for b in shared) + hellaswag
        assert total / 12 == pytest.approx(gain, abs=0.006)


def test_placeholders_of_the_papers_appendix_are_not_there():
    chats = ("llama-2-7b-chat", "llama-2-13b-chat", "yi-34b-chat", "suschat-34b")
    assert not [f for f in load_baselines().figures if f.system in chats and f.value in (16.7, 3.3, 10.0)]


def test_tasks_of_all_recipes_have_rows_and_columns():
    baselines = load_baselines()
    for name in recipe_names():
        recipe = load_recipe(name)
        for system in recipe.report.baselines:
            baselines.require_system(system)
        for benchmark in recipe.evaluate.benchmarks.values():
            assert benchmark.baseline or baselines.row_of_task(benchmark.task), benchmark.task


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(EvaluationError, match=r"Did you mean 'gpt-3\.5'"):
        load_baselines().require_system("gpt-35")
    with pytest.raises(EvaluationError, match="Did you mean 'humaneval'"):
        load_baselines().require_row("human-eval")


def test_a_figure_without_its_column_or_twice_is_refused():
    row = {"mmlu": {"name": "MMLU", "items": 3, "tasks": ["mmlu"]}}
    figure = {
        "system": "x",
        "benchmark": "mmlu",
        "value": 1.0,
        "shots": 0,
        "metric": "accuracy",
        "source": "some source",
        "date": "2024-01",
    }
    with pytest.raises(ValueError, match="not both listed"):
        Baselines.model_validate({"benchmarks": row, "systems": {}, "figures": [figure]})
    with pytest.raises(ValueError, match="two figures"):
        Baselines.model_validate({"benchmarks": row, "systems": {"x": {"name": "X", "kind": "open"}}, "figures": [figure, figure]})
