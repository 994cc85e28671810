"""Where a step's time and memory go."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pesc.moe.adapters import AdapterBank
from pesc.moe.router import Router

PARTS = ("attention", "FFN", "bank+router", "CE", "optimizer", "other")


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Memory:
    """The highest memory since `start`: torch's on CUDA, the process's resident memory on the CPU (0 where Linux does not tell)."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device.startswith("cuda")

    def start(self) -> None:
        """Forget earlier peaks."""
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if self._on_cuda:
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


class _Stopwatch:
    """Time inside modules, forward and backward; each reading waits for the device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._open: dict[Any, float] = {}
        self.seconds: dict[str, float] = dict.fromkeys(map(str, PARTS), 0.0)
        self.handles: list[Any] = []

    def now(self) -> float:
        wait(self._device)
        return time.perf_counter()

    def watch(self, module: nn.Module, part: str) -> None:
        """Measure a module's forward and backward passes."""

        def begin(*_: Any) -> None:
            self._open[module] = self.now()

        def end(*_: Any) -> None:
            if module in self._open:
                self.seconds[part] += self.now() - self._open.pop(module)

        self.handles += [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
            module.register_full_backward_pre_hook(begin),
            module.register_full_backward_hook(end),
        ]


def share_by_part(model: nn.Module, step: Callable[[], float], optimizer: torch.optim.Optimizer, device: str) -> dict[str, float]:
    """Shares of one more step's time.

    Approximate: the readings keep a GPU from running ahead, and of a first layer, whose input needs no gradient, the backward pass of the
    attention counts as other.
    """
    watch = _Stopwatch(device)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, AdapterBank | Router):
            watch.watch(module, "bank+router")
        elif last in ("self_attn", "mlp", "lm_head"):
            watch.watch(module, {"self_attn": "attention", "mlp": "FFN", "lm_head": "CE"}[last])
    plain = optimizer.step

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = watch.now()
        done = plain(*args, **kwargs)
        watch.seconds["optimizer"] += watch.now() - started
        return done

    optimizer.step = timed
    try:
        total = step()
    finally:
        optimizer.step = plain
        for handle in watch.handles:
            handle.remove()
    shares = watch.seconds
    shares["FFN"] -= shares["bank+router"]
    shares["other"] = max(0.0, total - sum(shares.values()))
    return {part: shares[part] / total for part in PARTS}
