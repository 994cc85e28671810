"""The planner's bytes of one rank against what DeepSpeed really holds of real models, in one process and on two gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pesc.models.factory import architecture, sparse_config
from pesc.moe.config import PescConfig
from pesc.train.memory.shapes import shape_from_config
from pesc.train.memory.states import state_bytes
from pesc.train.memory.trained import trained_tensors
from tests.train.tiny import settings

pytestmark = [pytest.mark.slow, pytest.mark.long]
PROGRAM = Path(__file__).with_name("memory_program.py")
SIZES: Any = {
    "vocab_size": 1001,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
DENSE = LlamaConfig(**SIZES, intermediate_size=3329)
"""Embeddings and packed FFN matrices above ZeRO-3's threshold, attention below it; an odd number of weights in some."""
BLOCK = PescConfig(num_experts=4, top_k=2, adapter_dim=208, dispatch="dense", shared_adapter_dim=4)
WHOLE, WHOLE_BLOCK = LlamaConfig(**SIZES, intermediate_size=328), PescConfig(num_experts=4, top_k=2)

ARMS = {
    "pesc": ("sparse", {"method": "pesc", "optimizer": "paged_adamw_8bit", "lora": {"rank": 3, "plus_ratio": 4.0}}),
    "qlora": ("dense", {"method": "qlora", "optimizer": "paged_adamw_32bit", "lora": {"rank": 3, "targets": ["q_proj", "down_proj"]}}),
    "lora": ("dense", {"method": "lora", "quantization": "none", "optimizer": "adamw_torch"}),
    "upcycle-full": ("mixtral", {"method": "upcycle-full", "quantization": "none", "optimizer": "adamw_torch_fused"}),
    "lora in fp32": ("dense", {"method": "lora", "quantization": "none", "compute_dtype": "float32"}),
}
SHAPES = {"dense": (DENSE, None), "sparse": (DENSE, BLOCK), "mixtral": (WHOLE, WHOLE_BLOCK)}
CASES = [("pesc", 0), *((arm, stage) for arm in ARMS for stage in (1, 2, 3))]
ALONE = [("pesc", 0), ("pesc", 2), ("pesc", 3), ("upcycle-full", 2)]


def named(cases):
    return [f"{arm}, ZeRO-{stage}" for arm, stage in cases]


def config_of(arm: str):
    """Two micro-batches a step on two ranks, four on one."""
    fields = {"compute_dtype": "bfloat16", "quantization": "nf4", "global_batch_size": 4, "lora": {"rank": 3}}
    return settings(**(fields | ARMS[arm][1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    mixtral = MixtralConfig(**SIZES, intermediate_size=328, num_local_experts=4, num_experts_per_tok=2)
    models = {
        "dense": LlamaForCausalLM(DENSE),
        "sparse": architecture("llama").causal_lm(sparse_config(DENSE, BLOCK)),
        "mixtral": MixtralForCausalLM(mixtral),
    }
    for name, model in models.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
    return folder


def write_task(folder: Path, name: str, cases: list) -> Path:
    task = folder / name
    task.write_text(
        json.dumps(
            [
                {"model": str(folder / ARMS[arm][0]), "config": config_of(arm).model_dump(mode="json"), "zero_stage": stage}
                for arm, stage in cases
            ]
        )
    )
    return task


def run(task: Path, ranks: int) -> list[list[dict]]:
    """What each rank held in each case."""
    root = str(PROGRAM.parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(PROGRAM), str(task)]
    ran = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(Path(f"{task}.{rank}").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def one_rank(folder):
    return run(write_task(folder, "alone.json", ALONE), 1)


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run(write_task(folder, "pair.json", CASES), 2)


def planned(arm: str, stage: int, ranks: int) -> dict[str, int]:
    dense, block = SHAPES[ARMS[arm][0]]
    shape, config = shape_from_config(dense.to_dict(), arm), config_of(arm)
    held = state_bytes(shape, trained_tensors(shape, block, config), config, stage, ranks)
    trained = sum(held.trained.values()) + held.padding
    return {
        "base": held.base,
        "trained": trained,
        "masters": held.masters,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
    }


@pytest.mark.parametrize(("arm", "stage"), CASES, ids=named(CASES))
def test_each_of_two_ranks_holds_what_was_planned(two_ranks, arm, stage):
    for rank in two_ranks:
        found, plan = rank[CASES.index((arm, stage))], planned(arm, stage, 2)
        if (arm, stage) == ("lora in fp32", 2):  # one keeps the tensor that both share whole, the other has no padding
            extra, largest = found.pop("gradients") - plan.pop("gradients"), 4 * 3 * DENSE.intermediate_size
            assert -16 <= extra <= largest
        assert found == plan


@pytest.mark.parametrize(("arm", "stage"), ALONE, ids=named(ALONE))
def test_one_rank_holds_what_was_planned(one_rank, arm, stage):
    assert one_rank[0][ALONE.index((arm, stage))] == planned(arm, stage, 1)
