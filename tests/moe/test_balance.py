"""The balance loss has a gradient, ranks collapse above balance, ignores padding and survives checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pesc.moe.balance import RouterRecorder, count_choices, routing_statistics, switch_loss, z_loss
from pesc.moe.config import PescConfig
from pesc.moe.layer import SparseMLP, sparse_parameters, widen_mlp

EXPERTS, TOP_K, HIDDEN = 8, 2, 16


class DenseMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.proj(x).tanh()


class Stack(nn.Module):
    """Two sparse layers, each of which can be recomputed in the backward pass."""

    def __init__(self, mode=None):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.ModuleList(DenseMLP() for _ in range(2))
        self.mode = mode
        for index, layer in enumerate(self.layers):
            widen_mlp(layer, PescConfig(EXPERTS, TOP_K, 8), HIDDEN, index)
            layer.router.reset_parameters()
            layer.adapters.reset_parameters()
            nn.init.normal_(layer.adapters.up, std=0.1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.mode is None else checkpoint(layer, x, use_reentrant=self.mode == "reentrant")
        return x


def balanced_logits(tokens=800):
    """Token t prefers experts t and t+1 (mod E): every expert gets the same share, every mean probability is the same."""
    logits = torch.zeros(tokens, EXPERTS)
    rows = torch.arange(tokens)
    logits[rows, rows % EXPERTS] = 3.0
    logits[rows, (rows + 1) % EXPERTS] = 3.0
    return logits


def test_balanced_routing_gives_k_and_collapsed_routing_gives_e():
    assert switch_loss(balanced_logits(), TOP_K).item() == pytest.approx(TOP_K, rel=1e-5)
    collapsed = torch.zeros(800, EXPERTS)
    collapsed[:, :TOP_K] = 12.0
    assert switch_loss(collapsed, TOP_K).item() == pytest.approx(EXPERTS, rel=1e-3)


def test_one_layer_equals_the_corrected_loss_of_mixtral():
    logits = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(0))
    assert switch_loss(logits, TOP_K).item() == pytest.approx(load_balancing_loss_func((logits,), EXPERTS, TOP_K).item(), rel=1e-5)


def test_the_gradient_lowers_the_logits_of_overloaded_experts():
    logits = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 2
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(switch_loss(logits, TOP_K), logits)
    assert gradient.abs().max() > 1e-4  # the reference implementation's is 0
    assert (gradient[:, 0] > 0).all()
    with torch.no_grad():
        assert switch_loss(logits - 10 * gradient, TOP_K) < switch_loss(logits, TOP_K)


def test_the_z_loss_is_the_square_of_the_log_partition_and_shrinks_logits():
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]], requires_grad=True)
    ln2 = torch.tensor(2.0).log().item()
    assert z_loss(logits).item() == pytest.approx((ln2**2 + (3 + ln2) ** 2) / 2)
    (gradient,) = torch.autograd.grad(z_loss(logits), logits)
    assert (gradient > 0).all()
    assert z_loss(torch.zeros(0, 4)).item() == 0


def test_choices_are_the_routers_own_with_its_bias():
    logits = balanced_logits(80)
    assert count_choices(logits, TOP_K).tolist() == [20.0] * EXPERTS
    bias = torch.zeros(EXPERTS)
    bias[3] = 100.0
    assert count_choices(logits, TOP_K, bias)[3] == 80
    assert routing_statistics(logits, TOP_K, bias).load[3] == 0.5


def test_the_recorder_sums_z_losses_and_counts_choices_by_layer():
    model, mask = Stack(), torch.tensor([[1, 1, 0]])
    with RouterRecorder(model) as recorder:
        model(torch.randn(1, 3, HIDDEN))
    expected = sum(logits[0, :2].logsumexp(-1).square().mean() for logits in recorder.logits.values())
    assert recorder.z_loss(mask).item() == pytest.approx(expected.item(), rel=1e-6)
    recorder.z_loss(mask).backward()
    assert all(layer.router.weight.grad.any() for layer in model.layers)
    assert [choices.sum().item() for choices in recorder.choices(mask).values()] == [2 * TOP_K] * 2


def test_padding_changes_neither_loss_nor_statistics():
    model, mask = Stack(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x = torch.randn(2, 5, HIDDEN)
    noisy = torch.where(mask[..., None].bool(), x, 100 * torch.randn_like(x))
    results = []
    for inputs in (x, noisy):
        with RouterRecorder(model) as recorder:
            model(inputs)
        results.append((recorder.balance_loss(mask), recorder.statistics(mask), recorder.balance_loss()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1]["layers.0.router"].tokens == 8
    assert not torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("padding", [0.0, 1e4, float("nan")], ids=["zeros", "large", "not a number"])
def test_masked_losses_are_those_of_the_tokens_that_count_alone(padding):
    logits, mask = torch.randn(9, EXPERTS, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1]).bool()
    padded = torch.where(mask[:, None], logits, padding).requires_grad_()
    total = switch_loss(padded, TOP_K, None, mask) + z_loss(padded, mask)
    alone = logits[mask].requires_grad_()
    expected = switch_loss(alone, TOP_K) + z_loss(alone)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    if padding == padding:
        (got,), (want,) = torch.autograd.grad(total, padded), torch.autograd.grad(expected, alone)
        assert torch.allclose(got[mask], want, atol=1e-7)
        assert not got[~mask].any()
    assert torch.equal(count_choices(padded, TOP_K, None, mask), count_choices(alone, TOP_K))


def test_a_mask_of_another_shape_is_refused():
    model = Stack()
    with RouterRecorder(model) as recorder:
        model(torch.randn(2, 5, HIDDEN))
    with pytest.raises(ValueError, match="mask has shape"):
        recorder.balance_loss(torch.ones(2, 4))


def test_a_batch_of_padding_alone_gives_zero_not_nan():
    model = Stack()
    with RouterRecorder(model) as recorder:
        model(torch.randn(1, 3, HIDDEN))
    loss = recorder.balance_loss(torch.zeros(1, 3))
    assert loss.item() == 0
    loss.backward()


def gradients_of_total_loss(model, inside):
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    with RouterRecorder(model) as recorder:
        out = model(x)
        loss = out.square().mean() + 0.5 * recorder.balance_loss(mask)
        recorded = dict(recorder.logits)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert all(recorder.logits[name] is logits for name, logits in recorded.items()), "the recomputation recorded a second time"
    assert len(recorder.logits) == 2
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("inside", [False, True], ids=["backward after the with", "backward inside it"])
def test_checkpointing_gives_the_same_gradient_and_counts_once(inside):
    plain = gradients_of_total_loss(Stack(), inside)
    recomputed = gradients_of_total_loss(Stack("non-reentrant"), inside)
    assert plain["layers.0.router.weight"].any()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], atol=1e-7), name


def test_the_balance_loss_alone_moves_the_router_through_a_checkpoint():
    model = Stack("non-reentrant")
    with RouterRecorder(model) as recorder:
        model(torch.randn(2, 5, HIDDEN).requires_grad_())
    recorder.balance_loss().backward()
    assert all(layer.router.weight.grad.any() for layer in model.layers)


def test_reentrant_checkpointing_is_refused_instead_of_losing_the_gradient():
    model = Stack("reentrant")
    with RouterRecorder(model) as recorder:
        model(torch.randn(2, 5, HIDDEN).requires_grad_())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        recorder.balance_loss()
    with torch.no_grad():
        assert recorder.balance_loss() > 0  # measuring without a gradient is allowed


def test_nothing_is_recorded_outside_and_hooks_are_removed_at_the_exit():
    model = Stack()
    recorder = RouterRecorder(model)
    with pytest.raises(RuntimeError, match="inside `with"):
        recorder.balance_loss()
    model(torch.randn(1, 2, HIDDEN))
    with recorder:
        model(torch.randn(1, 2, HIDDEN))
        with pytest.raises(RuntimeError, match="mat1"):
            model(torch.randn(1, 2, HIDDEN + 1))
    before = recorder.logits["layers.0.router"]
    model(torch.randn(1, 2, HIDDEN))
    assert recorder.logits["layers.0.router"] is before
    assert not any(layer.router._forward_hooks for layer in model.layers)


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="dense"):
        RouterRecorder(nn.Linear(2, 2))


def test_statistics_name_dead_experts_and_measure_entropy():
    even = routing_statistics(balanced_logits(), TOP_K)
    assert even.load == pytest.approx([1 / EXPERTS] * EXPERTS)
    assert even.entropy == pytest.approx(1.0)
    assert even.dead == ()
    collapsed = torch.zeros(10, EXPERTS)
    collapsed[:, [1, 5]] = 4.0
    lame = routing_statistics(collapsed, TOP_K)
    assert lame.dead == (0, 2, 3, 4, 6, 7)
    assert lame.load[1] == lame.load[5] == 0.5
    assert lame.entropy == pytest.approx(1 / 3)  # ln 2 / ln 8
    assert sum(lame.probability) == pytest.approx(1)


def test_the_mixin_adds_only_router_and_bank_to_the_parameters():
    model = Stack()
    assert all(isinstance(layer, SparseMLP) and isinstance(layer, DenseMLP) for layer in model.layers)
    assert [name for name, _ in sparse_parameters(model)] == [
        f"layers.{layer}.{name}" for layer in range(2) for name in ("router.weight", "adapters.down", "adapters.up")
    ]


def test_top_1_gate_weights_are_one_so_that_only_the_balance_loss_moves_the_router():
    mlp = DenseMLP()
    widen_mlp(mlp, PescConfig(4, 1, 8), HIDDEN, 0)
    mlp.router.reset_parameters()
    mlp.adapters.reset_parameters()
    nn.init.normal_(mlp.adapters.up)
    mlp(torch.randn(5, HIDDEN)).square().sum().backward()
    assert not mlp.router.weight.grad.any()
