"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from pesc.train.config import TrainConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8


def make_optimizer(config: TrainConfig, parameters: Iterable[torch.nn.Parameter], device: str) -> torch.optim.Optimizer:
    """AdamW over one group.  Paged states need CUDA; on the CPU the same arithmetic runs on ordinary memory, with equal results."""
    settings = {"lr": config.learning_rate, "betas": BETAS, "eps": EPSILON, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw_torch":
        return torch.optim.AdamW(list(parameters), **settings)
    from bitsandbytes.optim.adamw import AdamW

    bits = 8 if config.optimizer == "paged_adamw_8bit" else 32
    return AdamW(list(parameters), **settings, optim_bits=bits, is_paged=device == "cuda")


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
    """`learning_rate_at` as a torch scheduler."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(config, step, steps) / config.learning_rate)
