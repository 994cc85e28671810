"""Stock lm-eval tasks over files in place of the hub.  Indexing lm-eval's own tasks takes some ten seconds, hence slow."""

from __future__ import annotations

import json

import pytest

from pesc.errors import EvaluationError, TransientError
from pesc.evaluate import harness
from pesc.evaluate.config import BenchmarkConfig
from pesc.evaluate.results import read_result, read_samples
from pesc.evaluate.task_index import explained, load_tasks
from tests.evaluate.builders import context

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_an_unknown_task_comes_with_near_names(tmp_path):
    with pytest.raises(EvaluationError, match=r"no task 'hellaswagg'\. Did you mean hellaswag"):
        load_tasks(BenchmarkConfig(task="hellaswagg", metric="acc"), None, tmp_path)


@pytest.mark.parametrize(
    ("task", "instead"), [("humaneval", "pesc_humaneval, which runs it in a sandbox"), ("humaneval_plus", "use one of")]
)
def test_stock_tasks_that_run_code_are_refused(tmp_path, task, instead):
    with pytest.raises(EvaluationError, match=instead):
        load_tasks(BenchmarkConfig(task=task, metric="pass@1"), None, tmp_path)


def test_no_hub_is_a_sentence(tmp_path):
    with harness.offline(True), pytest.raises(EvaluationError, match=r"items of task openbookqa cannot be fetched.*source"):
        load_tasks(BenchmarkConfig(task="openbookqa", metric="acc"), None, tmp_path)


def test_mmlu_takes_each_subjects_rows_and_examples(tmp_path, model_dir):
    """57 subjects of one file each for questions and examples; five examples of the same subject, in the file's order."""
    data = tmp_path / "data"
    data.mkdir()
    subjects = _mmlu_subjects()
    rows = {
        split: [_mmlu_row(subject, split, n) for subject in subjects for n in range(count)] for split, count in (("test", 2), ("dev", 5))
    }
    for split, found in rows.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    config = BenchmarkConfig(
        task="mmlu", metric="acc", num_fewshot=5, limit=1, source="x", files={"test": "test.jsonl", "dev": "dev.jsonl"}, dtype="float32"
    )
    loaded = load_tasks(config, data, tmp_path / "tasks")
    harness.apply_settings(config, loaded)
    assert len(loaded["tasks"]) == 57
    task = loaded["tasks"]["mmlu_anatomy"]
    assert [doc["question"] for doc in task.eval_docs] == ["anatomy test 0", "anatomy test 1"]
    prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
    assert [prompt.index(f"anatomy dev {n}") for n in range(5)] == sorted(prompt.index(f"anatomy dev {n}") for n in range(5))
    assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.")
    ctx = context(tmp_path / "run", config, model_dir, data)
    harness.build(ctx)
    result = read_result(ctx.out)
    assert (result.num_items, result.num_available, result.num_fewshot, len(result.tasks)) == (57, 114, 5, 57)
    assert result.value == pytest.approx(result.num_correct / 57)
    assert len(list(read_samples(ctx.out))) == 57


def _mmlu_subjects() -> list[str]:
    from pathlib import Path

    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    return sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))


def _mmlu_row(subject: str, split: str, number: int) -> dict:
    return {"question": f"{subject} {split} {number}", "subject": subject, "choices": ["w", "x", "y", "z"], "answer": number % 4}


def test_gsm8k_over_real_rows(tmp_path, model_dir, shared_data):
    config = BenchmarkConfig(
        task="gsm8k", metric="exact_match", filter="flexible-extract", num_fewshot=1, limit=2, source="x", max_gen_toks=8, dtype="float32",
        files={"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    )  # fmt: skip
    ctx = context(tmp_path, config, model_dir, shared_data / "data/benchmarks")
    harness.build(ctx)
    result, samples = read_result(ctx.out), list(read_samples(ctx.out))
    assert (result.num_items, result.num_available, result.num_fewshot, result.filter) == (2, 1319, 1, "flexible-extract")
    assert samples[0].target.endswith("#### 18")
    with pytest.raises(EvaluationError, match="comes with the filters strict-match, flexible-extract"):
        harness.build(context(tmp_path / "again", config.model_copy(update={"filter": None}), model_dir, shared_data / "data/benchmarks"))


def test_examples_never_come_from_the_questions(tmp_path, shared_data):
    config = BenchmarkConfig(task="gsm8k", metric="exact_match", source="x", files={"test": "gsm8k_test.jsonl"})
    with pytest.raises(EvaluationError, match="no examples for 5-shot prompts"):
        load_tasks(config, shared_data / "data/benchmarks", tmp_path)


@pytest.mark.parametrize("task", ["mmlu", "mmlu_virology"])
def test_a_file_with_some_subjects_is_not_asked_as_all(tmp_path, task):
    """Three of 57 subjects: neither the group nor the one subject that is missing gets another subject's rows."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("test", "dev"):
        rows = [_mmlu_row(subject, split, n) for subject in ("anatomy", "astronomy", "philosophy") for n in range(5)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = BenchmarkConfig(task=task, metric="acc", num_fewshot=5, source="x", files={"test": "test.jsonl", "dev": "dev.jsonl"})
    with pytest.raises(EvaluationError, match=r"has no row of \w+ in its column subject \(3 of 57 subsets are there\)"):
        load_tasks(config, data, tmp_path / "tasks")


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (ConnectionError("refused"), True),
        (TimeoutError("timed out"), True),
        (OSError("no route"), True),
        (OSError(28, "No space left on device"), False),
        (FileNotFoundError("there is no such data set"), False),
    ],
)
def test_only_trouble_of_the_network_may_pass(monkeypatch, error, may_pass):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(EvaluationError, match="cannot be fetched from the hub") as caught, explained("boolq", local=False):
        raise error
    assert isinstance(caught.value, TransientError) is may_pass
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EvaluationError) as caught, explained("boolq", local=False):
        raise error
    assert not isinstance(caught.value, TransientError)


@pytest.mark.parametrize(("status", "may_pass"), [(429, True), (503, True), (401, False), (404, False)])
def test_the_hub_s_answer_says_whether_it_may_pass(monkeypatch, status, may_pass):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class HubError(OSError):
        response = type("Answer", (), {"status_code": status})()

    with pytest.raises(EvaluationError) as caught, explained("boolq", local=False):
        raise HubError("what the hub said")
    assert isinstance(caught.value, TransientError) is may_pass
