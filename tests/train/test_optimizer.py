from __future__ import annotations

import pytest
import torch

from pesc.train.optimizer import count_warmup_steps, group_by_rate, learning_rate_at, make_optimizer, make_schedule, part_of, rates_at
from tests.train.tiny import settings

PREFIX = "base_model.model.model.layers.0."
LORA_A, LORA_B = (f"{PREFIX}self_attn.q_proj.lora_{side}.default.weight" for side in "AB")
BANK, ROUTER = f"{PREFIX}mlp.adapters.up", f"{PREFIX}mlp.router.weight"


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


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_every_optimizer_runs_on_the_cpu_and_agrees_with_torch(name):
    torch.manual_seed(0)
    start, gradients = torch.randn(8192), torch.randn(5, 8192)
    moved = {}
    for choice in ("adamw_torch", name):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make_optimizer(settings(optimizer=choice, weight_decay=0.1), [(LORA_A, parameter)], "cpu")
        schedule = make_schedule(settings(), optimizer, 5)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            schedule.step()
        moved[choice] = parameter.detach() - start
    error = (moved[name] - moved["adamw_torch"]).norm() / moved["adamw_torch"].norm()
    assert error < (0.02 if name == "paged_adamw_8bit" else 1e-4)
    assert moved[name].abs().max() > 1e-4


def parameters():
    return [(name, torch.nn.Parameter(torch.ones(2))) for name in (LORA_A, LORA_B, BANK, ROUTER)]


def test_one_rate_is_one_group_and_different_rates_are_groups_of_their_own():
    assert [len(group["params"]) for group in group_by_rate(settings(), parameters())] == [4]
    changed = settings(learning_rate=1e-4, learning_rates={"bank": 3e-4}, lora={"plus_ratio": 16})
    assert [(len(group["params"]), group["lr"]) for group in group_by_rate(changed, parameters())] == [
        (2, 1e-4),
        (1, pytest.approx(16e-4)),
        (1, 3e-4),
    ]  # fmt: skip  lora_A and the router; lora_B; the bank


def test_what_is_logged_is_what_the_optimizer_has_in_every_step():
    """Warm-up and decay are one shape for all parts; weight decay is that of the settings."""
    config = settings(
        learning_rate=1e-4, learning_rates={"lora": 2e-4, "bank": 3e-4, "router": 4e-4}, lora={"plus_ratio": 4}, schedule="cosine",
        warmup_ratio=0.3, weight_decay=0.1,
    )  # fmt: skip
    named = parameters()
    optimizer = make_optimizer(config, named, "cpu")
    schedule = make_schedule(config, optimizer, 10)
    part_of_parameter = {id(parameter): part_of(name) for name, parameter in named}
    for step in range(10):
        logged = rates_at(config, step, 10, ("lora_A", "lora_B", "bank", "router"))
        for group in optimizer.param_groups:
            assert group["weight_decay"] == 0.1
            assert {part_of_parameter[id(parameter)] for parameter in group["params"]}
            for parameter in group["params"]:
                assert group["lr"] == pytest.approx(logged[part_of_parameter[id(parameter)]], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_lora_plus_moves_b_by_its_ratio_and_a_as_before():
    """The first step of Adam is the learning rate times the gradient's sign."""
    moved = {}
    for ratio in (1.0, 8.0):
        named = parameters()
        optimizer = make_optimizer(settings(learning_rate=1e-3, lora={"plus_ratio": ratio}), named, "cpu")
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved[ratio] = {name: (1 - parameter.detach()[0]).item() for name, parameter in named}
    assert moved[8.0][LORA_B] == pytest.approx(8 * moved[1.0][LORA_B], rel=1e-4)
    assert all(moved[8.0][name] == pytest.approx(moved[1.0][name]) for name in (LORA_A, BANK, ROUTER))


def test_peft_names_its_factors_as_the_groups_expect(sparse_dir):
    from pesc.train.modeling import load_trainable, trainable_parameters

    names = [name for name, _ in trainable_parameters(load_trainable(sparse_dir, settings(), "cpu", "none"))]
    parts = [part_of(name) for name in names]
    assert {part: parts.count(part) for part in set(parts)} == {"lora_A": 14, "lora_B": 14, "bank": 4, "router": 2}
