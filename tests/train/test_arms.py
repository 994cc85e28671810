"""Real ranks: LoRA without quantisation, whole experts, learning rates by part, and a tensor that nothing trains."""

from __future__ import annotations

import json
import os
import signal

import pytest

from pesc.errors import InterruptedStageError, TrainingFailedError
from pesc.train.stage import build
from tests.train import tiny
from tests.train.test_distributed import assert_same_bytes, history, rank_pids, tensors

pytestmark = pytest.mark.slow

BY_PART = {
    "learning_rate": 1e-3, "learning_rates": {"bank": 4e-3, "router": 5e-4}, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1, "plus_ratio": 4.0},
    "schedule": "linear", "optimizer": "adamw_torch_fused", "weight_decay": 0.01,
}  # fmt: skip


def train(folder, model, blocks, changes, execution=None, on_progress=lambda _p: None):
    ctx = tiny.make_context(folder, model, blocks, tiny.settings(**changes), execution, on_progress)
    result = build(ctx)
    return ctx, result


def test_lora_on_unquantised_weights_learns_and_trains_lora_alone(tmp_path, dense_dir, blocks_dir):
    changes = {"method": "lora", "quantization": "none", "max_steps": 5, "learning_rate": 5e-3}
    ctx, _ = train(tmp_path, dense_dir, blocks_dir, changes, {"num_processes": 1})
    lines, record = history(ctx), json.loads((ctx.out / "training.json").read_text())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (record["config"]["method"], record["config"]["quantization"]) == ("lora", "none")
    assert [row["group"] for row in record["trainable"]] == ["lora"]
    assert "lr_by_part" not in lines[0], "one rate needs no second column"


@pytest.fixture(scope="module")
def by_part(tmp_path_factory, sparse_dir, blocks_dir):
    """ZeRO-2 on two ranks, a rate for every part."""
    return train(tmp_path_factory.mktemp("by_part"), sparse_dir, blocks_dir, BY_PART, {"save_every_steps": 2})


def test_the_history_has_the_rate_of_every_part(by_part):
    ctx, result = by_part
    assert "torch AdamW, fused" in result.provenance["optimizer_states"]
    for line in history(ctx):
        base = line["lr"]
        assert line["lr_by_part"] == {
            "bank": pytest.approx(4 * base),
            "router": pytest.approx(base / 2),
            "lora_A": base,
            "lora_B": 4 * base,
        }


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_rates_by_part_give_the_same_run_under_every_sharding(by_part, tmp_path, sparse_dir, blocks_dir, zero_stage):
    other, _ = train(tmp_path, sparse_dir, blocks_dir, BY_PART, {"zero_stage": zero_stage})
    for line, expected in zip(history(other), history(by_part[0]), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["lr_by_part"] == expected["lr_by_part"]
    ours, theirs = tensors(other), tensors(by_part[0])
    moved = sum(((ours[name] - theirs[name]).abs() > 1e-3).float().sum().item() for name in theirs)
    assert moved / sum(tensor.numel() for tensor in theirs.values()) < 0.01


@pytest.mark.long
def test_a_killed_run_keeps_its_rates(by_part, tmp_path, sparse_dir, blocks_dir):
    def kill(progress):
        if progress.message == "training" and progress.done == 3:
            os.kill(rank_pids(tmp_path / "work")[1], signal.SIGKILL)

    with pytest.raises(TrainingFailedError, match="checkpoint at step 2 is kept"):
        train(tmp_path, sparse_dir, blocks_dir, BY_PART, {"save_every_steps": 2}, kill)
    again, _ = train(tmp_path, sparse_dir, blocks_dir, BY_PART, {"save_every_steps": 2})
    assert_same_bytes(again, by_part[0])


FAULT = """
import sys
if any("pesc.train.rank" in word for word in getattr(sys, "orig_argv", [])) and "torch.distributed.run" not in sys.orig_argv:
    import pesc.moe.adapters as adapters
    plain = adapters.{where}.forward
    def detached(self, *inputs, **options):
        return plain(self, *inputs, **options).detach()
    adapters.{where}.forward = detached
"""


@pytest.mark.parametrize("steps", [4])
def test_a_bank_that_a_broken_forward_cuts_off_stops_the_run_with_its_name(tmp_path, sparse_dir, blocks_dir, monkeypatch, steps):
    """Each rank starts with a defect in the adapters' forward: nothing goes back through it."""
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(where="AdapterBank"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(
        TrainingFailedError, match=r"model\.layers\.0\.mlp\.adapters\.(down|up) \(and \d+ more of 34\) is declared trainable"
    ):
        train(tmp_path / "run", sparse_dir, blocks_dir, {"max_steps": steps}, {"num_processes": 1})


def test_a_router_that_has_nothing_to_choose_stops_the_run_at_the_step_that_was_set(tmp_path, blocks_dir):
    """With one expert a token and no balance loss the weight is always 1, so that no gradient reaches the router."""
    from transformers import LlamaConfig

    from pesc.models.factory import architecture, sparse_config
    from pesc.moe.config import PescConfig

    assert issubclass(type(tiny.dense_config()), LlamaConfig)
    config = sparse_config(tiny.dense_config(), PescConfig(num_experts=4, top_k=1, adapter_dim=8, dispatch="dense"))
    architecture("llama").causal_lm(config).save_pretrained(tmp_path / "one")
    changes = {"max_steps": 6, "balance": {"kind": "none"}}
    with pytest.raises(TrainingFailedError, match=r"router\.weight.* got a gradient of zeros in each of the first 3 steps"):
        train(tmp_path / "run", tmp_path / "one", blocks_dir, changes, {"num_processes": 1, "gradient_check_steps": 3})


@pytest.mark.long
def test_a_stopped_run_of_whole_experts_ends_with_the_bytes_of_one_never_stopped(tmp_path, dense_dir, blocks_dir):
    from pesc.models.config import UpcycleConfig
    from pesc.models.mixtral import upcycle_whole

    (tmp_path / "model").mkdir()
    upcycle_whole(dense_dir, tmp_path / "model", UpcycleConfig(kind="whole", num_experts=4))
    full = {"method": "upcycle-full", "max_steps": 4}

    def stop(progress):
        if progress.message == "training" and progress.done == 1:
            (tmp_path / "stopped" / "work" / "STOP").touch()

    whole, _ = train(tmp_path / "whole", tmp_path / "model", blocks_dir, full, {"num_processes": 1})
    with pytest.raises(InterruptedStageError):
        train(tmp_path / "stopped", tmp_path / "model", blocks_dir, full, {"num_processes": 1}, stop)
    again, result = train(tmp_path / "stopped", tmp_path / "model", blocks_dir, full, {"num_processes": 1})
    assert result.metrics["resumed_at"] >= 1
    assert_same_bytes(again, whole)
