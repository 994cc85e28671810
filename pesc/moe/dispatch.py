"""One interface for the equal ways to run the adapters (`pesc.moe.paths`), and which of them runs.

T tokens, H hidden, E experts, K active experts, R adapter width.

    auto   the fastest here, measured once for each (device, dtype, bank, tokens up to the next power of two, with or without gradients);
           where nothing can be measured (compiling, tracing, capturing a CUDA graph, inside a backward pass) `guess_path`.
    other  the path of that name, pinned; `segments` off the CPU is `guess_path` too, since the pin travels in config.json.

Contract
- Gradients reach y, down, up and the gate weights.  All paths give one result up to rounding.
- No path that `auto` can take waits for a CUDA device, except while it is measured, and but for `grouped` where torch has no kernel for it
  (before Hopper, or not bf16): there `auto` has measured that all experts on all tokens cost more than the wait.
- `auto` on two machines, or twice on a busy one, may take two paths, whose results differ by rounding: pin one where every bit must repeat,
  or carry the choices along (`pesc.moe.tuning.export_choices`, `adopt_choices`).
"""

from __future__ import annotations

import torch

from pesc.moe.paths import grouped_allowed, run_dense, run_gathered, run_grouped, run_reference
from pesc.moe.segments import run_segments
from pesc.moe.tuning import choose_measured, find_choice, is_trained, tokens_up_to

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
    elif mode == "segments" and y_TH.device.type != "cpu":
        mode = guess_path(down_ERH)  # the pin travels in config.json, and the model was pinned on a CPU
    elif reason := _obstacle(mode, down_ERH, is_trained(y_TH, down_ERH, up_ERH, gate_TK)):
        raise ValueError(f"dispatch {mode!r} cannot run a bank of shape {tuple(down_ERH.shape)} in {down_ERH.dtype}: {reason}")
    run = PATHS[mode]
    if autocasts(y_TH):  # in the bank's dtype, whichever path
        with torch.autocast(y_TH.device.type, enabled=False):
            return run(y_TH, down_ERH, up_ERH, index_TK, gate_TK)
    return run(y_TH, down_ERH, up_ERH, index_TK, gate_TK)


def autocasts(y_TH: torch.Tensor) -> bool:
    """Whether operations on this tensor's device would be cast."""
    kind = y_TH.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def choose_path(y_TH: torch.Tensor, down_ERH: torch.Tensor, up_ERH: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor) -> str:
    """What `auto` means for these tensors."""
    if torch.compiler.is_compiling() or not _is_real(y_TH) or not y_TH.shape[0]:
        return guess_path(down_ERH)
    if known := find_choice(y_TH, down_ERH, up_ERH, index_TK, gate_TK):
        return known
    if not _can_measure(y_TH):
        return guess_path(down_ERH)
    names = candidates(y_TH, down_ERH, index_TK, is_trained(y_TH, down_ERH, up_ERH, gate_TK))
    return choose_measured({name: PATHS[name] for name in names}, y_TH, down_ERH, up_ERH, index_TK, gate_TK)


def candidates(y_TH: torch.Tensor, down_ERH: torch.Tensor, index_TK: torch.Tensor, trained: bool) -> list[str]:
    """The paths that `auto` measures.  trained: gradients are wanted."""
    few = tokens_up_to(y_TH.shape[0]) * index_TK.shape[1] <= GATHERED_LIMIT
    names = ["dense", "grouped", *(["segments"] if y_TH.device.type == "cpu" else []), *(["gathered"] if few else [])]
    return [name for name in names if not _obstacle(name, down_ERH, trained)]


def guess_path(down_ERH: torch.Tensor) -> str:
    """A path without measuring: one that compiles, traces and waits for nothing (dynamo knows grouped_mm in bf16 alone)."""
    num_experts, adapter_dim, _ = down_ERH.shape
    if num_experts * adapter_dim > DENSE_LIMIT and down_ERH.dtype == torch.bfloat16 and grouped_allowed(down_ERH):
        return "grouped"
    return "dense"


def _obstacle(mode: str, down_ERH: torch.Tensor, trained: bool) -> str:
    """Why a path cannot run this bank; "" when it can."""
    if mode == "grouped" and not grouped_allowed(down_ERH):
        return f"grouped_mm on {down_ERH.device.type} takes no such rows (multiples of 16 bytes) or dtype; choose dense or auto"
    if mode == "gathered" and trained:
        return "it has no deterministic gradient; choose dense, grouped or auto for training"
    return ""


def _is_real(y_TH: torch.Tensor) -> bool:
    """Whether the tensor holds data that the host may look at: neither traced, nor fake, nor on the meta device."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return not tracing and type(y_TH) is torch.Tensor and not y_TH.is_meta


def _can_measure(y_TH: torch.Tensor) -> bool:
    """Whether work can be timed here: outside a CUDA graph, and outside a backward pass.

    In a backward pass (a recomputation under reentrant checkpointing) the engine's only thread for the device would wait for a measurement
    that waits for that thread.
    """
    if torch._C._current_graph_task_id() != -1:
        return False
    return not (y_TH.is_cuda and torch.cuda.is_current_stream_capturing())
