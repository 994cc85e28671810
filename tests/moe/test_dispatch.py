"""The ways of dispatch give one result, in values and in gradients, and that result is the paper's formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.moe.adapters import AdapterBank
from pesc.moe.dispatch import GATHERED_LIMIT, PATHS, candidates, guess_path, run_adapters
from pesc.moe.paths import grouped_allowed
from pesc.moe.router import Router, select_experts

MODES = ("dense", "grouped", "segments")
"""The paths with gradients, beside the oracle."""


def make_case(tokens, experts, top_k, width, hidden, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    index, weight = select_experts(draw(tokens, experts), top_k)
    return draw(tokens, hidden), draw(experts, width, hidden) / hidden**0.5, draw(experts, width, hidden) / width**0.5, index, weight


def run_with_gradients(mode, y, down, up, index, weight, cotangent):
    leaves = [tensor.clone().requires_grad_() for tensor in (y, down, up, weight)]
    out = run_adapters(*leaves[:3], index, leaves[3], mode=mode)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    return (out.detach(), *gradients)


def paper_formula(y, down, up, index, weight):
    """Equations 7 and 8 written out for one token at a time, without residual: the independent reference."""
    rows = []
    for t in range(y.shape[0]):
        total = torch.zeros_like(y[t])
        for k in range(index.shape[1]):
            z = down[index[t, k]] @ y[t]
            gelu = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            total = total + weight[t, k] * (up[index[t, k]].T @ gelu)
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros_like(y)


def test_the_oracle_is_the_papers_formula():
    case = [tensor.double() if tensor.is_floating_point() else tensor for tensor in make_case(7, 5, 3, 6, 10)]
    assert torch.allclose(run_adapters(*case, mode="reference"), paper_formula(*case), atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 33),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    width=st.sampled_from([4, 8, 20]),
    hidden=st.sampled_from([8, 12, 32]),
    seed=st.integers(0, 2**16),
)
def test_every_path_equals_the_oracle_in_values_and_gradients(tokens, experts, top_k, width, hidden, seed):
    case = make_case(tokens, experts, min(top_k, experts), width, hidden, seed)
    cotangent = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed + 1))
    expected = run_with_gradients("reference", *case, cotangent)
    for mode in MODES:
        for name, got, want in zip(("out", "y", "down", "up", "weight"), run_with_gradients(mode, *case, cotangent), expected, strict=True):
            assert got.shape == want.shape
            assert torch.allclose(got, want, atol=1e-5, rtol=1e-5), f"{mode}: {name} differs by {(got - want).abs().max()}"


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, GATHERED_LIMIT // 4),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    width=st.integers(1, 21),
    hidden=st.integers(1, 33),
    seed=st.integers(0, 2**16),
)
def test_paths_of_any_width_equal_the_oracle(tokens, experts, top_k, width, hidden, seed):
    """Rows that are no multiple of 16 bytes, one token, experts without a token."""
    case = make_case(tokens, experts, min(top_k, experts), width, hidden, seed)
    expected = run_adapters(*case, mode="reference")
    for mode in ("dense", "segments", "gathered"):
        assert torch.allclose(run_adapters(*case, mode=mode), expected, atol=1e-5, rtol=1e-5), mode


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_stays_within_the_oracles_own_rounding(mode):
    """Values and gradients against fp64 of the same bf16 inputs: no path may be farther off than the oracle in bf16, give or take one part in five."""
    case = make_case(64, 8, 2, 16, 32, dtype=torch.bfloat16)
    cotangent = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    def errors(of):
        got = run_with_gradients(of, *case, cotangent)
        return [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True)]

    exact = run_with_gradients("reference", *[t.double() if t.is_floating_point() else t for t in case], cotangent.double())
    for name, error, allowed in zip(("out", "y", "down", "up", "weight"), errors(mode), errors("reference"), strict=True):
        assert error <= 1.2 * allowed + 1e-4, f"{name}: {error} against the oracle's {allowed}"
        assert error < 2**-6


@pytest.mark.parametrize("mode", ["reference", *MODES])
def test_all_tokens_on_one_expert_leaves_zero_gradients_not_none(mode):
    y, down, up, _, _ = make_case(6, 4, 1, 8, 16)
    index, weight = torch.full((6, 1), 2), torch.ones(6, 1)
    _, _, grad_down, grad_up, _ = run_with_gradients(mode, y, down, up, index, weight, torch.ones(6, 16))
    for expert in (0, 1, 3):
        assert not grad_down[expert].any()
        assert not grad_up[expert].any()
    assert grad_down[2].any()
    assert grad_up[2].any()


def test_gradient_of_a_plain_sum_reaches_grouped():
    """`.sum().backward()` hands out a stride-0 gradient, which grouped_mm refuses unless it is made contiguous."""
    y, down, up, index, weight = make_case(9, 4, 2, 8, 16)
    up.requires_grad_()
    run_adapters(y, down, up, index, weight, mode="grouped").sum().backward()
    assert up.grad.any()


def test_gradcheck_of_the_differentiable_modes():
    case = [t.double() if t.is_floating_point() else t for t in make_case(4, 3, 2, 4, 5)]
    y, down, up, index, weight = [t.requires_grad_() if t.is_floating_point() else t for t in case]
    for mode in ("reference", "dense", "segments"):
        assert torch.autograd.gradcheck(
            lambda *leaves, mode=mode: run_adapters(*leaves[:3], index, leaves[3], mode=mode), (y, down, up, weight)
        )


@pytest.mark.parametrize("mode", MODES)
def test_what_is_frozen_gets_no_gradient(mode):
    y, down, up, index, weight = make_case(9, 4, 2, 8, 16)
    up.requires_grad_()
    run_adapters(y, down, up, index, weight, mode=mode).sum().backward()
    assert up.grad.any()
    assert y.grad is down.grad is weight.grad is None
    y.requires_grad_()
    (grad,) = torch.autograd.grad(run_adapters(y, down, up.detach(), index, weight, mode=mode).square().sum(), y)
    assert grad.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_path_repeats_bit_for_bit(mode):
    case = make_case(200, 8, 2, 16, 32)
    cotangent = torch.randn(200, 32)
    first, second = (run_with_gradients(mode, *case, cotangent) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_guess_compiles_and_needs_no_measuring():
    assert guess_path(torch.empty(8, 128, 64, dtype=torch.bfloat16)) == "dense"
    assert guess_path(torch.empty(8, 256, 64, dtype=torch.bfloat16)) == "grouped"
    assert guess_path(torch.empty(8, 255, 64, dtype=torch.bfloat16)) == "dense"
    assert guess_path(torch.empty(8, 256, 64)) == "dense", "dynamo knows grouped_mm in bf16 alone"
    assert grouped_allowed(torch.empty(2, 8, 8, dtype=torch.bfloat16))
    assert not grouped_allowed(torch.empty(2, 4, 8, dtype=torch.bfloat16))


def test_auto_measures_only_what_can_run():
    few, many = torch.empty(7, 2, dtype=torch.int64), torch.empty(700, 2, dtype=torch.int64)
    bank = torch.empty(8, 16, 64)
    assert candidates(torch.empty(7, 64), bank, few, trained=False) == ["dense", "grouped", "segments", "gathered"]
    assert candidates(torch.empty(700, 64), bank, many, trained=False) == ["dense", "grouped", "segments"]
    assert candidates(torch.empty(7, 64), bank.double(), few, trained=False) == ["dense", "segments", "gathered"]
    assert candidates(torch.empty(7, 64), bank, few, trained=True) == ["dense", "grouped", "segments"]
    assert candidates(torch.empty(700, 64, device="meta"), bank.to("meta"), many.to("meta"), trained=False) == ["dense", "grouped"]
    widest = [candidates(torch.empty(t, 64), bank, torch.empty(t, 3, dtype=torch.int64), trained=False) for t in (17, 32)]
    assert widest[0] == widest[1], "one range of tokens, one set of candidates"
    assert "reference" in PATHS


@pytest.mark.parametrize("mode", ["dense", "grouped"])
def test_a_compiled_layer_has_one_graph_and_the_same_values(mode):
    dtype = torch.bfloat16 if mode == "grouped" else torch.float32
    case = make_case(24, 4, 2, 8, 16, dtype=dtype)
    compiled = torch.compile(lambda *tensors: run_adapters(*tensors, mode=mode), fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(24, 16, dtype=dtype)
    leaves = [tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor for tensor in case]
    out = compiled(*leaves)
    gradients = torch.autograd.grad(out, [leaf for leaf in leaves if leaf.is_floating_point()], cotangent)
    for got, want in zip((out, *gradients), run_with_gradients(mode, *case, cotangent), strict=True):
        assert torch.allclose(got, want, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_auto_compiles_without_measuring():
    case = make_case(24, 4, 2, 8, 16)
    compiled = torch.compile(lambda *tensors: run_adapters(*tensors, mode="auto"), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*case), run_adapters(*case, mode="reference"), atol=1e-5)


def test_a_pinned_mode_that_cannot_run_is_refused():
    case = make_case(3, 2, 1, 5, 8)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        run_adapters(*case, mode="grouped")
    with pytest.raises(ValueError, match="no dispatch 'fast'"):
        run_adapters(*case, mode="fast")
    case[1].requires_grad_()
    with pytest.raises(ValueError, match="no deterministic gradient"):
        run_adapters(*case, mode="gathered")


def test_segments_pinned_on_a_cpu_run_as_another_path_elsewhere():
    """The pin is in config.json; the model may be loaded on a GPU."""
    with torch.device("meta"):
        y, bank = torch.empty(5, 16), torch.empty(4, 8, 16)
        out = run_adapters(y, bank, bank, torch.empty(5, 2, dtype=torch.int64), torch.empty(5, 2), mode="segments")
    assert out.shape == (5, 16)


@pytest.mark.parametrize("mode", ["reference", *MODES])
def test_autocast_changes_no_path(mode):
    case = make_case(24, 4, 2, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_adapters(*case, mode=mode)
    assert torch.equal(out, run_adapters(*case, mode=mode))


@pytest.mark.parametrize("mode", ["auto", "gathered"])
def test_no_tokens_are_no_special_case(mode):
    run_adapters(*make_case(2, 4, 2, 8, 16), mode=mode)
    assert run_adapters(*make_case(0, 4, 2, 8, 16), mode=mode).shape == (0, 16)


def test_topk_then_softmax_equals_softmax_renormalised():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    index, weight = select_experts(logits, 3)
    full = logits.softmax(-1).gather(1, index)
    assert torch.allclose(weight, full / full.sum(-1, keepdim=True), atol=1e-6)
    assert weight.dtype == torch.float32
    assert select_experts(logits.bfloat16(), 3)[1].dtype == torch.float32


def test_bank_accepts_leading_dimensions_and_a_wider_input():
    bank = AdapterBank(16, 4, 8, scaling=0.25, name="layers.0.mlp.adapters", seed=1).to(torch.bfloat16)
    bank.reset_parameters()
    with torch.no_grad():
        bank.up.normal_()
    y = torch.randn(2, 5, 16)
    index, weight = select_experts(torch.randn(2, 5, 4), 2)
    out = bank(y, index, weight)
    assert out.shape == y.shape
    assert out.dtype == torch.float32
    bank.scaling = 1.0
    assert torch.allclose(out * 4, bank(y, index, weight), rtol=2**-6, atol=1e-3)


def test_start_values_depend_on_seed_and_name_alone():
    def router(name, seed):
        module = Router(64, 8, 2, name, seed)
        module.reset_parameters()
        return module.weight

    torch.manual_seed(0)
    first = router("layers.3.mlp.router", 42)
    torch.rand(5)
    assert torch.equal(first, router("layers.3.mlp.router", 42))
    assert not torch.equal(first, router("layers.4.mlp.router", 42))
    assert not torch.equal(first, router("layers.3.mlp.router", 43))
    assert first.abs().max() <= 1 / 8
    assert abs(first.std().item() * 8 * 3**0.5 - 1) < 0.1  # uniform on ±1/√H has standard deviation 1/√(3H)


def test_bank_starts_with_zero_up_and_kaiming_down():
    bank = AdapterBank(100, 4, 16, 1.0, "layers.0.mlp.adapters", 0)
    bank.reset_parameters()
    assert not bank.up.any()
    assert 0.099 < bank.down.abs().max() <= 0.1  # the fan-in is H, not R·H
