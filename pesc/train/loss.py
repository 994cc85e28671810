"""Cross-entropy over the supervised tokens, without a second copy of the logits.

N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import torch

_ROWS = 256


class _ScaledCrossEntropy(torch.autograd.Function):
    """scale · Σ_N (logsumexp(z) - z[target]) in fp32; its gradient is made in the same pass and kept in the logits' dtype."""

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, target_N: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        gradient_NV = torch.empty_like(logits_NV)
        for start in range(0, logits_NV.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            wide_NV = logits_NV[rows].float()
            target_N1 = target_N[rows, None]
            lse_N1 = wide_NV.logsumexp(dim=-1, keepdim=True)
            total += (lse_N1 - wide_NV.gather(1, target_N1)).sum()
            wide_NV.sub_(lse_N1).exp_()
            wide_NV.scatter_add_(1, target_N1, torch.full_like(lse_N1, -1.0))
            gradient_NV[rows] = wide_NV.mul_(scale)
        ctx.save_for_backward(gradient_NV)
        return total * scale

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * grad_total.to(gradient_NV.dtype), None, None


def scaled_cross_entropy(logits_NV: torch.Tensor, target_N: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale · Σ of the cross-entropy, a scalar in fp32; no rows give 0 with a gradient of zeros.

    The gradient is scaled before it is rounded to the logits' dtype, as autograd's would be: put every factor into `scale`.
    """
    return _ScaledCrossEntropy.apply(logits_NV, target_N, scale)
