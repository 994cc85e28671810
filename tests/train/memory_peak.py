"""The peak of a real training step: run by the GPU test of the memory planner under torchrun.

    python memory_peak.py TASK.json        TASK: [{"device", "shape", "layers", "adapter_dim", "micro_batch", "sequence", "checkpointing",
                                           "config"}, ...]; writes TASK.json.out: [{"found": bytes, "planned": bytes}, ...]

Random NF4 weights, LoRA and a filled bank; DeepSpeed's ZeRO-2 steps.  The second step counts: the first makes the optimizer's states.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pesc.bench.models import STEP_SHAPES, random_model, widened
from pesc.bench.step import StepSettings, packed_batch, uses_flash
from pesc.moe.balance import RouterRecorder
from pesc.moe.config import PescConfig
from pesc.stage import Execution
from pesc.train.config import TrainConfig
from pesc.train.deepspeed import make_config, skip_shared_memory_op
from pesc.train.memory.need import Layout, Run, need_of
from pesc.train.memory.shapes import shape_from_config


def prepare(case: dict, config: TrainConfig) -> Any:
    """The model as `load_trainable` makes it, without a directory."""
    from peft import get_peft_model

    from pesc.moe.layer import sparse_parameters
    from pesc.train.modeling import checkpoint_activations, peft_config

    model = random_model(case["shape"], case["layers"], torch.bfloat16, case["device"]).requires_grad_(False)
    if case["adapter_dim"]:
        model = widened(model, block_of(case))
    checkpoint_activations(model, case["checkpointing"])
    wrapped = get_peft_model(model, peft_config(config), autocast_adapter_dtype=False)
    for _, parameter in sparse_parameters(wrapped):
        parameter.requires_grad_(True)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return wrapped.train()


def block_of(case: dict) -> PescConfig | None:
    return PescConfig(8, 2, case["adapter_dim"]) if case["adapter_dim"] else None


def measure(case: dict) -> int:
    """Bytes that torch had allocated at the peak of the second step; 0 on the CPU."""
    import deepspeed

    from pesc.train.head import LossHead
    from pesc.train.modeling import trainable_parameters
    from pesc.train.optimizer import make_optimizer

    config, device = TrainConfig.model_validate(case["config"]), case["device"]
    model = prepare(case, config)
    head, recorder = LossHead.of(model.get_base_model()), RouterRecorder(model) if case["adapter_dim"] else None
    optimizer = make_optimizer(config, trainable_parameters(model), device)
    execution = Execution(device=device, num_processes=1, zero_stage=2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=make_config(config, execution, 1, device))
    settings = StepSettings(sequence=case["sequence"], micro_batch=case["micro_batch"], dtype=torch.bfloat16, device=device)
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in packed_batch(model.config.vocab_size, settings).items()}
    share = torch.tensor(1.0 / batch["supervised"], device=device)
    for _ in range(2):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if recorder:
            with recorder:
                loss = score(engine, head, batch, share)
            loss = loss + 0.01 * recorder.balance_loss(batch["valid"])
            recorder.clear()
        else:
            loss = score(engine, head, batch, share)
        engine.backward(loss)
        engine.step()
    found = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    engine.destroy()
    return found


def score(engine: Any, head: Any, batch: dict, share: torch.Tensor) -> torch.Tensor:
    """The loss as the trainer makes it."""
    from pesc.train.packed_rows import model_inputs, rows_told

    with head.scoring(batch["rows_N"], batch["targets_N"], share), rows_told(batch["packed"]):
        return head.loss_of(engine(**model_inputs(batch), logits_to_keep=batch["kept_K"], use_cache=False))


def plan(case: dict) -> int:
    fields = {**STEP_SHAPES[case["shape"]], "num_hidden_layers": case["layers"]}
    config = TrainConfig.model_validate(case["config"])
    run = Run(
        shape_from_config(fields, case["shape"]), block_of(case), config, case["sequence"], case["device"], uses_flash(case["device"])
    )
    return need_of(run, Layout(1, 2, case["checkpointing"], case["micro_batch"])).tensors


def main(task: str) -> None:
    if not torch.cuda.is_available():
        skip_shared_memory_op()
    found = []
    for case in json.loads(Path(task).read_text()):
        found.append({"found": measure(case), "planned": plan(case)})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    Path(f"{task}.out").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
