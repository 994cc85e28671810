"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from pesc.train.config import TrainConfig, full_rates
from pesc.train.modeling import group_of

BETAS, EPSILON = (0.9, 0.999), 1e-8


def make_optimizer(config: TrainConfig, parameters: Iterable[tuple[str, torch.nn.Parameter]], device: str) -> torch.optim.Optimizer:
    """AdamW over named parameters, one group a learning rate: equal rates are one group, whatever the parts are called.

    Paged states need CUDA; on the CPU the same arithmetic runs on ordinary memory, with equal results.
    """
    groups = group_by_rate(config, parameters)
    settings = {"lr": config.learning_rate, "betas": BETAS, "eps": EPSILON, "weight_decay": config.weight_decay}
    if config.optimizer in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW(groups, **settings, fused=True if config.optimizer == "adamw_torch_fused" else None)
    from bitsandbytes.optim.adamw import AdamW

    bits = 8 if config.optimizer == "paged_adamw_8bit" else 32
    return AdamW(groups, **settings, optim_bits=bits, is_paged=device == "cuda")


def group_by_rate(config: TrainConfig, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameter groups in the order of their first parameter, each with its full learning rate."""
    rates, groups = full_rates(config), {}
    for name, parameter in parameters:
        rate = rates[part_of(name)]
        groups.setdefault(rate, {"params": [], "lr": rate})["params"].append(parameter)
    return list(groups.values())


def part_of(name: str) -> str:
    """What a parameter's learning rate goes by: its group, with LoRA's two factors apart."""
    group = group_of(name)
    if group != "lora":
        return group
    return "lora_B" if ".lora_B." in name or ".lora_embedding_B." in name else "lora_A"


def rates_at(config: TrainConfig, step: int, steps: int, parts: Iterable[str]) -> dict[str, float]:
    """Part -> its learning rate in optimizer step `step` (from 0) of `steps`."""
    factor, full = learning_rate_at(config, step, steps) / config.learning_rate, full_rates(config)
    return {part: full[part] * factor for part in parts}


def count_warmup_steps(config: TrainConfig, steps: int) -> int:
    """Optimizer steps below the full learning rate."""
    return math.ceil(config.warmup_ratio * steps)


def learning_rate_at(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`.

    The first step is not wasted on a rate of zero: with w warm-up steps it has 1/(w+1) of the full one.  linear and cosine reach
    zero after the last step.
    """
    warmup = count_warmup_steps(config, steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    share = {"constant_with_warmup": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.schedule]
    return config.learning_rate * max(0.0, share)


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """`learning_rate_at` as a torch scheduler: one shape for every group."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(config, step, steps) / config.learning_rate)
