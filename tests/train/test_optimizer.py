from __future__ import annotations

import pytest
import torch

from pesc.train.optimizer import count_warmup_steps, learning_rate_at, make_optimizer, make_schedule
from tests.train.tiny import settings


def rates(steps, **changes):
    config = settings(learning_rate=1.0, **changes)
    return [round(learning_rate_at(config, step, steps), 6) for step in range(steps + 1)]


def test_schedules():
    assert rates(4, schedule="constant_with_warmup", warmup_ratio=0.0) == [1, 1, 1, 1, 1]
    assert rates(4, schedule="linear", warmup_ratio=0.0) == [1, 0.75, 0.5, 0.25, 0]
    assert rates(4, schedule="cosine", warmup_ratio=0.0) == [1, 0.853553, 0.5, 0.146447, 0]
    assert rates(6, schedule="linear", warmup_ratio=0.3) == [0.333333, 0.666667, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 33])
def test_no_step_is_wasted_on_a_rate_of_zero(schedule, steps):
    assert min(rates(steps, schedule=schedule, warmup_ratio=0.5)[:-1]) > 0


def test_a_short_run_warms_up_for_one_step():
    assert count_warmup_steps(settings(warmup_ratio=0.03), 12) == 1


@pytest.mark.parametrize("name", ["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_every_optimizer_runs_on_the_cpu_and_agrees_with_torch(name):
    torch.manual_seed(0)
    start, gradients = torch.randn(8192), torch.randn(5, 8192)
    moved = {}
    for choice in ("adamw_torch", name):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make_optimizer(settings(optimizer=choice, weight_decay=0.1), [parameter], "cpu")
        schedule = make_schedule(settings(), optimizer, 5)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            schedule.step()
        moved[choice] = parameter.detach() - start
    error = (moved[name] - moved["adamw_torch"]).norm() / moved["adamw_torch"].norm()
    assert error < (0.02 if name == "paged_adamw_8bit" else 1e-4)
    assert moved[name].abs().max() > 1e-4
