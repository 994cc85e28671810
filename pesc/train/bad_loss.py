"""Steps whose loss or gradient cannot be right: found before the optimizer moves, and left out or fatal.

DeepSpeed applies a step inside its backward pass, in one call of the optimizer a parameter group or shard.  The gate stands before the
optimizer that DeepSpeed drives, whatever the ZeRO stage: masters, moments and weights stay as they were, on all ranks alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch

from pesc.errors import TrainingFailedError
from pesc.train.config import BadLossConfig

_LEAST_STEPS = 8  # before that, a loss has nothing to be compared with


class StepGate:
    """Lets an optimizer's `step` through unless the current step's verdict is bad; the verdict is asked for once a step."""

    def __init__(self, judge: Callable[[], str]) -> None:
        """judge: what is wrong with the step, "" for nothing; must answer the same on all ranks."""
        self._judge = judge
        self._verdict: str | None = ""

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Stand before `optimizer.step`.  Outside of a training step it is open: DeepSpeed makes the states with an empty one."""
        original = optimizer.step

        def step(_optimizer: torch.optim.Optimizer, *arguments: Any, **options: Any) -> Any:
            return None if self.verdict() else original(*arguments, **options)

        optimizer.step = MethodType(step, optimizer)

    def open_step(self) -> None:
        """A new step begins."""
        self._verdict = None

    def verdict(self) -> str:
        """What is wrong with this step, "" for nothing."""
        if self._verdict is None:
            self._verdict = self._judge()
        return self._verdict


def keep_norm(engine: Any) -> None:
    """Without ZeRO, DeepSpeed clips fp32 gradients and forgets their norm: leave it where ZeRO's optimizers leave theirs."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return
    clip = engine.clip_fp32_gradients

    def measure_and_clip() -> None:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        engine.optimizer._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
        clip()

    engine.clip_fp32_gradients = measure_and_clip


def find_fault(config: BadLossConfig, loss: float, balance: float, grad_norm: float, lines: Sequence[dict[str, Any]]) -> str:
    """What is wrong with a step, in words; "" for nothing.

    grad_norm: before clipping; negative when DeepSpeed found it not finite.  lines: the history so far, skipped steps too.
    """
    if not math.isfinite(loss + balance):
        return f"the loss is {loss if not math.isfinite(loss) else balance}"
    if grad_norm < 0 or not math.isfinite(grad_norm):
        return "the gradient is not finite"
    good = [line for line in lines if "skipped" not in line][-config.window :]
    for name, value, factor in (
        ("loss", loss, config.explosion_factor),
        ("grad_norm", grad_norm, config.norm_explosion_factor),
    ):
        if factor is None or len(good) < _LEAST_STEPS:
            continue
        median = statistics.median(line[name] for line in good)
        if value > factor * median:
            return f"the {name} is {value:.4g}, over {factor:g} times the {median:.4g} that is usual"
    return ""


def decide(config: BadLossConfig, fault: str, step: int, lines: Sequence[dict[str, Any]], address: str, learning_rate: float) -> str:
    """What to log about a bad step that is left out.  Raises TrainingFailedError when it is one too many, or none may be left out."""
    in_a_row = 0
    for line in reversed(lines):
        if "skipped" not in line:
            break
        in_a_row += 1
    ways = f"lower train.learning_rate (now {learning_rate:g}) or train with compute_dtype float32"
    if config.policy == "stop":
        raise TrainingFailedError(
            f"{address}: {fault} at step {step}: {ways}, or leave such steps out with train.bad_loss.policy=skip; the step was not applied, "
            "and the last checkpoint is of an earlier step."
        )
    if in_a_row >= config.max_skips:
        raise TrainingFailedError(
            f"{address}: {fault} at step {step}, and the {in_a_row} steps before were left out already (train.bad_loss.max_skips is "
            f"{config.max_skips}): {ways}, or look at the blocks of these steps."
        )
    return f"{address}: {fault} at step {step}; the step was left out ({in_a_row + 1} in a row, at most {config.max_skips})"


def finite(value: Any) -> Any:
    """A number for JSON: None for one that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
