"""The sparse layer against the dense FFN and the reference loop: what the adapters cost, path by path.

    pesc bench layer --tokens 2048 --hidden 1024 --ffn 2816 --experts 8 --top-k 2 --dims 16,64,128,256,512

T tokens, H hidden, F FFN width, E experts, K active experts, R adapter width.  Each figure is of a forward and a backward pass with the
FFN frozen and the bank trained, as in training: FFN 12·T·H·F FLOPs (its backward is dX alone), bank 12·T·K·H·R.

    efficiency = (bank FLOPs / FFN FLOPs) ÷ (bank time / FFN time)      1: the bank runs as fast as the FFN's GEMMs

All things to compare run in turn, round after round, in one process; the best round of each counts, since other work on the machine only adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pesc.moe.dispatch import PATHS, candidates, choose_path
from pesc.moe.router import select_experts


@dataclass(frozen=True)
class LayerShape:
    """The layer that is measured."""

    tokens: int = 2048
    hidden: int = 1024
    ffn: int = 2816
    experts: int = 8
    top_k: int = 2

    @property
    def ffn_flops(self) -> float:
        """Three projections, forward and the gradient of their input."""
        return 12.0 * self.tokens * self.hidden * self.ffn

    def bank_flops(self, adapter_dim: int) -> float:
        """Two projections of the K chosen adapters, forward, the gradient of their input, and of the bank."""
        return 12.0 * self.tokens * self.top_k * self.hidden * adapter_dim


@dataclass(frozen=True)
class BankTime:
    """One path at one width.  seconds: of the bank alone; ratio: to the FFN's; efficiency: see the module."""

    adapter_dim: int
    path: str
    seconds: float
    ratio: float
    efficiency: float
    is_auto: bool


@dataclass(frozen=True)
class LayerTimes:
    """All of a run."""

    shape: LayerShape
    dtype: str
    device: str
    threads: int
    ffn_seconds: float
    rows: tuple[BankTime, ...]

    def row(self, adapter_dim: int, path: str) -> BankTime:
        """The row of a path, or of the path that `auto` takes."""
        found = [row for row in self.rows if row.adapter_dim == adapter_dim and (row.is_auto if path == "auto" else row.path == path)]
        return found[0]


class _FrozenFFN(nn.Module):
    """SwiGLU, as in Llama."""

    def __init__(self, shape: LayerShape):
        super().__init__()
        self.gate, self.up = (nn.Linear(shape.hidden, shape.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x_TH)) * self.up(x_TH))


def measure_layer(
    shape: LayerShape, adapter_dims: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu", rounds: int = 7
) -> LayerTimes:
    """Time the FFN and every path at every width, in turn."""
    torch.manual_seed(0)
    ffn = _FrozenFFN(shape).to(device, dtype).requires_grad_(False)
    x_TH = torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype)
    runs: dict[tuple[int, str], Callable[[], object]] = {(0, "ffn"): _ffn_run(ffn, x_TH)}
    chosen = {}
    for adapter_dim in adapter_dims:
        inputs = _bank_inputs(shape, adapter_dim, dtype, device)
        y_TH, down_ERH, _, index_TK, _ = inputs
        chosen[adapter_dim] = choose_path(*inputs)
        for path in ("reference", *candidates(y_TH, down_ERH, index_TK, trained=True)):
            runs[adapter_dim, path] = _bank_run(path, inputs)
    best = time_in_turn(runs, rounds, device)
    ffn_seconds = best.pop((0, "ffn"))
    rows = []
    for (adapter_dim, path), seconds in best.items():
        ratio = seconds / ffn_seconds
        efficiency = shape.bank_flops(adapter_dim) / shape.ffn_flops / ratio
        rows.append(BankTime(adapter_dim, path, seconds, ratio, efficiency, chosen[adapter_dim] == path))
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return LayerTimes(shape, str(dtype).removeprefix("torch."), name, torch.get_num_threads(), ffn_seconds, tuple(rows))


def time_in_turn(runs: dict, rounds: int, device: str = "cpu") -> dict:
    """Seconds of the best round of each; the rounds alternate, so that a slow moment of the machine meets all of them."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds + 1):  # the first warms up, and seldom is the best
        for name, run in runs.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _ffn_run(ffn: nn.Module, x_TH: torch.Tensor) -> Callable[[], object]:
    leaf, cotangent = x_TH.detach().requires_grad_(), torch.randn_like(x_TH)
    return lambda: torch.autograd.grad(ffn(leaf), leaf, cotangent)


def _bank_inputs(shape: LayerShape, adapter_dim: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    y_TH = torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype, requires_grad=True)
    down, up = ((torch.randn(shape.experts, adapter_dim, shape.hidden, device=device, dtype=dtype) / 32).requires_grad_() for _ in range(2))
    index_TK, weight_TK = select_experts(torch.randn(shape.tokens, shape.experts, device=device), shape.top_k)
    return y_TH, down, up, index_TK, weight_TK.requires_grad_()


def _bank_run(path: str, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    leaves, cotangent = [tensor for tensor in inputs if tensor.requires_grad], torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(PATHS[path](*inputs), leaves, cotangent)


def render(times: LayerTimes) -> str:
    """The table, a row a path; * marks what `auto` takes."""
    shape = times.shape
    lines = [
        f"T={shape.tokens} H={shape.hidden} F={shape.ffn} E={shape.experts} K={shape.top_k}, {times.dtype} on {times.device} with "
        f"{times.threads} threads; frozen FFN, forward and backward: {times.ffn_seconds * 1e3:.1f} ms",
        f"{'R':>5}  {'path':<11}{'bank ms':>9}{'of FFN':>8}{'efficiency':>12}{'x reference':>13}",
    ]
    for row in times.rows:
        faster = times.row(row.adapter_dim, "reference").seconds / row.seconds
        name = f"{row.path}{' *' if row.is_auto else ''}"
        lines.append(f"{row.adapter_dim:>5}  {name:<11}{row.seconds * 1e3:>9.1f}{row.ratio:>8.3f}{row.efficiency:>12.2f}{faster:>13.2f}")
    return "\n".join(lines)
