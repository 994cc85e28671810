from __future__ import annotations

import pytest
import torch
from torch import nn

from pesc.errors import TrainingFailedError
from pesc.train.callbacks import GradientWatch, History, Routing, StepTotals, Throughput, summarize_load


def leave(_tensor):
    """One rank alone has nothing to reduce."""


class Branches(nn.Module):
    """`used` is always used, `late` from a step on, `never` never."""

    def __init__(self):
        super().__init__()
        self.lora_A_used, self.lora_A_late, self.lora_A_never = (nn.Parameter(torch.ones(3)) for _ in range(3))

    def forward(self, late):
        return self.lora_A_used.sum() + (self.lora_A_late * late).sum()


def train(model, watch, steps, late=lambda step: 0.0):
    for step in range(steps):
        model(late(step)).backward()
        watch.end_step(leave)


def test_a_tensor_without_a_gradient_is_named_after_the_first_step():
    model = Branches()
    with pytest.raises(TrainingFailedError, match=r"lora_A_never is declared trainable but got no gradient at all in the first step"):
        train(model, GradientWatch(model, 10, torch.device("cpu")), 1)


def test_a_gradient_of_zeros_is_forgiven_at_first_and_named_in_the_end():
    model = Branches()
    model.lora_A_never.requires_grad_(False)
    train(model, GradientWatch(model, 10, torch.device("cpu")), 10, late=lambda step: float(step == 7))
    with pytest.raises(TrainingFailedError, match=r"lora_A_late is declared .* zeros in each of the first 8 steps"):
        train(model, GradientWatch(model, 10, torch.device("cpu")), 10, late=lambda step: float(step == 8))
    with pytest.raises(TrainingFailedError, match="first 5 steps"):
        train(model, GradientWatch(model, 5, torch.device("cpu")), 5)


def test_a_very_short_run_is_not_blamed_for_zeros_and_hooks_are_removed():
    model = Branches()
    model.lora_A_never.requires_grad_(False)
    watch = GradientWatch(model, 2, torch.device("cpu"))
    train(model, watch, 2)
    assert watch._handles == []


def test_a_gradient_on_another_rank_counts():
    model = Branches()
    GradientWatch(model, 1, torch.device("cpu")).end_step(lambda flags: flags.fill_(1.0))


class Bank(nn.Module):
    """Two layers of three experts; a token of the layer takes the experts it is given."""

    def __init__(self):
        super().__init__()
        layer = lambda: nn.ModuleDict({"mlp": nn.ModuleDict({"adapters": Adapters()})})  # noqa: E731
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, chosen):
        return sum(layer["mlp"]["adapters"](experts) for layer, experts in zip(self.layers, chosen, strict=True))


class Adapters(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.ones(3, 2, 4)), nn.Parameter(torch.ones(3, 2, 4))

    def forward(self, experts):
        return (self.down[experts] * self.up[experts]).sum()


@pytest.mark.parametrize("tells", [True, False])
def test_an_expert_that_nothing_reaches_is_warned_of_by_layer_once_and_the_run_goes_on(caplog, tells):
    model = Bank()
    for name, parameter in model.named_parameters():
        assert name.startswith("layers.")
        assert parameter.ndim == 3
    watch = GradientWatch(model, 10, torch.device("cpu"), patience=4, tells=tells)
    for step in range(6):
        model([[0, 2], [step % 2]]).backward()
        watch.end_step(leave)
    sentences = [record.getMessage() for record in caplog.records]
    assert len(sentences) == tells
    if tells:
        assert "expert 1 of layer 0, expert 2 of layer 1 in the first 4 steps" in sentences[0]


def test_an_expert_that_another_rank_reaches_is_not_warned_of(caplog):
    model = Bank()
    train(lambda _: model([[0], [1]]), GradientWatch(model, 4, torch.device("cpu"), patience=4), 4)
    assert "expert 1 of layer 0, expert 2 of layer 0, expert 0 of layer 1" in caplog.text
    caplog.clear()
    watch = GradientWatch(model, 4, torch.device("cpu"), patience=4)
    for _ in range(4):
        model([[0], [1]]).backward()
        watch.end_step(lambda flags: flags.fill_(1.0))
    assert not caplog.records


def test_totals_add_up_and_start_anew():
    totals = StepTotals(torch.device("cpu"), [4, 3])
    for share in (0.5, 0.25):
        routing = Routing(torch.tensor(share * 2), torch.tensor(share * 4), [torch.tensor([1.0, 1, 1, 1]), torch.tensor([4.0, 0, 0])])
        totals.add(torch.tensor(share), 10, routing)
    taken, choices = totals.take(leave)
    assert (taken["loss"], taken["balance"], taken["z"], taken["tokens"]) == (0.75, 1.5, 3.0, 20)
    assert taken["experts"] == {"max": [0.25, 1.0], "min": [0.25, 0.0], "entropy": [1.0, 0.0], "dead": [0, 2]}
    assert [part.tolist() for part in choices] == [[2, 2, 2, 2], [8, 0, 0]]
    assert totals.take(leave)[0]["loss"] == 0.0
    taken, choices = StepTotals(torch.device("cpu"), []).take(leave)
    assert "balance" not in taken
    assert choices == []


def test_load_of_no_tokens_is_all_dead():
    assert summarize_load([[0.0] * 4])["dead"] == [4]


def test_history_survives_a_checkpoint(tmp_path):
    history, again = History(), History()
    history.lines = [{"step": 1, "loss": 0.1 + 0.2}]
    history.save(tmp_path)
    again.load(tmp_path)
    assert again.lines == history.lines


def test_throughput_leaves_out_the_first_step():
    throughput = Throughput()
    throughput.end_step(10**9)
    assert throughput.tokens_per_second == 0.0
    throughput.end_step(50)
    assert throughput.tokens == 50
    assert throughput.tokens_per_second > 0
