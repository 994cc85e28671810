"""Arithmetic of a training step: what the model's share of a device's peak (`pesc.devices`) is counted by.

Multiplications and additions of the products of weights and activations; a weight of a linear map costs a token 2 in the forward pass,
2 for the gradient of its input and, where it is trained, 2 for its own.  Recomputed activations cost another 2 and count for the
hardware's use (hfu), not for the model's (mfu).  Of E experts a token meets K.  Left out: the products of attention, and the
vocabulary projection (most positions of a prompt never meet it); so both are lower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TokenCost:
    """FLOPs of one token in a training step.  model: forward and backward; hardware: and what is recomputed."""

    model: float
    hardware: float


def cost_of_token(model: nn.Module, top_k: int, num_experts: int, recomputed: float) -> TokenCost:
    """The cost, before ZeRO-3 takes the weights apart.

    top_k, num_experts: share of the stacked expert weights [E, …] that a token meets; 1 and 1 for a dense model.
    recomputed: share of the forward pass that is done twice, `pesc.stage.RECOMPUTED`.
    """
    frozen = trained = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):  # 4-bit weights are packed: the shape of the map says how many there are
            if name.rpartition(".")[2] == "lm_head" or ".lm_head." in name:
                continue
            size = float(module.in_features * module.out_features)
            is_trained = module.weight.requires_grad
        elif isinstance(module, nn.Embedding):
            continue
        else:
            own = [p for p in module.parameters(recurse=False) if p.dim() in (2, 3)]
            size = sum(p.numel() * (top_k / num_experts if p.dim() == 3 else 1.0) for p in own)
            is_trained = any(p.requires_grad for p in own)
        trained, frozen = (trained + size, frozen) if is_trained else (trained, frozen + size)
    forward = 2 * (frozen + trained)
    cost = 4 * frozen + 6 * trained
    return TokenCost(cost, cost + recomputed * forward)
