"""The ways to compute Σ_K w · U_e · GELU(D_e · y) over a bank of small adapters, as plain functions of equal signature.

T tokens, H hidden, E experts, K active experts, R adapter width; N = T·K assignments of a token to an expert.

    reference  one expert at a time, gathered and added back: E host syncs on CUDA.  The oracle of the tests; any dtype and shape.
    dense      all experts on all tokens in two GEMMs, the gate weight (zero for unused experts) on the activations between them.
               E/K times the adapters' FLOPs, but no sort, no sync, the same kernels whatever the routing is.
    grouped    assignments sorted by expert, two `grouped_mm` over the segments.  The least FLOPs; rows of 16-byte multiples.
    segments   the same with one plain GEMM an expert and a backward pass of its own (`pesc.moe.segments`); CPU only: it reads the counts.
    gathered   the K adapters of each token copied side by side, two batched GEMVs.  For the few tokens of decoding; no gradients.

All apply the gate weight to the R-wide activations, not to the H-wide outputs: less to read and write, the same sum.  No sum is left to
atomic adds on one address, in forward or backward, so that results repeat bit for bit on one machine.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_ALIGNMENT = 16


def grouped_allowed(down_ERH: torch.Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes this bank: dtype, row length, device."""
    if not hasattr(F, "grouped_mm") or down_ERH.dtype not in _GROUPED_DTYPES:
        return False
    if down_ERH.is_cuda and torch.cuda.get_device_capability(down_ERH.device) < (8, 0):
        return False
    size = down_ERH.element_size()
    return all(width * size % _GROUPED_ALIGNMENT == 0 for width in down_ERH.shape[1:])


def run_reference(y_TH, down_ERH, up_ERH, index_TK, gate_TK):
    """One expert at a time.  An expert that no token chose gets a zero gradient, not none: its (empty) product is in the graph."""
    out_TH = torch.zeros_like(y_TH)
    for expert in range(down_ERH.shape[0]):
        token_N, slot_N = torch.where(index_TK == expert)
        hidden_NR = F.gelu(F.linear(y_TH[token_N], down_ERH[expert]))
        gated_NR = hidden_NR * gate_TK[token_N, slot_N, None].to(hidden_NR.dtype)
        out_TH = out_TH.index_add(0, token_N, gated_NR @ up_ERH[expert])
    return out_TH


def run_dense(y_TH, down_ERH, up_ERH, index_TK, gate_TK):
    """Every expert on every token.  The bank is read as [E·R, H]: two GEMMs."""
    num_experts, adapter_dim, hidden = down_ERH.shape
    gate_TE = torch.zeros(y_TH.shape[0], num_experts, dtype=gate_TK.dtype, device=y_TH.device).scatter(1, index_TK, gate_TK)
    hidden_TER = F.gelu(F.linear(y_TH, down_ERH.reshape(-1, hidden))).unflatten(1, (num_experts, adapter_dim))
    gated_TER = hidden_TER * gate_TE[:, :, None].to(hidden_TER.dtype)
    return gated_TER.flatten(1) @ up_ERH.reshape(-1, hidden)


def run_gathered(y_TH, down_ERH, up_ERH, index_TK, gate_TK):
    """Each token's own K adapters side by side as one matrix [K·R, H].  Copies K·R·H values a token: for a handful of tokens.

    Decoding is made of few, small operations: GELU runs on transposed strides because oneDNN, which takes contiguous fp32 on the CPU, needs
    longer to start than all the rest to run.
    """
    tokens, top_k = index_TK.shape
    adapter_dim, hidden = down_ERH.shape[1:]
    if tokens == 1 and top_k == 2 and y_TH.device.type == "cpu" and down_ERH.is_contiguous() and up_ERH.is_contiguous():
        return _run_pair(y_TH, down_ERH, up_ERH, index_TK, gate_TK)
    own_N = index_TK.reshape(-1)
    down_TNH = down_ERH.index_select(0, own_N).view(tokens, top_k * adapter_dim, hidden)
    hidden_TRK = torch.bmm(down_TNH, y_TH.unsqueeze(2)).view(tokens, top_k, adapter_dim).transpose(1, 2)
    gated_TKR = F.gelu(hidden_TRK).transpose(1, 2) * gate_TK.unsqueeze(2).to(y_TH.dtype)
    up_TNH = up_ERH.index_select(0, own_N).view(tokens, top_k * adapter_dim, hidden)
    return torch.bmm(gated_TKR.reshape(tokens, 1, top_k * adapter_dim), up_TNH).squeeze(1)


def _run_pair(y_1H, down_ERH, up_ERH, index_12, gate_12):
    """One token and two adapters, read where they are: any two rows of a bank are a view with a stride of its own.  [1, H]."""
    first, second = index_12.tolist()[0]
    adapter_dim, hidden = down_ERH.shape[1:]
    size = adapter_dim * hidden
    if first > second:
        first, second, gate_12 = second, first, gate_12.flip(1)
    jump = (second - first) * size
    down_2HR = down_ERH.as_strided((2, hidden, adapter_dim), (jump, 1, hidden), down_ERH.storage_offset() + first * size)
    up_2RH = up_ERH.as_strided((2, adapter_dim, hidden), (jump, hidden, 1), up_ERH.storage_offset() + first * size)
    hidden_R12 = torch.bmm(y_1H.expand(2, 1, hidden), down_2HR).transpose(0, 2)
    out_21H = torch.bmm(F.gelu(hidden_R12).transpose(0, 2), up_2RH)
    return gate_12.to(y_1H.dtype).mm(out_21H.view(2, hidden))


def run_grouped(y_TH, down_ERH, up_ERH, index_TK, gate_TK):
    """Assignments sorted by expert, one grouped GEMM a projection.

    Nothing here waits for the device; torch's own `grouped_mm` does where it has no kernel (CUDA before Hopper, or not bf16): it then reads
    the segments' ends on the host, and runs a GEMM an expert.
    """
    num_experts, top_k = down_ERH.shape[0], index_TK.shape[1]
    sorted_N, order_N = index_TK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=sorted_N.device), right=True).to(torch.int32)
    rank_N = torch.empty_like(order_N).scatter(0, order_N, torch.arange(order_N.numel(), device=order_N.device))

    # Eager autocast does not know grouped_mm: everything is in the bank's dtype already, and stays there.
    y_NH = _GatherTokens.apply(y_TH, order_N, rank_N, top_k)
    hidden_NR = F.gelu(F.grouped_mm(y_NH, down_ERH.transpose(1, 2), offs=ends_E))
    gated_NR = hidden_NR * gate_TK.flatten()[order_N, None].to(hidden_NR.dtype)
    return _SumAssignments.apply(F.grouped_mm(gated_NR, up_ERH, offs=ends_E), order_N, rank_N, top_k)


def _gather_tokens(x_TH: torch.Tensor, order_N: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rows of x_TH in the order of the sorted assignments, [N, H]."""
    return x_TH[order_N // top_k]


def _sum_assignments(rows_NH: torch.Tensor, rank_N: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rows back in token order, the K rows of each token summed, [T, H]."""
    return rows_NH[rank_N].unflatten(0, (-1, top_k)).sum(dim=1)


class _GatherTokens(torch.autograd.Function):
    """`_gather_tokens`, whose backward is `_sum_assignments`: a gather and a sum instead of the scatter-add that autograd would use."""

    @staticmethod
    def forward(ctx, y_TH, order_N, rank_N, top_k):
        ctx.save_for_backward(rank_N)
        ctx.top_k = top_k
        return _gather_tokens(y_TH, order_N, top_k)

    @staticmethod
    def backward(ctx, grad_NH):
        (rank_N,) = ctx.saved_tensors
        return _sum_assignments(grad_NH, rank_N, ctx.top_k), None, None, None


class _SumAssignments(torch.autograd.Function):
    """`_sum_assignments`, whose backward is `_gather_tokens`.  It also makes the gradient contiguous for grouped_mm."""

    @staticmethod
    def forward(ctx, rows_NH, order_N, rank_N, top_k):
        ctx.save_for_backward(order_N)
        ctx.top_k = top_k
        return _sum_assignments(rows_NH, rank_N, top_k)

    @staticmethod
    def backward(ctx, grad_TH):
        (order_N,) = ctx.saved_tensors
        return _gather_tokens(grad_TH, order_N, ctx.top_k), None, None, None
