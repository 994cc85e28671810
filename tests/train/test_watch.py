"""What a run says of itself: events survive a torn line, arithmetic is counted as the maps are, peaks are found by name."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from pesc.devices import peak_of
from pesc.stage import Execution
from pesc.train import watch
from pesc.train.flops import cost_of_token
from pesc.train.job import Job
from pesc.train.watch import append_event, summarize_experts
from tests.train import tiny


def test_a_line_torn_by_a_killed_process_does_not_take_the_next_one_with_it(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, "step", step=1)
    with path.open("a") as file:
        file.write('{"event": "st')
    append_event(path, "start", step=1)
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["step"] == json.loads(lines[2])["step"] == 1
    assert len(lines) == 3


def test_experts_in_three_numbers():
    load = {"max": [0.5, 0.75], "min": [0.1, 0.0], "entropy": [0.9, 0.7], "dead": [0, 1]}
    assert summarize_experts(load) == {"expert_max": 0.75, "expert_min": 0.0, "expert_entropy": 0.8}
    assert summarize_experts(None) == {}


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H200", 989), ("NVIDIA L40S", 362),
     ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165)],
)  # fmt: skip
def test_a_peak_is_found_by_the_devices_name(name, tera):
    assert peak_of(name) == tera * 1e12


def test_an_unknown_device_has_no_peak():
    assert peak_of("NVIDIA Tesla K80") is None


def test_a_dense_models_cost_is_torchs_own_count_of_the_same_products(dense_dir):
    """torch counts forward and backward of a frozen model of which one map is trained; attention and the vocabulary are taken off."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32, attn_implementation="sdpa")
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    cost = cost_of_token(model, 1, 1, recomputed=0.0)
    maps = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    x_TH = {m: torch.randn(16, m.in_features, requires_grad=True) for m in maps}
    with FlopCounterMode(display=False) as counter:
        for linear, values in x_TH.items():
            linear(values).sum().backward()
    assert cost.model == counter.get_total_flops() / 16
    assert cost_of_token(model, 1, 1, recomputed=1.0).hardware == pytest.approx(cost.model + 2 * sum(m.weight.numel() for m in maps))


def test_a_token_meets_two_of_four_experts(sparse_dir):
    import pesc.models

    pesc.models.register()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sparse_dir, dtype=torch.float32)
    both, four = (cost_of_token(model, k, 4, recomputed=0.0).model for k in (2, 4))
    bank = sum(p.numel() for n, p in model.named_parameters() if ".adapters." in n)
    assert four - both == pytest.approx(6 * bank / 2)


def test_a_full_disk_costs_events_and_not_the_run(tmp_path, caplog, monkeypatch):
    def full(*_a, **_k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watch, "append_event", full)
    job = Job("train[tiny]", tiny.settings(), Execution(trackers=()), tmp_path, tmp_path, tmp_path, "cpu", 2, logging.INFO)
    run = watch.RunWatch(0, job, lambda *_a, **_k: None)
    for step in (1, 2):
        run.step({"step": step, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 9}, 5.0)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "train[tiny]: events.jsonl lacks events from now on ([Errno 28] No space left on device)"
