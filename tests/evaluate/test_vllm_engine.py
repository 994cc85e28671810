"""The real vLLM as the engine of a benchmark: item by item the answers of the transformers engine, and NaN is seen.

The first layers of SmolLM2 in float32, on real questions.  The two add in other orders, so that log-likelihoods agree to `TIE`, and an
item may turn only where two choices are nearer than that, a generation only where two words are.
"""

from __future__ import annotations

import dataclasses
import os
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from pesc.errors import EvaluationError
from pesc.evaluate import harness
from pesc.evaluate.config import BenchmarkConfig
from pesc.evaluate.results import read_result, read_samples
from pesc.stage import Execution, StageContext
from tests.data.conftest import smollm2  # noqa: F401  (fixture)
from tests.evaluate.test_harness import _damage
from tests.serve.builders import save_slice, vllm_python, wait_until_gone

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

LAYERS, TIE = 6, 2e-3
SCORED = {"task": "arc_easy", "metric": "acc_norm", "files": {"test": "arc_easy_test.jsonl"}}
GENERATED = {
    "task": "gsm8k", "metric": "exact_match", "filter": "flexible-extract", "num_fewshot": 0, "max_gen_toks": 24,
    "files": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
}  # fmt: skip
ITEMS = {"arc_easy": 40, "gsm8k": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory, smollm2):  # noqa: F811
    os.environ["PESC_VLLM"] = vllm_python()
    yield save_slice(smollm2, tmp_path_factory.mktemp("model"), LAYERS)
    os.environ.pop("PESC_VLLM")


@pytest.fixture(scope="module")
def data(shared_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in {*SCORED["files"].values(), *GENERATED["files"].values()}:
        (folder / name).symlink_to(shared_data / "data/benchmarks" / name)
    return folder


def run(model: Path, settings: dict, data: Path, root: Path, engine: str):
    """The result, the samples and the manifest's part of `evaluate`."""
    config = BenchmarkConfig(**settings, limit=ITEMS[settings["task"]], source="items", dtype="float32", engine=engine)
    for folder in ("out", "work"):
        (root / folder).mkdir(parents=True)
    execution = Execution(evaluate_batch_size=1 if engine == "transformers" else "auto")
    ctx = StageContext("evaluate[arm/x]", config, {"model": model, "data": data}, root / "out", root / "work", execution)
    built = harness.build(dataclasses.replace(ctx, execution=execution))
    return read_result(root / "out"), list(read_samples(root / "out")), built


@pytest.fixture(scope="module")
def scored(place, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("scored")
    return {engine: run(place / "sparse", SCORED, data, root / engine, engine) for engine in ("transformers", "vllm")}


def test_the_same_choices_are_the_likeliest(scored):
    (expected, theirs, _), (found, ours, built) = scored["transformers"], scored["vllm"]
    worst, turned = 0.0, []
    for one, other in zip(theirs, ours, strict=True):
        assert (one.doc_hash, one.prompt_hash) == (other.doc_hash, other.prompt_hash)
        differences = [abs(a[0] - b[0]) for a, b in zip(one.responses, other.responses, strict=True)]
        worst = max(worst, *differences)
        assert max(differences) < TIE, one.doc_id
        if (one.score, [a[1] for a in one.responses]) != (other.score, [b[1] for b in other.responses]):
            turned.append((one.doc_id, one.responses, other.responses))
    print(f"{len(ours)} items, largest difference of a log-likelihood {worst:.1e}; {expected.value} and {found.value}; turned: {turned}")
    assert len(ours) == ITEMS["arc_easy"]
    assert turned == []
    assert found.model == expected.model
    assert (found.task_hash, found.num_cut_prompts) == (expected.task_hash, expected.num_cut_prompts)
    assert found.engine_version == built.provenance["engine"]
    assert found.engine_version.startswith("vllm")


def test_the_same_words_are_generated(place, data, tmp_path):
    (expected, theirs, _), (found, ours, _) = (
        run(place / "dense", GENERATED, data, tmp_path / engine, engine) for engine in ("transformers", "vllm")
    )
    unequal = [
        (one.doc_id, one.responses, other.responses) for one, other in zip(theirs, ours, strict=True) if one.responses != other.responses
    ]
    print(f"{len(ours) - len(unequal)} of {len(ours)} generations equal, {found.num_truncated} truncated; others: {unequal}")
    for doc_id, one, other in unequal:
        assert _near_tie(place / "dense", theirs[doc_id].question, one[0], other[0]), doc_id
    assert len(unequal) <= 1
    assert (found.num_items, found.num_truncated) == (expected.num_items, expected.num_truncated)
    assert found.num_truncated > 0


def _near_tie(model: Path, prompt: str, one: str, other: str) -> bool:
    """Whether the two texts part at a word for which the model has two candidates, as likely as each other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    shared = [
        pair[0]
        for pair in takewhile(lambda pair: pair[0] == pair[1], zip(tokenizer(one).input_ids, tokenizer(other).input_ids, strict=False))
    ]
    logits = network(torch.tensor([tokenizer(prompt).input_ids + shared])).logits[0, -1]
    best = logits.topk(2).values
    return bool(best[0] - best[1] < TIE)


def test_a_model_whose_numbers_are_none_is_refused_and_nothing_is_left(place, data, tmp_path, monkeypatch):
    monkeypatch.setenv("PESC_TEST_MARK", tmp_path.name)
    damaged = _damage(place / "dense", tmp_path / "damaged")
    for settings in (SCORED, GENERATED):
        with pytest.raises(EvaluationError, match="logits are not finite numbers"):
            run(damaged, settings, data, tmp_path / settings["task"], "vllm")
    monkeypatch.delenv("PESC_TEST_MARK")
    assert wait_until_gone(f"PESC_TEST_MARK={tmp_path.name}", 30) == []
