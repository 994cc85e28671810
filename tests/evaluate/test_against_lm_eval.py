"""The plain `lm_eval` command and `evaluate` on the same items: every prompt, every answer and every score is the same.

The command gets task files written here by hand (its stock file, with the rows from disk), so that nothing of this package stands
between it and the rows.  Both ask in fp32, one request a forward pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from pesc.evaluate import harness
from pesc.evaluate.config import BenchmarkConfig
from pesc.evaluate.results import BenchmarkResult, Sample, read_result, read_samples
from pesc.stage import Execution, StageContext

ROWS_FROM_DISK = {"tag": [], "dataset_path": "json", "dataset_name": None}
ARC_SPLITS = {"training_split": None, "validation_split": None}
SUBJECTS = ("anatomy", "high_school_physics", "philosophy")
MMLU = {"test": "mmlu_test.jsonl", "dev": "mmlu_dev.jsonl"}


@dataclass(frozen=True)
class Case:
    """One task: the files of its splits, the stock YAML below lm_eval/tasks, and what the hand-written one changes."""

    task: str
    metric: str
    files: dict[str, str]
    stock: str
    changes: dict = field(default_factory=dict)
    filter: str = "none"
    shots: int = 0
    max_gen_toks: int | None = None


CASES = (
    Case("arc_easy", "acc_norm", {"test": "arc_easy_test.jsonl"}, "arc/arc_easy.yaml", ARC_SPLITS),
    Case("arc_challenge", "acc_norm", {"test": "arc_challenge_test.jsonl"}, "arc/arc_challenge.yaml", ARC_SPLITS),
    Case("piqa", "acc_norm", {"validation": "piqa_validation.jsonl"}, "piqa/piqa.yaml", {"training_split": None}),
    Case("winogrande", "acc", {"validation": "winogrande_validation.jsonl"}, "winogrande/default.yaml", {"training_split": None}),
    *(Case(f"mmlu_{subject}", "acc", MMLU, f"mmlu/default/mmlu_{subject}.yaml", shots=5) for subject in SUBJECTS),
    Case(
        "gsm8k", "exact_match", {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"}, "gsm8k/gsm8k.yaml", filter="flexible-extract", shots=5,
        max_gen_toks=48,
    ),
)  # fmt: skip


def write_slices(shared: Path, folder: Path, items: int, long_items: int) -> Path:
    """The first `items` questions of each file; `long_items` of those with five examples (MMLU: of each subject).  Examples are kept whole."""
    folder.mkdir()
    for name in sorted({file for case in CASES for file in case.files.values()}):
        lines = (shared / "data/benchmarks" / name).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        groups = [[row for row in rows if row["subject"] == subject] for subject in SUBJECTS] if name.startswith("mmlu") else [rows]
        keep = len(rows) if name in ("mmlu_dev.jsonl", "gsm8k_train.jsonl") else long_items if name.startswith(("mmlu", "gsm8k")) else items
        chosen = [row for group in groups for row in group[:keep]]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return folder


def write_task(case: Case, data: Path, folder: Path) -> str:
    """The hand-written task file: its name differs from the stock one's, everything but the rows is included from that."""
    import lm_eval

    name, files = f"plain_{case.task}", {split: data / file for split, file in case.files.items()}
    if case.task.startswith("mmlu_"):  # a file of this subject alone for each split
        for split, file in list(files.items()):
            rows = [line for line in file.read_text(encoding="utf-8").split("\n") if line]
            own = [line for line in rows if json.loads(line)["subject"] == case.task.removeprefix("mmlu_")]
            files[split] = folder / f"{name}_{split}.jsonl"
            files[split].write_text("\n".join(own) + "\n", encoding="utf-8")
    stock = Path(lm_eval.__file__).parent / "tasks" / case.stock
    rows_of = {"dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}}}
    content = {"include": str(stock), "task": name, **ROWS_FROM_DISK, **rows_of, "num_fewshot": case.shots, **case.changes}
    if case.max_gen_toks:
        settings = yaml.safe_load(stock.read_text(encoding="utf-8"))["generation_kwargs"]
        content["generation_kwargs"] = {**settings, "max_gen_toks": case.max_gen_toks}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return name


def run_command(model: Path, data: Path, folder: Path) -> tuple[dict, dict[str, list[dict]]]:
    """`lm_eval run --model hf ...`: its results, and its samples by task."""
    (folder / "yaml").mkdir(parents=True)
    names = [write_task(case, data, folder / "yaml") for case in CASES]
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "1",
        "--tasks", *names, "--include_path", str(folder / "yaml"), "--log_samples", "--output_path", str(folder / "out"), "--seed", "1234",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text(encoding="utf-8"))
    samples = {}
    for name in names:
        lines = next((folder / "out").rglob(f"samples_{name}_*.jsonl")).read_text(encoding="utf-8").split("\n")
        samples[name] = [json.loads(line) for line in lines if line]
    return results["results"], samples


def run_ours(model: Path, case: Case, data: Path, root: Path) -> tuple[BenchmarkResult, list[Sample]]:
    """`evaluate` of the same task."""
    config = BenchmarkConfig(
        task=case.task, metric=case.metric, filter=case.filter, num_fewshot=case.shots, source="items", files=case.files, dtype="float32",
        max_gen_toks=case.max_gen_toks,
    )  # fmt: skip
    for folder in ("out", "work"):
        (root / folder).mkdir(parents=True)
    execution = Execution(device="cpu", evaluate_batch_size=1)
    harness.build(StageContext("evaluate[arm/x]", config, {"model": model, "data": data}, root / "out", root / "work", execution))
    return read_result(root / "out"), list(read_samples(root / "out"))


def assert_same(case: Case, result: BenchmarkResult, samples: list[Sample], theirs: dict, items: list[dict]) -> None:
    """Scores to the last bit, items one by one, log-likelihoods to the four decimals that are kept."""
    for measurement in result.measurements:
        assert measurement.value == theirs[f"{measurement.metric},{measurement.filter}"], case.task
        stderr = theirs[f"{measurement.metric}_stderr,{measurement.filter}"]
        assert (measurement.stderr if measurement.stderr is not None else "N/A") == stderr, case.task
    items = sorted((item for item in items if item["filter"] == case.filter), key=lambda item: item["doc_id"])
    assert len(samples) == len(items) > 0
    for sample, item in zip(samples, items, strict=True):
        for digest in ("doc_hash", "prompt_hash", "target_hash"):
            assert getattr(sample, digest) == item[digest], (case.task, sample.doc_id, digest)
        assert sample.score == float(item[case.metric]), (case.task, sample.doc_id)
        assert list(sample.responses) == [_answer(answer) for answers in item["resps"] for answer in answers], (case.task, sample.doc_id)


def _answer(answer):
    if isinstance(answer, str):
        return answer
    value, greedy = answer
    return [round(float(value), 4), str(greedy) == "True"]


def compare(model: Path, data: Path, root: Path) -> dict[str, BenchmarkResult]:
    """Run both on every case and compare; our results by task."""
    theirs, items = run_command(model, data, root / "command")
    ours = {}
    for case in CASES:
        result, samples = run_ours(model, case, data, root / case.task)
        assert_same(case, result, samples, theirs[f"plain_{case.task}"], items[f"plain_{case.task}"])
        ours[case.task] = result
        print(f"{case.task}: {case.metric} {result.value:.4f} over {result.num_items} items, as the command's")
    return ours


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_model_answers_as_in_the_plain_command(tmp_path, model_dir, shared_data):
    """Random weights and 512 positions: long prompts are cut on the left, and are cut alike."""
    compare(model_dir, write_slices(shared_data, tmp_path / "data", 12, 5), tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_smollm2_answers_as_in_the_plain_command_and_so_does_its_sparse_child(tmp_path, smollm2, shared_data):
    """The real model; then the model crafted from it, untrained: the same bytes in samples.jsonl."""
    from pesc.models.config import UpcycleConfig
    from pesc.models.upcycle import upcycle_directory

    data = write_slices(shared_data, tmp_path / "data", 10, 3)
    dense = compare(smollm2, data, tmp_path)
    assert any(result.num_correct for result in dense.values())
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    upcycle_directory(smollm2, sparse, UpcycleConfig(num_experts=8, top_k=2, adapter_dim=64))
    for case in CASES:
        result, _ = run_ours(sparse, case, data, tmp_path / "sparse-runs" / case.task)
        assert result.model.kind == "pesc"
        written = (tmp_path / "sparse-runs" / case.task / "out/samples.jsonl").read_bytes()
        assert written == (tmp_path / case.task / "out/samples.jsonl").read_bytes(), case.task
        print(f"{case.task}: the sparse model's {result.num_items} samples are the dense model's, byte for byte")
