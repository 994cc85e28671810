"""Cross-entropy over the supervised tokens: from hidden states in chunks, or from logits that exist already.

N supervised tokens, H hidden, V vocabulary, C rows of a chunk.

    loss = scale · Σ_N (logsumexp(z_N) - z_N[target_N]),  z_NV = hidden_NH · W_VH^T

`scaled_linear_cross_entropy` never holds [N, V]: each chunk's logits become its loss and its gradient in the same pass, and are overwritten
by the next.  What stays for the backward pass is [N, H] (and [V, H] in fp32 when W is trained).
"""

from __future__ import annotations

import torch

_CHUNK_ELEMENTS = 12 << 20
"""C·V at most: 48 MB of fp32 logits, large enough for a GEMM at full speed."""
_LEAST_ROWS = 32


def chunk_rows(vocabulary: int) -> int:
    """C: rows whose logits are held at once."""
    return max(_LEAST_ROWS, _CHUNK_ELEMENTS // vocabulary)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _loss_of_chunk(wide_CV: torch.Tensor, target_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ of the chunk's losses, and Σ_V exp(z - max) [C, 1]; overwrites the logits with exp(z - max)."""
    target_C1 = target_C[:, None]
    top_C1 = wide_CV.amax(dim=-1, keepdim=True)
    own_C1 = wide_CV.gather(1, target_C1).sub_(top_C1)
    sum_C1 = wide_CV.sub_(top_C1).exp_().sum(dim=-1, keepdim=True)
    return (sum_C1.log() - own_C1).sum(), sum_C1


def _gradient_of_chunk(wide_CV: torch.Tensor, sum_C1: torch.Tensor, target_C: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient scale · (softmax(z) - onehot(target)), in place of exp(z - max)."""
    scale = scale.to(wide_CV.dtype)
    wide_CV.mul_(scale / sum_C1)
    return wide_CV.scatter_add_(1, target_C[:, None], (-scale).expand_as(sum_C1))


class _ScaledCrossEntropy(torch.autograd.Function):
    """The loss of logits; its gradient is made in the same pass and kept in the logits' dtype."""

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, target_N: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=_wide(logits_NV.dtype), device=logits_NV.device)
        gradient_NV = torch.empty_like(logits_NV)
        rows = chunk_rows(max(1, logits_NV.shape[1]))
        for start in range(0, logits_NV.shape[0], rows):
            part = slice(start, start + rows)
            wide_CV = logits_NV[part].to(total.dtype, copy=True)
            loss, sum_C1 = _loss_of_chunk(wide_CV, target_N[part])
            total += loss
            gradient_NV[part] = _gradient_of_chunk(wide_CV, sum_C1, target_N[part], scale)
        ctx.save_for_backward(gradient_NV)
        return total * scale

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * grad_total.to(gradient_NV.dtype), None, None


class _ScaledLinearCrossEntropy(torch.autograd.Function):
    """The loss of hidden states and an output projection, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_N, scale, with_gradient: bool) -> torch.Tensor:
        wants_hidden, wants_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=_wide(hidden_NH.dtype), device=hidden_NH.device)
        dhidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=total.dtype) if wants_weight else None
        rows = chunk_rows(weight_VH.shape[0])
        for start in range(0, hidden_NH.shape[0], rows):
            part = slice(start, start + rows)
            wide_CV = (hidden_NH[part] @ weight_VH.T).to(total.dtype)
            loss, sum_C1 = _loss_of_chunk(wide_CV, target_N[part])
            total += loss
            if not (wants_hidden or wants_weight):
                continue
            dlogits_CV = _gradient_of_chunk(wide_CV, sum_C1, target_N[part], scale).to(hidden_NH.dtype)
            if dhidden_NH is not None:
                torch.mm(dlogits_CV, weight_VH, out=dhidden_NH[part])
            if dweight_VH is not None:
                dweight_VH += dlogits_CV.T @ hidden_NH[part]
        ctx.save_for_backward(dhidden_NH, dweight_VH.to(weight_VH.dtype) if dweight_VH is not None else None)
        return total * scale

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor):
        gradients = (None if kept is None else kept * grad_total.to(kept.dtype) for kept in ctx.saved_tensors)
        return *gradients, None, None, None


def scaled_cross_entropy(logits_NV: torch.Tensor, target_N: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale · Σ of the cross-entropy, a scalar in fp32; no rows give 0 with a gradient of zeros.

    The gradient is scaled before it is rounded to the logits' dtype, as autograd's would be: put every factor into `scale`.
    """
    return _ScaledCrossEntropy.apply(logits_NV, target_N, scale)


def scaled_linear_cross_entropy(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, target_N: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """`scaled_cross_entropy` of hidden · W^T without the logits; gradients reach hidden, and W when it is trained (tied or not).

    hidden and W share one dtype.  The sums over V, N and (for W) the chunks are in fp32, or in fp64 for fp64.
    """
    return _ScaledLinearCrossEntropy.apply(hidden_NH, weight_VH, target_N, scale, torch.is_grad_enabled())
