"""The planner's bytes of one rank against what DeepSpeed really holds, on two gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pesc.stage import Execution
from pesc.train.deepspeed import make_config
from pesc.train.memory.states import optimizer_bytes, partition_size
from tests.train.tiny import settings

pytestmark = pytest.mark.slow
SIZES = [(37, 129), (11, 5), (64, 97)]
CASES = [(stage, optimizer) for stage in (1, 2) for optimizer in ("paged_adamw_8bit", "adamw_torch")]
PROGRAM = """
import json, sys
import torch
from pesc.train.deepspeed import skip_shared_memory_op
skip_shared_memory_op()
import deepspeed
from pesc.train.optimizer import make_optimizer
from tests.train.tiny import settings

def count(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

def measure(sizes, name, config):
    model = torch.nn.Module()
    for i, shape in enumerate(sizes):
        model.register_parameter(f"w{i}", torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)))
    named = [(f"base_model.model.x.lora_A.{key}", p) for key, p in model.named_parameters()]
    optimizer = make_optimizer(settings(optimizer=name), named, "cpu")
    model.forward = lambda: sum((p.float() ** 2).sum() for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    zero = engine.optimizer
    engine.backward(engine())
    if type(zero).__name__ == "BF16_Optimizer":
        weights, masters, gradients = zero.bf16_groups_flat, zero.fp32_groups_flat_partition, zero.fp32_groups_gradients_flat
    else:
        weights, masters = zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
        gradients = [group.flat_partition for group in zero.averaged_gradients.values()]
    found = {"weights": count(weights), "masters": count(masters), "gradients": count(gradients)}
    engine.step()
    found["optimizer"] = count(v for state in zero.optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    return found

task = json.load(open(sys.argv[1]))
found = [measure(task["sizes"], *case) for case in task["cases"]]
json.dump(found, open(f"{sys.argv[1]}.{torch.distributed.get_rank()}", "w"))
"""


def settings_of(optimizer):
    return settings(compute_dtype="bfloat16", optimizer=optimizer, global_batch_size=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each of two ranks held in each case, rank by rank."""
    folder = tmp_path_factory.mktemp("zero")
    task, program = folder / "task.json", folder / "program.py"
    cases = []
    for stage, optimizer in CASES:
        execution = Execution(device="cpu", num_processes=2, zero_stage=stage)
        cases.append([optimizer, make_config(settings_of(optimizer), execution, 2, "cpu")])
    task.write_text(json.dumps({"sizes": SIZES, "cases": cases}))
    program.write_text(PROGRAM)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program), str(task)]
    ran = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(Path(f"{task}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"ZeRO-{stage} {optimizer}" for stage, optimizer in CASES])
def test_a_rank_holds_what_was_planned(measured, case):
    stage, optimizer = CASES[case]
    part = partition_size(sum(torch.Size(size).numel() for size in SIZES), 2)
    for rank in range(2):
        assert measured[rank][case] == {
            "weights": 2 * 2 * part,
            "masters": 4 * part,
            "gradients": 4 * part * (2 if stage == 1 else 1),
            "optimizer": optimizer_bytes(settings_of(optimizer), [part]),
        }
