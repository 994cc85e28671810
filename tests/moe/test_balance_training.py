"""What balancing is for: without it experts die while a model trains, with either kind all stay alive.

Two sparse layers learn to imitate a teacher; the router starts with a lean towards two experts, as random starts have by chance.
"""

import pytest
import torch
from torch import nn

from pesc.moe.balance import RouterRecorder
from pesc.moe.config import PescConfig
from pesc.moe.layer import widen_mlp

EXPERTS, TOP_K, HIDDEN, STEPS = 8, 2, 16, 300


class DenseMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.proj(x).tanh()


def train(kind, seed=0):
    """Routing statistics of a held-out batch after training, by layer; and the last loss."""
    torch.manual_seed(seed)
    teacher, layers = nn.Sequential(nn.Linear(HIDDEN, 64), nn.GELU(), nn.Linear(64, HIDDEN)), [DenseMLP() for _ in range(2)]
    model = nn.Sequential(*layers)
    for index, layer in enumerate(layers):
        widen_mlp(layer, PescConfig(EXPERTS, TOP_K, 8, dispatch="dense", bias_update_rate=0.02 if kind == "bias" else 0.0), HIDDEN, index)
        layer.router.reset_parameters()
        layer.adapters.reset_parameters()
        with torch.no_grad():
            layer.router.weight[:TOP_K] *= 6  # loud experts: chosen for one half of the inputs or the other
            layer.router.weight[TOP_K:] *= 0.2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        x = torch.randn(128, HIDDEN) + 0.8
        with RouterRecorder(model) as recorder:
            loss = (model(x) - teacher(x).detach()).square().mean()
        total = loss + 0.01 * recorder.balance_loss() if kind == "switch" else loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if kind == "bias":
            for name, choices_E in recorder.choices().items():
                recorder.routers[name].update_bias(choices_E)
    with torch.no_grad(), RouterRecorder(model.eval()) as recorder:
        model(torch.randn(2000, HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.8)
    return list(recorder.statistics().values()), loss.item()


def least_load(kind):
    """The smallest share of all assignments that any expert of any layer gets, over three seeds (balanced: 1/8)."""
    return min(min(layer.load) for seed in range(3) for layer in train(kind, seed)[0])


@pytest.mark.parametrize("kind", ["switch", "bias"])
def test_balancing_keeps_every_expert_alive_where_without_it_some_die(kind):
    idle, alive = least_load("none"), least_load(kind)
    print(f"least load of an expert: {idle:.4f} without balancing, {alive:.4f} with {kind}")
    assert idle < 0.005, "without balancing, an expert should have been left with next to nothing"
    assert alive > 0.25 / EXPERTS
