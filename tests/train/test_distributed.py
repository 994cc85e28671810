"""Real ranks under torchrun: killed and resumed, stopped, sharded in other ways, and the dense control."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pesc.errors import InterruptedStageError, ModelError, PreemptedError, TrainingFailedError
from pesc.launch import supervise
from pesc.train import checkpoints
from pesc.train.stage import build
from tests.launch.test_supervise import alive, wait_for
from tests.train import tiny

pytestmark = pytest.mark.slow

QLORA = {
    "quantization": "nf4",
    "compute_dtype": "bfloat16",
    "optimizer": "paged_adamw_8bit",
    "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.2},
}
EXACT = {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.2}, "learning_rate": 1e-3}
STEPS = 6
SAVING = {"save_every_steps": 2}


def train(folder, model, blocks, changes, execution=None, on_progress=lambda _p: None):
    ctx = tiny.make_context(folder, model, blocks, tiny.settings(max_steps=STEPS, **changes), execution, on_progress)
    build(ctx)
    return ctx


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def history(ctx) -> list[dict]:
    return [json.loads(line) for line in (ctx.out / "history.jsonl").read_text().splitlines()]


def tensors(ctx) -> dict:
    from safetensors.torch import load_file

    bank = ctx.out / "bank.safetensors"
    return {**load_file(ctx.out / "adapter" / "adapter_model.safetensors"), **(load_file(bank) if bank.exists() else {})}


def rank_pids(work: Path) -> list[int]:
    return [int(path.name) for path in (work / "pids").iterdir()]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sparse_dir, blocks_dir):
    """NF4, bf16, 8-bit optimizer states, dropout, ZeRO-2, two ranks."""
    return train(tmp_path_factory.mktemp("whole"), sparse_dir, blocks_dir, QLORA, SAVING)


@pytest.fixture(scope="module")
def exact(tmp_path_factory, sparse_dir, blocks_dir):
    """fp32 and torch's AdamW, so that runs which differ in the order of sums stay close."""
    return train(tmp_path_factory.mktemp("exact"), sparse_dir, blocks_dir, EXACT)


def assert_same_bytes(ctx, other):
    assert files(ctx.out) == files(other.out)
    assert [name for name in files(ctx.out) if not filecmp.cmp(ctx.out / name, other.out / name, shallow=False)] == []


def test_qlora_of_the_sparse_model_learns_and_keeps_two_checkpoints(uninterrupted):
    losses = [line["loss"] for line in history(uninterrupted)]
    assert losses[-1] < losses[0]
    kept = checkpoints.find_complete(uninterrupted.work / "checkpoints")
    assert [checkpoint.step for checkpoint in kept] == [4, 6]
    assert kept[0].layout == checkpoints.Layout(2, 2)
    assert all(tensor.abs().max() > 0 for tensor in tensors(uninterrupted).values())


def test_a_killed_run_resumes_and_ends_with_the_bytes_of_one_never_killed(uninterrupted, tmp_path, sparse_dir, blocks_dir):
    """SIGKILL of a rank in step 4, after the checkpoint of step 2, and a half-written checkpoint in the way."""

    def kill(progress):
        if progress.message == "training" and progress.done == 3:
            os.kill(rank_pids(tmp_path / "work")[1], signal.SIGKILL)

    with pytest.raises(TrainingFailedError, match=r"killed \(SIGKILL\).*The checkpoint at step 2 is kept"):
        train(tmp_path, sparse_dir, blocks_dir, QLORA, SAVING, kill)
    half = checkpoints.checkpoint_path(tmp_path / "work" / "checkpoints", 5)
    half.mkdir()
    seen = []
    ctx = train(tmp_path, sparse_dir, blocks_dir, QLORA, SAVING, lambda p: seen.append((p.message, p.done)))
    assert [done for message, done in seen if message == "training"] == [3, 4, 5, 6]
    assert not half.exists()
    assert_same_bytes(ctx, uninterrupted)


def test_sigterm_saves_at_the_end_of_the_step_and_the_next_run_continues(uninterrupted, tmp_path, sparse_dir, blocks_dir):
    def stop(progress):
        if progress.message == "training" and progress.done == 3:
            os.kill(parent_of(rank_pids(tmp_path / "work")[0]), signal.SIGTERM)  # torchrun, as a machine that is taken away does

    with pytest.raises(PreemptedError, match=r"stopped after step [345] of 6; its checkpoint is kept"):
        train(tmp_path, sparse_dir, blocks_dir, QLORA, SAVING, stop)
    assert checkpoints.find_complete(tmp_path / "work" / "checkpoints")[-1].step >= 3
    assert_same_bytes(train(tmp_path, sparse_dir, blocks_dir, QLORA, SAVING), uninterrupted)


def test_a_stop_file_saves_and_ends(tmp_path, sparse_dir, blocks_dir):
    def ask(progress):
        if progress.message == "training" and progress.done == 1:
            (tmp_path / "work" / "STOP").touch()

    with pytest.raises(InterruptedStageError, match=r"asked by .*STOP"):
        train(tmp_path, sparse_dir, blocks_dir, EXACT, None, ask)


@pytest.mark.parametrize(
    ("changes", "execution"),
    [
        ({}, {"num_processes": 1}),
        ({}, {"zero_stage": 3}),
        ({}, {"zero_stage": 1, "gradient_checkpointing": "full"}),
        ({}, {"zero_stage": 2, "gradient_checkpointing": "selective"}),
    ],
    ids=["one rank", "ZeRO-3", "ZeRO-1 and recomputed activations", "ZeRO-2 and every second layer recomputed"],
)
def test_ranks_and_sharding_change_the_order_of_sums_only(exact, tmp_path, sparse_dir, blocks_dir, changes, execution):
    """The same blocks, the same dropout, the same weights of tokens; Adam turns rounding of tiny gradients into small steps."""
    other = train(tmp_path, sparse_dir, blocks_dir, {**EXACT, **changes}, execution)
    for line, expected in zip(history(other), history(exact), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["balance"] == pytest.approx(expected["balance"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert line["tokens"] == expected["tokens"]
    ours, theirs = tensors(other), tensors(exact)
    assert set(ours) == set(theirs)
    moved = sum(((ours[name] - theirs[name]).abs() > 2e-4).float().sum().item() for name in theirs)
    assert moved / sum(tensor.numel() for tensor in theirs.values()) < 0.01


def test_nf4_with_zero_3_is_close_to_zero_2(uninterrupted, tmp_path, sparse_dir, blocks_dir):
    other = train(tmp_path, sparse_dir, blocks_dir, QLORA, {"zero_stage": 3, "gradient_checkpointing": "full"})
    for line, expected in zip(history(other), history(uninterrupted), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


BIASED = {**EXACT, "balance": {"kind": "bias", "bias_update_rate": 0.01, "z_coefficient": 0.001, "jitter": 0.05}}


@pytest.fixture(scope="module")
def biased(tmp_path_factory, sparse_dir, blocks_dir):
    """Balanced by bias, with z-loss and jitter, ZeRO-2."""
    return train(tmp_path_factory.mktemp("biased"), sparse_dir, blocks_dir, BIASED, SAVING)


def test_balancing_by_bias_counts_over_all_ranks_and_is_in_the_result(biased):
    biases = {name: tensor for name, tensor in tensors(biased).items() if name.endswith("router.bias_steps")}
    assert sorted(biases) == [f"model.layers.{layer}.mlp.router.bias_steps" for layer in range(2)]
    for bias in biases.values():
        assert bias.any()
        assert bias.abs().max() <= STEPS
    assert all(line["z"] > 0 for line in history(biased))


@pytest.mark.long
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_biased_run_resumes_with_its_bias_under_any_sharding(biased, tmp_path, sparse_dir, blocks_dir, zero_stage):
    import torch

    def stop(progress):
        if progress.message == "training" and progress.done == 3:
            (tmp_path / "work" / "STOP").touch()

    where = {"zero_stage": zero_stage, "gradient_checkpointing": "full" if zero_stage == 3 else "none", **SAVING}
    with pytest.raises(InterruptedStageError):
        train(tmp_path, sparse_dir, blocks_dir, BIASED, where, stop)
    again = train(tmp_path, sparse_dir, blocks_dir, BIASED, where)
    if zero_stage == 2:
        assert_same_bytes(again, biased)
    ours, theirs = tensors(again), tensors(biased)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.endswith("bias_steps"))


def test_the_dense_control_has_no_bank(tmp_path, dense_dir, blocks_dir):
    ctx = train(tmp_path, dense_dir, blocks_dir, {**QLORA, "method": "qlora", "micro_batch_size": 2})
    assert not (ctx.out / "bank.safetensors").exists()
    lines = history(ctx)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all("balance" not in line and "experts" not in line for line in lines)
    assert [row["group"] for row in json.loads((ctx.out / "training.json").read_text())["trainable"]] == ["lora"]


def test_an_error_of_a_rank_arrives_with_its_class(tmp_path, dense_dir, blocks_dir):
    with pytest.raises(ModelError, match=r"method is pesc, but .*dense .*has no bank"):
        train(tmp_path, dense_dir, blocks_dir, EXACT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_a_killed_caller(tmp_path, sparse_dir, blocks_dir, number):
    code = f"""
from pathlib import Path
from pesc.train.stage import build
from tests.train import tiny
def tell(progress):
    if progress.message == "training":
        Path({str(tmp_path / "running")!r}).touch()
build(tiny.make_context(Path({str(tmp_path)!r}), Path({str(sparse_dir)!r}), Path({str(blocks_dir)!r}), tiny.settings(max_steps=100000), None, tell))
"""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**supervise.child_environment(), "PYTHONPATH": root}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "running").exists, 120, "the first step")
    pids = rank_pids(tmp_path / "work")
    launcher = parent_of(pids[0])
    assert len(pids) == 2
    os.kill(caller.pid, number)
    caller.wait(60)
    wait_for(lambda: not any(map(alive, [*pids, launcher])), 60, "the end of the ranks")
    if number == signal.SIGTERM:
        assert checkpoints.find_complete(tmp_path / "work" / "checkpoints"), "the grace time is enough to save a small run"
