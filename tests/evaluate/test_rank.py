"""Real torchrun processes that share a benchmark: the same bytes for every number of them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pesc.errors import EvaluationError, RecipeError
from pesc.evaluate import harness
from pesc.evaluate import journal as journal_module
from pesc.evaluate.journal import Journal
from pesc.stage import Execution
from tests.evaluate.builders import choice_config, code_config, context
from tests.evaluate.test_harness import _damage


def _context(root, config, model, data, processes, on_progress=None):
    ctx = context(root, config, model, data, on_progress)
    return dataclasses.replace(ctx, execution=Execution(device="cpu", evaluate_batch_size=2, evaluate_processes=processes))


@pytest.mark.slow
@pytest.mark.parametrize("config", [choice_config, code_config], ids=["scored", "generated"])
def test_processes_share_the_answers_and_not_the_bytes(tmp_path, model_dir, data_dir, config, monkeypatch):
    """Chunks of many contexts would all be the first rank's: 70 questions are two chunks, one each."""
    data = _many_rows(tmp_path / "data", data_dir)
    alone = _context(tmp_path / "alone", config(), model_dir, data, 1)
    harness.build(alone)
    together = _context(tmp_path / "together", config(), model_dir, data, 2)
    harness.build(together)
    for name in ("results.json", "samples.jsonl"):
        assert (together.out / name).read_bytes() == (alone.out / name).read_bytes()
    shares = [(together.work / f"answers-{rank}.jsonl").read_text().count("\n") for rank in (0, 1)]
    assert sum(shares) == (alone.work / "answers.jsonl").read_text().count("\n") >= 2
    assert min(shares) >= 1
    assert not (together.work / "answers.jsonl").exists(), "nothing was left to the stage"


def _many_rows(folder, data_dir):
    import gzip

    folder.mkdir()
    rows = (data_dir / "choices.jsonl").read_text(encoding="utf-8").splitlines()
    numbered = [row.replace('{"question": "', f'{{"question": "Number {number}. ', 1) for number in range(12) for row in rows]
    (folder / "choices.jsonl").write_text("\n".join(numbered[:70]) + "\n", encoding="utf-8")
    problem = json.loads(gzip.decompress((data_dir / "problems.jsonl.gz").read_bytes()).decode().splitlines()[0])
    problems = [{**problem, "prompt": f"# {number}\n{problem['prompt']}"} for number in range(34)]
    (folder / "problems.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in problems).encode()))
    return folder


@pytest.mark.slow
def test_the_error_of_a_process_is_the_stages(tmp_path, model_dir, data_dir):
    damaged = _damage(model_dir, tmp_path / "model")
    with pytest.raises(EvaluationError, match="not finite numbers"):
        harness.build(_context(tmp_path / "run", choice_config(), damaged, data_dir, 2))


def test_more_processes_than_gpus_is_a_sentence(tmp_path, monkeypatch, model_dir, data_dir):
    from pesc.evaluate.rank import answer_in_processes

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    ctx = _context(tmp_path, choice_config(), model_dir, data_dir, 4)
    ctx = dataclasses.replace(ctx, execution=ctx.execution.model_copy(update={"device": "cuda"}))
    with pytest.raises(RecipeError, match="evaluate_processes is 4, but torch sees 1 GPUs"):
        answer_in_processes(ctx)


def test_shares_are_disjoint_and_whole(tmp_path, model_dir, data_dir, monkeypatch):
    """In this process: three ranks in turn, then the stage asks the model nothing."""
    from pesc.evaluate.rank import answer_share

    monkeypatch.setitem(journal_module.CONTEXTS, "loglikelihood", 1)
    ctx = context(tmp_path, choice_config(), model_dir, data_dir)
    for rank in range(3):
        answer_share(ctx, rank, 3)
    keys = [json.loads(line)["key"] for path in sorted(ctx.work.glob("answers-*.jsonl")) for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 6
    monkeypatch.setattr(Journal, "put", lambda self, key, answers: pytest.fail("asked again"))
    assert harness.build(ctx).metrics["items"] == 6
