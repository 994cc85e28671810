"""Options beyond the paper: what each computes, and that none of them changes the start."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pesc.moe.config import PescConfig
from pesc.moe.layer import SparseMLP, widen_mlp
from pesc.moe.router import Router, select_experts

HIDDEN = 16


class DenseMLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.proj(x).tanh()


def make_layer(awake=True, layer=0, **options):
    mlp = DenseMLP()
    widen_mlp(mlp, PescConfig(4, 2, 8, **options), HIDDEN, layer)
    if isinstance(mlp, SparseMLP):
        mlp.router.reset_parameters()
        mlp.adapters.reset_parameters()
        for name, parameter in mlp.adapters.named_parameters():
            if awake and name.endswith("up"):
                nn.init.normal_(parameter, std=0.5)
    return mlp


def expected_output(mlp, x, adapters_read, bias=None):
    """The layer written out for one token at a time."""
    y = DenseMLP.forward(mlp, x)
    read, bank = {"y": y, "x": x}[adapters_read], mlp.adapters
    rows = []
    for t in range(len(x)):
        logits = mlp.router.weight @ x[t]
        chosen = (logits if bias is None else logits + bias).topk(2).indices
        weights = logits[chosen].softmax(0)
        out = y[t].clone()
        for weight, e in zip(weights, chosen, strict=True):
            out += bank.scaling * weight * (F.gelu(bank.down[e] @ read[t]) @ bank.up[e])
        if bank.shared_dim:
            out += bank.scaling * (F.gelu(bank.shared_down @ read[t]) @ bank.shared_up)
        rows.append(out)
    return torch.stack(rows)


OPTIONS = {
    "paper": {},
    "ffn_input": {"adapter_input": "ffn_input"},
    "shared": {"shared_adapter_dim": 12},
    "shared, scaled": {"shared_adapter_dim": 12, "scaling": 0.25},
    "bias": {"bias_update_rate": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_computes_what_it_says(options):
    mlp, x = make_layer(**options), torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    bias = None
    if mlp.router.bias_steps is not None:
        mlp.router.bias_steps.copy_(torch.tensor([3, -2, 0, 1]))
        bias = torch.tensor([1.5, -1.0, 0.0, 0.5])
    expected = expected_output(mlp, x, "x" if options.get("adapter_input") == "ffn_input" else "y", bias)
    assert torch.allclose(mlp(x), expected, atol=1e-5)
    if options:
        assert not torch.allclose(expected, expected_output(make_layer(), x, "y"), atol=1e-3), "the option must matter"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_starts_as_the_dense_layer(options):
    x = torch.randn(9, HIDDEN)
    assert torch.equal(make_layer(awake=False, **options)(x), DenseMLP()(x))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_of_an_option_gets_a_gradient(options):
    mlp = make_layer(**options)
    mlp(torch.randn(64, HIDDEN)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in mlp.parameters())


def test_layers_have_their_own_number_of_experts_and_none_leaves_one_dense():
    config = dict(layer_experts=(2, 0, 6))
    two, none, six = (make_layer(layer=layer, **config) for layer in range(3))
    assert two.adapters.down.shape == (2, 8, HIDDEN)
    assert six.router.weight.shape == (6, HIDDEN)
    assert type(none) is DenseMLP
    with pytest.raises(ValueError, match="names 3 layers, but the model has a layer 3"):
        make_layer(layer=3, **config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_experts": [4, 1]}, r"layer_experts\[1\] is 1, fewer than pesc\.top_k"),
        ({"layer_experts": [0, 0]}, "leaves every layer dense"),
        ({"layer_experts": [4, 2.5]}, r"layer_experts\[1\] must be a whole number"),
        ({"layer_experts": 5}, "layer_experts must be a list of one number a layer, not 5"),
        ({"adapter_input": "both"}, "adapter_input must be one of ffn_output, ffn_input"),
        ({"shared_adapter_dim": -1}, "shared_adapter_dim must be a whole number of at least 0"),
        ({"bias_update_rate": float("inf")}, "bias_update_rate must be a number of at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PescConfig.from_dict(fields)


def test_a_config_of_the_paper_says_nothing_of_options_and_others_survive_json():
    import json

    assert set(PescConfig().to_dict()) == {"num_experts", "top_k", "adapter_dim", "scaling", "seed", "dispatch"}
    config = PescConfig(layer_experts=(8, 4), shared_adapter_dim=32, adapter_input="ffn_input", bias_update_rate=0.001)
    assert PescConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ---- the router's bias and jitter


def make_router(**options):
    router = Router(HIDDEN, 4, 2, "layers.0.mlp.router", 0, **options)
    router.reset_parameters()
    return router


def test_the_bias_chooses_and_does_not_weigh():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    index, weight = select_experts(logits, 2, torch.tensor([0.0, 0.0, 0.0, 9.0]))
    assert index.tolist() == [[3, 0]]
    assert torch.allclose(weight, torch.tensor([[0.0, 3.0]]).softmax(-1))
    assert torch.equal(select_experts(logits, 2, torch.zeros(4))[1], select_experts(logits, 2)[1])


def test_the_bias_rises_for_the_idle_and_falls_for_the_overloaded():
    router = make_router(bias_update_rate=0.001)
    router.update_bias(torch.tensor([10.0, 0, 5, 5]))
    router.update_bias(torch.tensor([10.0, 0, 5, 5]))
    assert router.bias_steps.tolist() == [-2, 2, 0, 0]
    assert torch.allclose(router.selection_bias, torch.tensor([-0.002, 0.002, 0, 0]))
    with pytest.raises(ValueError, match="no selection bias"):
        make_router().update_bias(torch.ones(4))


def test_a_thousand_small_steps_survive_half_precision():
    """A bf16 bias would stop growing at 0.25: its steps of 0.001 are below half a unit there."""
    router = make_router(bias_update_rate=0.001).to(torch.bfloat16)
    for _ in range(1000):
        router.update_bias(torch.tensor([1.0, 0, 0.5, 0.5]))
    assert router.selection_bias.tolist() == pytest.approx([-1, 1, 0, 0])


def test_bias_balancing_evens_out_a_router_that_prefers_one_expert():
    router, generator = make_router(bias_update_rate=0.05), torch.Generator().manual_seed(1)
    lean = torch.tensor([3.0, 0, 0, -2])

    def loads():
        logits = torch.randn(4000, 4, generator=generator) + lean
        return F.one_hot(router.select(logits)[0], 4).sum(dim=(0, 1)).float()

    before = loads()
    for _ in range(200):
        router.update_bias(loads())
    after = loads()
    assert before.max() > 3 * before.min()
    assert after.max() < 1.15 * after.min()


def test_jitter_acts_in_training_alone_and_repeats_with_its_seed():
    router, x = make_router(), torch.randn(7, HIDDEN)
    plain = router(x)
    router.jitter = 0.1
    torch.manual_seed(5)
    first = router(x)
    torch.manual_seed(5)
    assert torch.equal(first, router(x))
    assert 0 < (first - plain).norm() / plain.norm() < 0.1
    router.eval()
    assert torch.equal(router(x), plain)


@pytest.mark.parametrize("mode", [True, False], ids=["reentrant", "non-reentrant"])
def test_jitter_is_the_same_when_it_is_recomputed(mode):
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for recompute in (False, True):
        mlp, x = make_layer(), torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
        mlp.router.jitter = 0.3
        torch.manual_seed(4)
        out = checkpoint(mlp, x, use_reentrant=mode) if recompute else mlp(x)
        out.square().sum().backward()
        gradients.append((x.grad, mlp.router.weight.grad))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
