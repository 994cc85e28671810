"""A training step of PESC costs little more than the dense control's."""

import pytest
import torch

from pesc.bench.models import random_model, widened
from pesc.bench.step import StepSettings, measure_step, render
from pesc.moe.config import PescConfig


@pytest.mark.benchmark
def test_a_step_of_the_smollm2_slice_costs_at_most_a_twelfth_more_at_64_and_a_quarter_at_512():
    times = measure_step(StepSettings(layers=6, adapter_dims=(64, 512), rounds=5))
    print(render(times))
    assert times.arm(64).ratio <= 1.08, render(times)
    assert times.arm(512).ratio <= 1.25, render(times)


@pytest.fixture(scope="module")
def tiny_times():
    return measure_step(StepSettings(shape="tiny", adapter_dims=(8,), experts=4, sequence=96, rounds=1))


def test_flops_alone_are_those_of_the_definition(tiny_times):
    """By hand: 2 layers, H = 64, F = 128, 4 heads of 16 over 2 key-value heads, LoRA of rank 64, 4 experts of which 2 of width 8 work."""
    projections = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    frozen = 2 * sum(a * b for a, b in projections)
    lora = 2 * sum(64 * (a + b) for a, b in projections)
    more = 6 * 2 * 64 * (4 + 2 * 2 * 8)
    assert tiny_times.arm(0).flops_ratio == 1.0
    without_attention_and_head = 1 + more / (4 * frozen + 6 * lora)
    assert 1 < tiny_times.arm(8).flops_ratio < without_attention_and_head


def test_parts_are_shares_of_one_step(tiny_times):
    for arm in tiny_times.arms:
        assert sum(arm.parts.values()) == pytest.approx(1, abs=0.02)
        assert all(share >= 0 for share in arm.parts.values())
    assert tiny_times.arm(0).parts["bank+router"] == 0
    assert tiny_times.arm(8).parts["bank+router"] > 0


def test_arms_share_the_frozen_base_and_nothing_else():
    dense = random_model("tiny", 2, torch.float32, "cpu")
    sparse = widened(dense, PescConfig(4, 2, 8))
    shared = {parameter.data_ptr() for parameter in dense.parameters()}
    own = {name for name, parameter in sparse.named_parameters() if parameter.data_ptr() not in shared}
    assert own == {f"model.layers.{n}.mlp.{name}" for n in range(2) for name in ("router.weight", "adapters.down", "adapters.up")}
    assert all(not parameter.is_meta for parameter in sparse.parameters())
    tokens = torch.arange(9)[None]
    assert torch.isfinite(sparse(tokens).logits).all()
    assert not torch.equal(sparse(tokens).logits, dense(tokens).logits)
