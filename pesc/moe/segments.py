"""`segments`: sorted assignments, one plain GEMM an expert, and the backward pass written out.

T tokens, H hidden, E experts, K active experts, R adapter width; N = T·K assignments sorted by expert, segment e the rows of expert e.

    z_NR = y_N · D_e^T          a_NR = w · GELU(z)          out_T = Σ_K a_N · U_e
    da = g_N · U_e^T            dw = Σ_R da · GELU(z)       dz = w · da · GELU'(z)
    dU_e = a^T · g_N            dD_e = dz^T · y_N           dy_T = Σ_K dz · D_e

Rows are gathered one segment at a time, so that they are in the cache when the GEMM reads them and no [N, H] copy of y is kept for the
backward pass; GELU is computed again there.  Only z (R-wide) is saved.

Pitfalls
- It reads the segments' lengths on the host: on CUDA that would be a wait in every layer, so `pesc.moe.dispatch` never offers it there.
- It has no second derivative, and dynamo cannot trace it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def run_segments(y_TH, down_ERH, up_ERH, index_TK, gate_TK):
    """The weighted sum of the chosen adapters' outputs, [T, H] in y's dtype."""
    return _Segments.apply(y_TH, down_ERH, up_ERH, index_TK, gate_TK)


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_TH, down_ERH, up_ERH, index_TK, gate_TK):
        order_N = index_TK.flatten().sort(stable=True).indices
        bounds = _bounds(index_TK, down_ERH.shape[0])
        token_N = order_N // index_TK.shape[1]
        weight_N = gate_TK.flatten()[order_N].to(down_ERH.dtype)

        hidden_NR = y_TH.new_empty(token_N.numel(), down_ERH.shape[1])
        for expert, segment in bounds:
            torch.mm(y_TH.index_select(0, token_N[segment]), down_ERH[expert].T, out=hidden_NR[segment])
        gated_NR = F.gelu(hidden_NR).mul_(weight_N[:, None])
        rows_NH = y_TH.new_empty(token_N.numel(), y_TH.shape[1])
        for expert, segment in bounds:
            torch.mm(gated_NR[segment], up_ERH[expert], out=rows_NH[segment])

        ctx.bounds, ctx.gate_dtype = bounds, gate_TK.dtype
        ctx.save_for_backward(y_TH, down_ERH, up_ERH, hidden_NR, weight_N, order_N)
        ctx.shape = index_TK.shape
        return _sum_rows(rows_NH, order_N, index_TK.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        y_TH, down_ERH, up_ERH, hidden_NR, weight_N, order_N = ctx.saved_tensors
        token_N = order_N // ctx.shape[1]
        active_NR = F.gelu(hidden_NR)
        dgated_NR, dup_ERH = _backward_up(grad_TH, up_ERH, active_NR * weight_N[:, None], token_N, ctx.bounds, ctx.needs_input_grad[2])
        dgate_TK = None
        if ctx.needs_input_grad[4]:
            dweight_N = (dgated_NR * active_NR).sum(dim=1).to(ctx.gate_dtype)
            dgate_TK = torch.empty_like(dweight_N).scatter_(0, order_N, dweight_N).view(ctx.shape)
        dhidden_NR = torch.ops.aten.gelu_backward(dgated_NR.mul_(weight_N[:, None]), hidden_NR)
        dy_NH, ddown_ERH = _backward_down(dhidden_NR, y_TH, down_ERH, token_N, ctx.bounds, ctx.needs_input_grad[:2])
        dy_TH = _sum_rows(dy_NH, order_N, ctx.shape) if dy_NH is not None else None
        return dy_TH, ddown_ERH, dup_ERH, None, dgate_TK


def _bounds(index_TK: torch.Tensor, num_experts: int) -> list[tuple[int, slice]]:
    """Expert and rows of each segment that is not empty."""
    counts = torch.bincount(index_TK.flatten(), minlength=num_experts).tolist()
    return list(_slices(counts))


def _slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _sum_rows(rows_NH: torch.Tensor, order_N: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The K rows of each token summed in the order of its choices, [T, H]."""
    rank_TK = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device)).view(shape)
    return F.embedding_bag(rank_TK, rows_NH, mode="sum")


def _backward_up(grad_TH, up_ERH, gated_NR, token_N, bounds, wants_up):
    """Gradients of the gated activations [N, R] and, if wanted, of `up`."""
    dgated_NR = torch.empty_like(gated_NR)
    dup_ERH = torch.zeros_like(up_ERH) if wants_up else None
    for expert, segment in bounds:
        grad_SH = grad_TH.index_select(0, token_N[segment])
        torch.mm(grad_SH, up_ERH[expert].T, out=dgated_NR[segment])
        if dup_ERH is not None:
            torch.mm(gated_NR[segment].T, grad_SH, out=dup_ERH[expert])
    return dgated_NR, dup_ERH


def _backward_down(dhidden_NR, y_TH, down_ERH, token_N, bounds, wanted):
    """Gradients of y's rows [N, H] and of `down`, each if wanted."""
    wants_y, wants_down = wanted
    dy_NH = y_TH.new_empty(token_N.numel(), y_TH.shape[1]) if wants_y else None
    ddown_ERH = torch.zeros_like(down_ERH) if wants_down else None
    for expert, segment in bounds:
        if ddown_ERH is not None:
            torch.mm(dhidden_NR[segment].T, y_TH.index_select(0, token_N[segment]), out=ddown_ERH[expert])
        if dy_NH is not None:
            torch.mm(dhidden_NR[segment], down_ERH[expert], out=dy_NH[segment])
    return dy_NH, ddown_ERH
