"""One interface for the equal ways to run the adapters (`pesc.moe.paths`), and which of them runs.

T tokens, H hidden, E experts, K active experts, R adapter width.

    auto   the fastest here, measured once for each (device, dtype, bank, tokens up to the next power of two, with or without gradients);
           while compiling, tracing or capturing a CUDA graph, where nothing can be measured, `guess_path`.
    other  the path of that name, pinned.

Contract
- Gradients reach y, down, up and the gate weights.  All paths give one result up to rounding.
- No path that `auto` can take waits for a CUDA device, except while it is measured.
- `auto` on two machines, or twice on a busy one, may take two paths, whose results differ by rounding: pin one where every bit must repeat,
  or carry the choices along (`pesc.moe.tuning.export_choices`, `adopt_choices`).
"""

from __future__ import annotations

import torch

from pesc.moe.paths import grouped_allowed, run_dense, run_gathered, run_grouped, run_reference
from pesc.moe.segments import run_segments
from pesc.moe.tuning import choose_measured, find_choice

DENSE_LIMIT = 1024
"""E·R up to which two plain GEMMs should cost less than sorting on CUDA: dense costs 2.6 % · R/64 of a 7B step, grouped 0.9 % · R/64 + 3.5 %."""
GATHERED_LIMIT = 64
"""Assignments (T·K) up to which copying each token's adapters is worth a try."""

PATHS = {
    "reference": run_reference,
    "dense": run_dense,
    "grouped": run_grouped,
    "segments": run_segments,
    "gathered": run_gathered,
}


def run_adapters(
    y_TH: torch.Tensor, down_ERH: torch.Tensor, up_ERH: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor, mode: str = "auto"
) -> torch.Tensor:
    """The weighted sum of the chosen adapters' outputs, [T, H] in y's dtype.  y, down and up share one dtype; the gate may be wider.

    Raises ValueError when the pinned mode does not exist or cannot run this bank.
    """
    if mode == "auto":
        mode = choose_path(y_TH, down_ERH, up_ERH, index_TK, gate_TK)
    elif mode not in PATHS:
        raise ValueError(f"there is no dispatch {mode!r}; choose auto or {', '.join(PATHS)}")
    elif reason := _obstacle(mode, y_TH, down_ERH):
        raise ValueError(f"dispatch {mode!r} cannot run a bank of shape {tuple(down_ERH.shape)} in {down_ERH.dtype}: {reason}")
    return PATHS[mode](y_TH, down_ERH, up_ERH, index_TK, gate_TK)


def choose_path(y_TH: torch.Tensor, down_ERH: torch.Tensor, up_ERH: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor) -> str:
    """What `auto` means for these tensors."""
    if torch.compiler.is_compiling():
        return guess_path(down_ERH)
    if known := find_choice(y_TH, down_ERH, index_TK):
        return known
    if not y_TH.shape[0] or not _can_measure(y_TH):
        return guess_path(down_ERH)
    names = candidates(y_TH, down_ERH, index_TK)
    return choose_measured({name: PATHS[name] for name in names}, y_TH, down_ERH, up_ERH, index_TK, gate_TK)


def candidates(y_TH: torch.Tensor, down_ERH: torch.Tensor, index_TK: torch.Tensor) -> list[str]:
    """The paths that `auto` measures."""
    few = index_TK.numel() <= GATHERED_LIMIT
    names = [name for name in ("dense", "grouped", "segments") if not _obstacle(name, y_TH, down_ERH)]
    return [*names, "gathered"] if few and not _obstacle("gathered", y_TH, down_ERH) else names


def guess_path(down_ERH: torch.Tensor) -> str:
    """A path without measuring: one that compiles, traces and waits for nothing (dynamo knows grouped_mm in bf16 alone)."""
    num_experts, adapter_dim, _ = down_ERH.shape
    if num_experts * adapter_dim > DENSE_LIMIT and down_ERH.dtype == torch.bfloat16 and grouped_allowed(down_ERH):
        return "grouped"
    return "dense"


def _obstacle(mode: str, y_TH: torch.Tensor, down_ERH: torch.Tensor) -> str:
    """Why a path cannot run these tensors; "" when it can."""
    if mode == "grouped" and not grouped_allowed(down_ERH):
        return f"grouped_mm on {down_ERH.device.type} takes no such rows (multiples of 16 bytes) or dtype; choose dense or auto"
    if mode == "segments" and y_TH.device.type != "cpu":
        return "it is for the CPU, since it reads the routing on the host; choose dense, grouped or auto"
    if mode == "gathered" and torch.is_grad_enabled() and (y_TH.requires_grad or down_ERH.requires_grad):
        return "it has no deterministic gradient; choose dense, grouped or auto for training"
    return ""


def _can_measure(y_TH: torch.Tensor) -> bool:
    """Whether work can be timed here: real tensors, eager, outside a CUDA graph."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or type(y_TH) is not torch.Tensor or y_TH.is_meta:
        return False
    return not (y_TH.is_cuda and torch.cuda.is_current_stream_capturing())
