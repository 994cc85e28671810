"""The builder: what it refuses before any rank starts, what it makes of their end, and real runs under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from pesc.errors import DataError, InterruptedStageError, PescError, PreemptedError, RecipeError, TrainingFailedError
from pesc.launch.supervise import Outcome, child_environment
from pesc.models.identity import model_digest
from pesc.stage import Execution
from pesc.train import checkpoints, order, stage
from pesc.train.job import Status, record_error, write_status
from tests.train import tiny

# ---- before the ranks


@pytest.fixture
def context(tmp_path, blocks_dir):
    return tiny.make_context(tmp_path, tmp_path / "model", blocks_dir, tiny.settings())


@pytest.mark.parametrize(("variable", "gpus"), [("", 0), ("-1", 0), ("0", 1), ("0,1,3", 3), ("GPU-8f2c,MIG-1", 2)])
def test_visible_gpus_are_counted_without_torch(variable, gpus):
    assert stage.count_gpus({"CUDA_VISIBLE_DEVICES": variable}) == gpus


def test_ranks_are_gpus_or_one(monkeypatch):
    monkeypatch.setattr(stage, "count_gpus", lambda _environment: 4)
    assert stage.choose_processes(Execution()) == ("cuda", 4)
    assert stage.choose_processes(Execution(num_processes=2)) == ("cuda", 2)
    assert stage.choose_processes(Execution(device="cpu", num_processes=3)) == ("cpu", 3)
    with pytest.raises(RecipeError, match="num_processes is 8, but this machine shows 4 GPUs"):
        stage.choose_processes(Execution(num_processes=8))
    monkeypatch.setattr(stage, "count_gpus", lambda _environment: 0)
    assert stage.choose_processes(Execution()) == ("cpu", 1)
    with pytest.raises(RecipeError, match=r"execution\.device is cuda, but this machine shows no NVIDIA GPU"):
        stage.choose_processes(Execution(device="cuda"))


@pytest.mark.parametrize(("batch", "near"), [(10, "8 or 16"), (6, "8"), (17, "16 or 24")])
def test_a_batch_that_cannot_be_shared_is_refused_with_sizes_that_can(batch, near):
    config = tiny.settings(global_batch_size=batch * 2, micro_batch_size=2)
    with pytest.raises(
        RecipeError,
        match=rf"global_batch_size is {batch * 2}, which 8 ranks .* make it {' or '.join(str(int(n) * 2) for n in near.split(' or '))},",
    ):
        order.check_batch(config, 8)
    order.check_batch(tiny.settings(global_batch_size=16, micro_batch_size=2), 8)


def test_blocks_are_looked_at_before_any_rank_starts(tmp_path):
    (tmp_path / "blocks").mkdir()
    ctx = tiny.make_context(tmp_path, tmp_path / "model", tmp_path / "blocks", tiny.settings())
    with pytest.raises(DataError, match=r"lacks the packed blocks blocks-00000\.arrow; run tokenize again"):
        stage.build(ctx)


def test_a_checkpoint_of_another_layout_is_refused_before_any_rank_starts(context):
    path = checkpoints.checkpoint_path(context.work / "checkpoints", 2)
    path.mkdir(parents=True)
    checkpoints.mark_complete(path, checkpoints.Layout(4, 3))
    with pytest.raises(TrainingFailedError, match="written with 4 ranks and ZeRO 3, which 2 ranks and ZeRO 2 cannot continue"):
        stage.build(context)
    assert path.exists()


def test_the_stage_never_imports_torch():
    code = "import sys, pesc.train.stage; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], env=child_environment(), check=False).returncode == 0


# ---- what the ranks left


def conclude(ctx, outcome=Outcome(1, "")):
    return stage._conclude(ctx, stage._make_job(ctx, "cpu"), outcome, ctx.work / "log.txt")


def test_a_saved_stop_is_told_from_a_failure_although_the_exit_code_is_the_same(context):
    write_status(context.work, Status("interrupted", 3, "signal", {}))
    with pytest.raises(PreemptedError, match=r"stopped after step 3 of 4; its checkpoint is kept"):
        conclude(context)
    write_status(context.work, Status("interrupted", 3, "stop file", {}))
    with pytest.raises(InterruptedStageError, match=r"asked by .*STOP"):
        conclude(context)


def test_running_out_of_memory_says_what_to_change(context):
    record_error(context.work / "errors", 1, RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"))
    ctx = replace(context, config=tiny.settings(micro_batch_size=2))
    with pytest.raises(TrainingFailedError) as caught:
        conclude(ctx)
    sentence = str(caught.value)
    assert "train[tiny] ran out of memory on rank 1 (CUDA out of memory. Tried to allocate 2.00 GiB.)" in sentence
    assert (
        "lower train.micro_batch_size (now 2), or set execution.gradient_checkpointing=full, or raise execution.zero_stage (now 2)"
        in sentence
    )


def test_advice_that_is_already_followed_is_not_given(context):
    record_error(context.work / "errors", 0, MemoryError("can't allocate memory"))
    execution = context.execution.model_copy(update={"gradient_checkpointing": "full", "zero_stage": 3})
    with pytest.raises(TrainingFailedError) as caught:
        conclude(replace(context, execution=execution))
    assert "micro_batch_size" not in str(caught.value)
    assert "zero_stage" not in str(caught.value)
    assert "shorter tokenize context" in str(caught.value)


def test_a_defect_comes_with_its_trace(context):
    record_error(context.work / "errors", 0, ZeroDivisionError("a defect"))
    with pytest.raises(TrainingFailedError, match=r"train\[tiny\] failed on rank 0; the whole log is .*log\.txt"):
        conclude(context)


@pytest.mark.parametrize(
    ("outcome", "kind", "sentence"),
    [
        (
            Outcome(1, "exitcode : -9 (pid: 7)\ntraceback : Signal 9 (SIGKILL) received by PID 7"),
            TrainingFailedError,
            r"was killed \(SIGKILL\), most often because",
        ),
        (Outcome(-15, ""), PreemptedError, "stopped from outside"),
        (Outcome(1, "SignalException: Process 7 got signal: SIGTERM"), PreemptedError, "stopped from outside"),
        (Outcome(1, "No module named torch"), PescError, "No module named torch"),
    ],
)
def test_an_end_without_a_word_is_explained(context, outcome, kind, sentence):
    with pytest.raises(kind, match=sentence):
        conclude(context, outcome)


def test_a_rank_that_lost_its_peer_does_not_hide_what_ended_the_peer(context):
    record_error(context.work / "errors", 0, RuntimeError("gloo: Connection closed by peer [127.0.0.1]:22719"))
    with pytest.raises(TrainingFailedError, match=r"was killed \(SIGKILL\)"):
        conclude(context, Outcome(1, "traceback : Signal 9 (SIGKILL) received by PID 7"))


def test_a_kept_checkpoint_is_mentioned(context):
    path = checkpoints.checkpoint_path(context.work / "checkpoints", 2)
    path.mkdir(parents=True)
    checkpoints.mark_complete(path, checkpoints.Layout(2, 2))
    with pytest.raises(TrainingFailedError, match="The checkpoint at step 2 is kept"):
        conclude(context, Outcome(1, "Signal 9 (SIGKILL)"))


# ---- a real run: two ranks, gloo, ZeRO-2


@pytest.fixture(scope="module")
def run(tmp_path_factory, sparse_dir, blocks_dir):
    """Two real ranks; no dropout, so that the first step can be computed in another way."""
    progress = []
    config = tiny.settings(lora={"rank": 4, "alpha": 8.0, "dropout": 0.0})
    ctx = tiny.make_context(tmp_path_factory.mktemp("run"), sparse_dir, blocks_dir, config, on_progress=progress.append)
    return ctx, stage.build(ctx), progress


def history_of(ctx):
    return [json.loads(line) for line in (ctx.out / "history.jsonl").read_text().splitlines()]


def test_the_output_is_what_the_merge_reads(run, sparse_dir):
    from safetensors.torch import load_file

    ctx, _, _ = run
    assert sorted(str(path.relative_to(ctx.out)) for path in ctx.out.rglob("*") if path.is_file()) == [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "bank.safetensors", "history.jsonl", "training.json",
    ]  # fmt: skip
    before, after = load_file(sparse_dir / "model.safetensors"), load_file(ctx.out / "bank.safetensors")
    names = {f"model.layers.{layer}.mlp.{part}" for layer in range(2) for part in ("adapters.down", "adapters.up", "router.weight")}
    assert set(after) == names
    for name in names:
        assert after[name].shape == before[name].shape
        assert not after[name].equal(before[name].float()), f"{name} was not trained"


def test_the_adapter_loads_with_stock_peft(run, dense_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx, _, _ = run
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense_dir), ctx.out / "adapter")
    lora = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    assert len(lora) == 28
    assert all(tensor.abs().max() > 0 for tensor in lora.values()), "lora_B must have left zero"


def test_the_bytes_tell_nothing_of_place_and_time(run):
    ctx, _, _ = run
    for path in ctx.out.rglob("*.json*"):
        text = path.read_text()
        assert str(ctx.out.parent) not in text
        assert "seconds" not in text
        assert "_version" not in text


def test_the_record_is_complete(run):
    ctx, _, _ = run
    record = json.loads((ctx.out / "training.json").read_text())
    assert record["config"] == ctx.config.model_dump(mode="json")
    assert {row["group"]: row["tensors"] for row in record["trainable"]} == {"lora": 28, "bank": 4, "router": 2}
    lines = history_of(ctx)
    assert record["facts"] == {
        "steps": 4,
        "tokens": sum(line["tokens"] for line in lines),
        "loss_first": lines[0]["loss"],
        "loss_last": lines[3]["loss"],
        "model_digest": model_digest(ctx.inputs["model"]),
    }
    assert [(line["step"], line["lr"]) for line in lines] == [(1, 5e-4), (2, 1e-3), (3, 1e-3), (4, 1e-3)]
    assert all(len(line["experts"]["entropy"]) == 2 and line["grad_norm"] > 0 for line in lines)


def test_measurements_and_progress_reach_the_caller(run):
    ctx, result, progress = run
    assert result.metrics["world_size"] == 2
    assert result.metrics["peak_memory_bytes"] > 10**8
    assert result.metrics["tokens_per_second"] > 0
    assert "torch AdamW" in result.provenance["optimizer_states"]
    assert [p.done for p in progress if p.message == "training"] == [1, 2, 3, 4]
    assert progress[-1].total == 4
    assert progress[-1].fields["loss"] == pytest.approx(history_of(ctx)[-1]["loss"])


def test_the_first_loss_is_plain_transformers_loss_over_all_tokens(run, sparse_dir, blocks_dir):
    """Every packed row alone, one mean over the supervised tokens of the whole step, whatever ranks and micro-batches did."""
    import torch
    from transformers import AutoModelForCausalLM

    import pesc.models
    from pesc.train.blocks import PackedBlocks
    from pesc.train.order import BlockOrder

    ctx, _, _ = run
    pesc.models.register()
    model = AutoModelForCausalLM.from_pretrained(sparse_dir, dtype=torch.float32).eval()
    blocks, order = PackedBlocks(blocks_dir), BlockOrder(23, ctx.config.seed)
    total, supervised, read = 0.0, 0, 0
    for position in range(4):
        block = {name: torch.from_numpy(array) for name, array in blocks[order.block_at(position)].items()}
        read += len(block["labels"])
        starts = [*(block["position_ids"] == 0).nonzero().flatten().tolist(), len(block["labels"])]
        for begin, end in pairwise(starts):
            labels = block["labels"][begin:end][None]
            count = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                total += model(input_ids=block["input_ids"][begin:end][None], labels=labels).loss.item() * count
            supervised += count
    first = history_of(ctx)[0]
    assert first["loss"] == pytest.approx(total / supervised, rel=1e-5)
    assert first["tokens"] == read


def test_what_the_libraries_printed_is_in_the_log_and_nowhere_else(run):
    ctx, _, progress = run
    assert "Loading weights" in (ctx.work / "log.txt").read_text()
    assert {p.message for p in progress} == {"loading the model", "training"}
