"""Cross-entropy from hidden states in chunks: torch's own numbers, without the logits; and which models it may be used for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pesc.train import loss as loss_module
from pesc.train.collator import NO_LOSS, Collator
from pesc.train.head import LossHead
from pesc.train.loss import chunk_rows, scaled_linear_cross_entropy


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("rows", [1, 31, 32, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_it_is_torchs_cross_entropy_of_the_projection(rows, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 32 * 97)
    torch.manual_seed(0)
    hidden, weight = (3 * torch.randn(rows, 16)).to(dtype), torch.randn(97, 16).to(dtype)
    target, scale = torch.randint(97, (rows,)), torch.tensor(1 / 37.0, dtype=torch.float64)
    ours, theirs = [[tensor.detach().clone().to(kind).requires_grad_() for tensor in (hidden, weight)] for kind in (dtype, torch.float64)]
    loss = scaled_linear_cross_entropy(*ours, target, scale.to(torch.promote_types(dtype, torch.float32)))
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, target, reduction="sum") * scale
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    (2 * loss).backward()
    (2 * expected).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=tolerance, atol=tolerance * other.grad.abs().max().item())


def test_the_logits_never_exist_at_once_and_only_the_hidden_gradient_is_kept():
    vocabulary, rows, width = 50_000, 2_000, 8
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width)
    kept = []
    with _Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = scaled_linear_cross_entropy(hidden, weight, torch.randint(vocabulary, (rows,)), torch.tensor(1.0))
    loss.backward()
    assert largest.elements <= max(chunk_rows(vocabulary) * vocabulary, weight.numel()) < rows * vocabulary / 4
    assert kept == [hidden.numel()]


def test_no_supervised_token_costs_nothing_and_moves_nothing():
    hidden = torch.randn(0, 4, requires_grad=True)
    loss = scaled_linear_cross_entropy(hidden, torch.randn(7, 4), torch.zeros(0, dtype=torch.long), torch.tensor(1.0))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, 4)


def _model(kind: str, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields | changes))


@pytest.mark.parametrize(
    ("kind", "changes", "chunked"),
    [
        ("llama", {}, True), ("mistral", {}, True), ("qwen2", {}, True), ("qwen3", {}, True), ("gemma", {}, True),
        ("gemma2", {"final_logit_softcapping": 30.0}, False), ("granite", {"logits_scaling": 8.0}, False), ("cohere", {}, False),
        ("phi", {}, False),
    ],
)  # fmt: skip
def test_chunks_serve_models_that_give_their_heads_logits_and_no_other(kind, changes, chunked):
    model = _model(kind, **changes)
    tokens = torch.arange(9)[None]
    before = model(input_ids=tokens).logits
    head = LossHead.of(model)
    assert (head is not None) == chunked
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_gives_the_loss_and_all_gradients_of_the_logits(tied):
    model = _model("llama", tie_word_embeddings=tied).double()
    tokens, rows = torch.randint(97, (2, 11)), torch.tensor([0, 3, 7, 12, 21])
    target = torch.randint(97, (5,))
    expected = F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1)[rows], target, reduction="sum") / 5
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    head = LossHead.of(model)
    with head.scoring(rows, target, torch.tensor(1 / 5, dtype=torch.float64)):
        loss = head.loss_of(model(input_ids=tokens))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_lora_on_the_head_keeps_the_logits():
    model = _model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    assert LossHead.of(model) is None


@pytest.mark.parametrize("choose", [True, False])
def test_the_batch_carries_the_numbers_that_the_step_needs(choose):
    rows = [[NO_LOSS, 6, NO_LOSS, 8, NO_LOSS], [NO_LOSS, NO_LOSS, 3]]
    items = [
        {"input_ids": torch.arange(len(row)).numpy(), "labels": torch.tensor(row).numpy(), "position_ids": torch.arange(len(row)).numpy()}
        for row in rows
    ]
    batch = Collator(choose_logits=choose)([{**item, "position": 4} for item in items])
    assert (batch["position"], batch["tokens"], batch["supervised"]) == (4, 8, 3)
    assert batch["targets_N"].tolist() == [6, 8, 3]
    assert batch["kept_K"].tolist() == ([0, 1, 2] if choose else [0, 1, 2, 3, 4])
    assert batch["targets"][:, batch["kept_K"]].flatten()[batch["rows_N"]].tolist() == [6, 8, 3]


LOADER = """
import sys
from pathlib import Path
import torch
from pesc.train.blocks import PackedBlocks
from pesc.train.collator import Collator, OrderedBlocks, loading
from pesc.train.order import BlockOrder, RankBatches
blocks = PackedBlocks(Path(sys.argv[1]))
data = OrderedBlocks(blocks, BlockOrder(len(blocks), 7), 12)
def read(settings):
    loader = torch.utils.data.DataLoader(data, batch_sampler=RankBatches(3, 4, 2, 0, 1), collate_fn=Collator(), **settings)
    return [{name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()} for batch in loader]
beside_a_gpu = loading("cuda", 2)
assert beside_a_gpu.pop("pin_memory")
assert beside_a_gpu["num_workers"]
there, here = read(beside_a_gpu), read(loading("cpu", 2))
assert there == here
print(len(here))
"""


def test_a_loader_process_gives_the_same_batches(blocks_dir):
    """In an interpreter of its own: a fork of one that has run a server ends as the server's threads and exit handlers would have it."""
    done = subprocess.run([sys.executable, "-c", LOADER, str(blocks_dir)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "6"
