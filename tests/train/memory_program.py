"""What ranks really hold of real models: run by the tests of the memory planner under torchrun, or alone.

    python memory_program.py TASK.json        TASK: [{"model": DIR, "config": TrainConfig, "zero_stage": 0-3}, ...]; writes TASK.json.RANK

Gradients are measured after the first backward pass of a step, everything else after the optimizer's step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pesc.stage import Execution
from pesc.train.config import TrainConfig
from pesc.train.deepspeed import make_config, skip_shared_memory_op


def count(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def quantization_states(model: torch.nn.Module) -> list[torch.Tensor]:
    states = [s for p in model.parameters() if (s := getattr(p, "quant_state", None)) is not None]
    return [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]


def weights_of(parameters: list) -> list[torch.Tensor]:
    """The values of parameters: under ZeRO-3 this rank's part, and the whole of those that stay gathered."""
    return [t for p in parameters for t in (p.data, getattr(p, "ds_tensor", None)) if t is not None]


def parts_of(zero) -> tuple[list, list]:
    """fp32 masters and gradients of a DeepSpeed optimizer."""
    if type(zero).__name__ == "BF16_Optimizer":
        return zero.fp32_groups_flat_partition, zero.fp32_groups_gradients_flat
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat, [zero.grad_partitions_flat_buffer]
    if type(zero).__name__ == "FP16_UnfusedOptimizer":
        return [t for group in zero.fp32_groups for t in group], []
    gradients = []
    for group in [*zero.averaged_gradients.values(), *getattr(zero, "all_grad_tensors", {}).values()]:
        gradients += [group.flat_partition] if hasattr(group, "flat_partition") else list(group or ())
    return zero.single_partition_of_fp32_groups, [g for g in gradients if g is not None]


def measure(case: dict, world: int) -> dict[str, int]:
    import deepspeed

    from pesc.train.modeling import load_trainable, trainable_parameters
    from pesc.train.optimizer import make_optimizer

    config = TrainConfig.model_validate(case["config"])
    model = load_trainable(Path(case["model"]), config, "cpu", "none")
    optimizer = make_optimizer(config, trainable_parameters(model), "cpu")
    execution = Execution(device="cpu", num_processes=world, zero_stage=case["zero_stage"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=make_config(config, execution, world, "cpu"))
    zero: Any = engine.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    found = {}
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(input_ids=torch.arange(8)[None] + engine.global_rank).logits.float().square().mean())
        masters, gradients = parts_of(zero) if hasattr(zero, "optimizer") else ([], [])
        found.setdefault("gradients", count([*gradients, *(p.grad for p in trained if p.grad is not None)]))
        engine.step()
    inner = getattr(zero, "optimizer", zero)
    found |= {
        "base": count(weights_of(frozen) + quantization_states(model)),
        "trained": count(weights_of(trained)),
        "masters": count(masters),
        "optimizer": count(v for state in inner.state.values() for v in state.values() if torch.is_tensor(v)),
    }
    engine.destroy()
    return found


def main(task: str) -> None:
    skip_shared_memory_op()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = [measure(case, world) for case in json.loads(Path(task).read_text())]
    Path(f"{task}.{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
