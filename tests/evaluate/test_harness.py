"""The real lm-eval on a tiny random Llama: what is written, that it is the same each time, and what goes wrong in words."""

from __future__ import annotations

import json

import pytest

from pesc.errors import EvaluationError, ModelError
from pesc.evaluate import harness
from pesc.evaluate import journal as journal_module
from pesc.evaluate.journal import Answer, Journal, chunk_by_context
from pesc.evaluate.results import read_result, read_samples
from tests.evaluate.builders import QUESTIONS, build_model, choice_config, code_config, context


@pytest.fixture(scope="module")
def choice_run(tmp_path_factory, model_dir, data_dir):
    """One evaluation of the choice task: (its object directory, what it measured)."""
    ctx = context(tmp_path_factory.mktemp("run"), choice_config(), model_dir, data_dir)
    return ctx.out, harness.build(ctx)


def test_samples_account_for_the_score(choice_run):
    out, built = choice_run
    result, samples = read_result(out), list(read_samples(out))
    assert len(samples) == result.num_items == result.num_available == len(QUESTIONS)
    assert result.num_correct == sum(sample.correct for sample in samples)
    assert result.value == pytest.approx(result.num_correct / len(samples))
    assert built.metrics["items"] == len(samples)
    assert [sample.doc_id for sample in samples] == list(range(len(samples)))
    assert [sample.target for sample in samples] == ["ABCD".index(letter) for _, _, letter in QUESTIONS]
    assert not result.is_subset


def test_log_likelihoods_are_the_models_own(choice_run, model_dir):
    """Every number of samples.jsonl again, by the plain model: sum of log-probabilities of " option" after the question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), AutoTokenizer.from_pretrained(model_dir)
    for sample in read_samples(choice_run[0]):
        for choice, (value, _greedy) in zip(sample.choices, sample.responses, strict=True):
            prefix = tokenizer(sample.question, add_special_tokens=False).input_ids
            whole = tokenizer(f"{sample.question} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            expected = sum(logs[place - 1, whole[place]].item() for place in range(len(prefix), len(whole)))
            assert value == pytest.approx(expected, abs=2e-3)


def test_the_score_is_stock_simple_evaluates(choice_run, model_dir, tmp_path, data_dir):
    """lm-eval's own front end and model class, on the task files that this package generated."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from pesc.evaluate.task_index import load_tasks
    from pesc.evaluate.tasks import FOLDER

    load_tasks(choice_config(), data_dir, tmp_path)
    manager = TaskManager(include_path=[str(FOLDER), str(tmp_path)], include_defaults=False)
    stock = HFLM(pretrained=str(model_dir), device="cpu", dtype="float32", batch_size=3)
    found = lm_eval.simple_evaluate(model=stock, tasks=["pesc_openbookqa"], task_manager=manager)["results"]["pesc_openbookqa"]
    result = read_result(choice_run[0])
    for measurement in result.measurements:
        assert measurement.value == found[f"{measurement.metric},{measurement.filter}"]
        assert measurement.stderr == found[f"{measurement.metric}_stderr,{measurement.filter}"]


def test_two_runs_write_the_same_bytes(choice_run, tmp_path, model_dir, data_dir):
    ctx = context(tmp_path, choice_config(), model_dir, data_dir)
    harness.build(ctx)
    for name in ("results.json", "samples.jsonl"):
        assert (ctx.out / name).read_bytes() == (choice_run[0] / name).read_bytes()


def test_nothing_of_time_or_place_is_written(choice_run, model_dir, data_dir):
    text = (choice_run[0] / "results.json").read_text() + (choice_run[0] / "samples.jsonl").read_text()
    for word in (str(model_dir), str(data_dir), str(choice_run[0]), "/tmp", "date", "host", "seconds"):
        assert word not in text


def test_an_interrupted_run_goes_on_and_ends_the_same(choice_run, tmp_path, model_dir, data_dir, monkeypatch):
    def stop(progress):
        if progress.done >= 8:
            raise KeyboardInterrupt

    monkeypatch.setitem(journal_module.CONTEXTS, "loglikelihood", 2)
    ctx = context(tmp_path / "first", choice_config(), model_dir, data_dir, stop)
    with pytest.raises(KeyboardInterrupt):
        harness.build(ctx)
    lines = (ctx.work / "answers.jsonl").read_text().splitlines()
    assert lines
    with (ctx.work / "answers.jsonl").open("a") as file:
        file.write('{"key": "torn')  # as a killed process leaves it
    asked = []
    monkeypatch.setattr(Journal, "put", lambda self, key, answers, put=Journal.put: (asked.append(key), put(self, key, answers))[1])
    (ctx.out).rmdir()
    again = context(tmp_path / "first", choice_config(), model_dir, data_dir)
    harness.build(again)
    assert len(asked) == len(QUESTIONS) // 2 - len(lines)
    for name in ("results.json", "samples.jsonl"):
        assert (again.out / name).read_bytes() == (choice_run[0] / name).read_bytes()


def test_progress_reaches_the_total(tmp_path, model_dir, data_dir, monkeypatch):
    monkeypatch.setitem(journal_module.CONTEXTS, "loglikelihood", 2)
    seen = []
    harness.build(context(tmp_path, choice_config(limit=3), model_dir, data_dir, seen.append))
    assert [(p.done, p.total) for p in seen] == [(0, 12), (8, 12), (12, 12)]
    assert read_result(tmp_path / "out").is_subset


def test_the_crafted_model_scores_as_the_dense_one(choice_run, tmp_path, model_dir, data_dir):
    """Zero up-projections: the sparse model is the dense model, so every log-likelihood is the same."""
    from pesc.models.config import UpcycleConfig
    from pesc.models.upcycle import upcycle_directory

    sparse = tmp_path / "sparse"
    sparse.mkdir()
    upcycle_directory(model_dir, sparse, UpcycleConfig(num_experts=4, top_k=2, adapter_dim=8, dtype="float32"))
    ctx = context(tmp_path / "run", choice_config(), sparse, data_dir)
    harness.build(ctx)
    assert (ctx.out / "samples.jsonl").read_bytes() == (choice_run[0] / "samples.jsonl").read_bytes()
    facts = read_result(ctx.out).model
    assert (facts.kind, facts.pesc["num_experts"]) == ("pesc", 4)
    assert facts.parameters > read_result(choice_run[0]).model.parameters


def test_generated_code_is_run_and_scored(tmp_path, model_dir, data_dir):
    ctx = context(tmp_path, code_config(), model_dir, data_dir)
    harness.build(ctx)
    result, samples = read_result(ctx.out), list(read_samples(ctx.out))
    assert (result.num_items, result.metric, result.filter, result.value) == (2, "pass@1", "sandbox", 0.0)
    assert result.generation["max_gen_toks"] == 12
    assert all(sample.outcome[0][0]["status"] in {"failed", "passed"} for sample in samples)
    assert all(isinstance(sample.responses[0], str) and not {"\ndef", "\nclass"} & set(sample.responses) for sample in samples)


def test_a_model_that_knows_the_answers_scores_one(tmp_path, model_dir, data_dir, monkeypatch):
    """The whole path from generated text to pass@1, with the solutions in the model's mouth."""
    from pesc.evaluate.language_model import JournaledLM
    from tests.evaluate.builders import PROBLEMS

    solutions = {problem["prompt"]: problem["canonical_solution"] for problem in PROBLEMS}
    monkeypatch.setattr(JournaledLM, "generate_until", lambda self, requests: [solutions[request.args[0]] for request in requests])
    ctx = context(tmp_path, code_config(), model_dir, data_dir)
    assert harness.build(ctx).metrics["value"] == 1.0


def test_the_chat_template_is_applied_and_its_digest_recorded(choice_run, tmp_path, model_dir, data_dir):
    ctx = context(tmp_path, choice_config(apply_chat_template=True), model_dir, data_dir)
    harness.build(ctx)
    plain, chatted = read_result(choice_run[0]), read_result(ctx.out)
    assert len(chatted.chat_template_sha256) == 64
    assert plain.chat_template_sha256 is None
    assert plain.task_hash != chatted.task_hash


def test_a_model_without_chat_template_is_told(tmp_path, data_dir):
    model = build_model(tmp_path / "model", chat_template=False)
    with pytest.raises(EvaluationError, match="no chat template"):
        harness.build(context(tmp_path / "run", choice_config(apply_chat_template=True), model, data_dir))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "f1"}, "does not measure 'f1'; .* acc, acc_norm"),
        ({"files": {"test": "absent.jsonl"}}, r"has no file 'absent\.jsonl'"),
        ({"files": {"train": "choices.jsonl"}}, "evaluated on its split 'test'"),
        ({"files": {}}, "no files in it"),
        ({"source": None, "files": {}}, "reads its items from files"),
        ({"source": None}, "names files but no source"),
        ({"num_fewshot": 2}, "always asked without examples"),
        ({"files": {"test": "problems.jsonl.gz"}}, "no 'question' field"),
        ({"filter": "strict-match"}, "filters none"),
    ],
)
def test_settings_that_do_not_fit_are_sentences(tmp_path, model_dir, data_dir, changes, message):
    config = choice_config(**changes)
    with pytest.raises(EvaluationError, match=message):
        harness.build(context(tmp_path, config, model_dir, data_dir if config.source else None))


def test_a_broken_model_is_a_sentence(tmp_path, data_dir):
    (tmp_path / "model").mkdir()
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        harness.build(context(tmp_path / "run", choice_config(), tmp_path / "model", data_dir))


def test_a_gpu_that_is_not_there_is_a_sentence(tmp_path, model_dir, data_dir, monkeypatch):
    import dataclasses

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ctx = context(tmp_path, choice_config(), model_dir, data_dir)
    ctx = dataclasses.replace(ctx, execution=ctx.execution.model_copy(update={"device": "cuda"}))
    with pytest.raises(ModelError, match="no GPU"):
        harness.build(ctx)


def test_offline_is_in_force_and_undone(monkeypatch):
    import os

    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with harness.offline(True):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        with pytest.raises(Exception, match="offline"):
            huggingface_hub.HfApi().model_info("some/model")
    assert "HF_HUB_OFFLINE" not in os.environ
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


class _Request:
    def __init__(self, *args):
        self.args = args


def test_chunks_keep_contexts_together_and_lose_nothing():
    requests = [_Request("c" * (number % 5), option) for number in range(20) for option in "ABCD"]
    chunks = chunk_by_context(requests, size=2)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(80))
    contexts = [{requests[index].args[0] for index in chunk} for chunk in chunks]
    assert all(len(found) <= 2 for found in contexts)
    assert sum(len(found) for found in contexts) == 5


def test_journal_forgets_the_torn_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path).put("a", [Answer([-1.5, True])])
    with path.open("a") as file:
        file.write('{"key": "b", "ans')
    journal = Journal(path)
    assert (journal.get("a"), journal.get("b")) == ([Answer([-1.5, True])], None)
    journal.put("c", [Answer("text", truncated=True)])
    assert Journal(path).get("c") == [Answer("text", truncated=True)]
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.put("d", [Answer([float("nan"), False])])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines() if line.endswith("}")] == ["a", "c"]


@pytest.mark.parametrize("config", [choice_config, code_config], ids=["scored", "generated"])
def test_logits_that_are_no_numbers_are_a_sentence(tmp_path, model_dir, data_dir, config):
    """One NaN in one weight: no score, no file, nothing in the journal that a later run would believe."""
    damaged = _damage(model_dir, tmp_path / "model")
    ctx = context(tmp_path / "run", config(), damaged, data_dir)
    with pytest.raises(EvaluationError, match=r"not finite numbers \(task pesc_\w+, at or after item \d, dtype float32\)"):
        harness.build(ctx)
    assert list(ctx.out.iterdir()) == []
    assert not (ctx.work / "answers.jsonl").exists()


def _damage(model, folder):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_unfinished_generations_and_cut_prompts_are_counted(tmp_path, model_dir, data_dir):
    """Twelve tokens of a random model end no function; 510 of 512 positions leave no room for the prompt."""
    ctx = context(tmp_path / "short", code_config(), model_dir, data_dir)
    harness.build(ctx)
    result, samples = read_result(ctx.out), list(read_samples(ctx.out))
    assert result.num_truncated == sum(sample.truncated for sample in samples) == 2
    assert result.num_cut_prompts == 0
    ctx = context(tmp_path / "long", code_config(max_gen_toks=509), model_dir, data_dir)
    harness.build(ctx)
    result, samples = read_result(ctx.out), list(read_samples(ctx.out))
    assert result.num_cut_prompts == sum(sample.prompt_cut for sample in samples) == 2


def test_a_long_question_is_scored_without_its_beginning_and_marked(tmp_path, model_dir):
    rows = [
        {"question": question, "options": "A. red\nB. blue", "answer": "A. red"}
        for question in ("Which colour?", "word " * 600 + "Which colour?")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ctx = context(tmp_path / "run", choice_config(files={"test": "rows.jsonl"}), model_dir, tmp_path)
    harness.build(ctx)
    assert [sample.prompt_cut for sample in read_samples(ctx.out)] == [False, True]
    assert read_result(ctx.out).num_cut_prompts == 1


def test_a_batch_that_does_not_fit_is_halved(choice_run, tmp_path, model_dir, data_dir, monkeypatch):
    """A GPU with room for three rows: the same answers as before."""
    import torch

    from pesc.evaluate.language_model import JournaledLM

    seen = []

    def call(self, tokens, *rest, _call=JournaledLM._model_call):
        seen.append(tokens.size(0))
        if tokens.size(0) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _call(self, tokens, *rest)

    monkeypatch.setattr(JournaledLM, "_model_call", call)
    ctx = context(tmp_path, choice_config(), model_dir, data_dir, batch_size="auto")
    harness.build(ctx)
    assert seen[:2] == [8, 4]
    assert max(seen[2:]) <= 3
    assert (ctx.out / "samples.jsonl").read_bytes() == (choice_run[0] / "samples.jsonl").read_bytes()


def test_one_row_that_does_not_fit_is_a_sentence(tmp_path, model_dir, data_dir, monkeypatch):
    import torch

    from pesc.evaluate.language_model import JournaledLM

    def refuse(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(JournaledLM, "_model_call", refuse)
    with pytest.raises(EvaluationError, match="One request of task pesc_openbookqa does not fit"):
        harness.build(context(tmp_path, choice_config(), model_dir, data_dir))


def test_without_a_metric_it_is_acc_norm(choice_run, tmp_path, model_dir, data_dir):
    ctx = context(tmp_path, choice_config(metric=None), model_dir, data_dir)
    harness.build(ctx)
    assert read_result(ctx.out).metric == "acc_norm"


def test_formulas_get_more_time_than_their_alarm(monkeypatch):
    """A comparison that takes longer than its limit because the machine is busy is not cut off."""
    import signal
    import time

    def compare(seconds):
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("cut off"))
        signal.alarm(1)
        time.sleep(seconds)
        signal.alarm(0)

    before = signal.alarm
    with harness.patient_mathematics():
        compare(1.2)
    assert signal.alarm is before
    monkeypatch.setattr(harness, "PATIENCE_SECONDS", 1)
    with harness.patient_mathematics(), pytest.raises(BaseException, match="cut off"):
        compare(30)  # one without an end still ends
