"""DeepSpeed's settings, from the run's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pesc.stage import Execution
from pesc.train.config import TrainConfig

BUCKET = 50_000_000
"""Elements that are reduced or gathered at once."""
PERSISTENT = 100_000
"""Tensors of so many elements stay whole under ZeRO-3."""


def make_config(config: TrainConfig, execution: Execution, world_size: int, device: str) -> dict[str, Any]:
    """The dict that `deepspeed.initialize` takes.

    Weights in the compute dtype with fp32 masters in the optimizer, gradients accumulated in fp32 (in bf16 the sum of many
    micro-batches would stop growing; ZeRO 0 has no such choice and accumulates in the compute dtype).  Optimizer states, gradients and
    weights are sharded from ZeRO 1, 2 and 3 on.
    """
    is_bf16 = config.compute_dtype == "bfloat16"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // (config.micro_batch_size * world_size),
        "train_batch_size": config.global_batch_size,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": _zero(execution.zero_stage, device),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "checkpoint": {"use_node_local_storage": execution.num_nodes > 1},
    }
    if is_bf16 and execution.zero_stage:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def configs_by_arm(arms: Mapping[str, TrainConfig], execution: Execution) -> dict[str, Any]:
    """What `pesc show --deepspeed` prints: the ranks that training here would have, and the settings of each trained arm.

    Raises RecipeError when the ranks cannot share an arm's batch.  Imports no torch.
    """
    from pesc.train.order import check_batch
    from pesc.train.stage import choose_processes, count_gpus

    if execution.num_processes:  # said, so that it does not matter which machine is asked
        per_node, gpus = execution.num_processes, count_gpus(os.environ) if execution.device == "auto" else execution.device == "cuda"
        device = "cuda" if gpus else "cpu"
    else:
        device, per_node = choose_processes(execution)
    world_size = per_node * execution.num_nodes
    for config in arms.values():
        check_batch(config, world_size)
    made = {name: make_config(config, execution, world_size, device) for name, config in arms.items()}
    return {"device": device, "world_size": world_size, "arms": made}


def _zero(stage: int, device: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {
            "contiguous_gradients": True,
            "overlap_comm": device == "cuda",
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return zero


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce on the CPU.

    It serves tensor-parallel inference alone, but is built when the first process group is made: a minute of C++ on a fresh machine,
    and an error without a compiler.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
