from __future__ import annotations

import pytest
import torch

from pesc.train.loss import scaled_cross_entropy


@pytest.mark.parametrize(
    ("rows", "dtype", "tolerance"), [(1, torch.float32, 1e-6), (700, torch.float32, 1e-6), (300, torch.bfloat16, 1e-2)]
)
def test_it_is_torchs_cross_entropy(rows, dtype, tolerance):
    torch.manual_seed(0)
    logits = (4 * torch.randn(rows, 97)).to(dtype)
    target, scale = torch.randint(97, (rows,)), torch.tensor(1 / 37.0)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = scaled_cross_entropy(ours, target, scale)
    expected = torch.nn.functional.cross_entropy(theirs.float(), target, reduction="sum") * scale
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance * 1e-2)


def test_a_factor_behind_it_reaches_the_gradient():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    (3 * scaled_cross_entropy(logits, torch.arange(5), torch.tensor(1.0))).backward()
    expected = logits.detach().softmax(-1) - torch.eye(5, 7)
    torch.testing.assert_close(logits.grad, 3 * expected.double(), rtol=1e-5, atol=1e-5)


def test_no_supervised_token_costs_nothing_and_moves_nothing():
    weight = torch.randn(7, 4, requires_grad=True)
    loss = scaled_cross_entropy(torch.zeros(0, 4) @ weight.T, torch.zeros(0, dtype=torch.long), torch.tensor(1.0))
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad.abs().max() == 0.0
