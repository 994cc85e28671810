"""What watches a run: gradients that never come, the numbers of each step, their history, throughput.

L sparse layers, E experts, K active experts, T tokens that count.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pesc.errors import TrainingFailedError
from pesc.train.modeling import PEFT_PREFIX, trainable_parameters

logger = logging.getLogger(__name__)
EXPERT_TENSOR = re.compile(r"\blayers\.(?P<layer>\d+)\.mlp\.(adapters\.(down|up)|experts\.(gate_up_proj|down_proj))$")
"""Tensors of a slice [e] an expert: adapters of this package, experts of transformers' Mixtral."""
_MOST_NAMED = 8


class GradientWatch:
    """Makes sure that everything declared trainable is trained.

    Every tensor must have got a gradient in the first step, and one that is not all zeros by the end of step `patience`.  (In the first
    step those of `down`, the router and lora_A are zeros: `up` and lora_B still are.)  An expert whose slices of all its tensors stay
    without one until then is warned of: its router has not chosen it, which more data may mend.
    """

    def __init__(self, model: nn.Module, steps: int, device: torch.device, patience: int = 8, least: int = 4, tells: bool = True) -> None:
        """steps: of the run; one shorter than `least` is not blamed for zeros.  tells: whether this rank warns of experts."""
        self._names = [name for name, _ in trainable_parameters(model)]
        self._tells = tells
        self._experts = {
            name: torch.zeros(_shape_of(parameter)[0], device=device)
            for name, parameter in trainable_parameters(model)
            if EXPERT_TENSOR.search(name) and len(_shape_of(parameter)) == 3
        }
        self._index = {name: index for index, name in enumerate(self._names)}
        self._came = torch.zeros(len(self._names), device=device)
        self._lives = torch.zeros(len(self._names), device=device)
        self._steps = 0
        self._deadline = min(patience, steps) if steps >= least else None
        self._handles = [parameter.register_hook(self._hook(name)) for name, parameter in trainable_parameters(model)]

    def _hook(self, name: str) -> Any:
        index, experts_E = self._index[name], self._experts.get(name)

        def note(gradient: torch.Tensor) -> None:
            self._came[index] = 1.0
            if experts_E is None:
                self._lives[index] += gradient.detach().any()
                return
            lives_E = gradient.detach().flatten(1).any(dim=1)
            experts_E.add_(lives_E)
            self._lives[index] += lives_E.any()

        return note

    def end_step(self, reduce_max: Any) -> None:
        """Check after an optimizer step.  reduce_max: in-place maximum over the ranks.  Raises TrainingFailedError with the names."""
        self._steps += 1
        if self._steps == 1:
            self._require(self._came, reduce_max, "got no gradient at all in the first step")
        if self._deadline is not None and self._steps == self._deadline:
            self._require(self._lives, reduce_max, f"got a gradient of zeros in each of the first {self._steps} steps")
            self._warn_of_idle_experts(reduce_max)
        if self._steps >= (self._deadline or 1):
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._deadline = None

    def _require(self, flags: torch.Tensor, reduce_max: Any, what: str) -> None:
        flags = flags.clone()
        reduce_max(flags)
        silent = [name.removeprefix(PEFT_PREFIX) for name, flag in zip(self._names, flags.tolist(), strict=True) if not flag]
        if silent:
            others = f" (and {len(silent) - 1} more of {len(self._names)})" if len(silent) > 1 else ""
            raise TrainingFailedError(
                f"{silent[0]}{others} is declared trainable but {what}, so it would come out as it went in: check the labels (is anything "
                "supervised?), that the routers have a balance loss or top_k > 1, and that the targets belong to the path that is used."
            )

    def _warn_of_idle_experts(self, reduce_max: Any) -> None:
        """One sentence with the experts, by layer, that nothing has reached.  All ranks must call it."""
        if not self._experts:
            return
        flags = torch.cat(list(self._experts.values()))
        reduce_max(flags)
        lives: dict[str, list[bool]] = {}
        for name, part in zip(self._experts, flags.split([len(part) for part in self._experts.values()]), strict=True):
            found = EXPERT_TENSOR.search(name)
            layer = found["layer"] if found else name
            before = lives.get(layer, [False] * len(part))
            lives[layer] = [was or bool(flag) for was, flag in zip(before, part.tolist(), strict=True)]
        idle = [f"expert {expert} of layer {layer}" for layer, alive in lives.items() for expert, is_on in enumerate(alive) if not is_on]
        if idle and self._tells:
            others = f" and {len(idle) - _MOST_NAMED} more" if len(idle) > _MOST_NAMED else ""
            logger.warning(
                "No gradient has reached %s%s in the first %d steps: no supervised token chose them; if that lasts, raise "
                "train.balance.coefficient or use fewer experts.",
                ", ".join(idle[:_MOST_NAMED]),
                others,
                self._steps,
            )


def _shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also where ZeRO-3 has partitioned the parameter away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class StepTotals:
    """Sums over the micro-batches of one optimizer step, on the device, added over the ranks once."""

    def __init__(self, device: torch.device, layer_experts: Sequence[int]) -> None:
        """layer_experts: number of experts of each sparse layer."""
        self._layers = list(layer_experts)
        self._sums = torch.zeros(4 + sum(self._layers), dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor, tokens: int, routing: Routing | None) -> None:
        """loss: this micro-batch's share of the step's mean loss; tokens: read."""
        self._sums[0] += loss.detach()
        self._sums[1] += tokens
        if routing is not None:
            self._sums[2] += routing.balance.detach()
            self._sums[3] += routing.z.detach()
            self._sums[4:] += torch.cat(routing.choices)

    def take(self, reduce_sum: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """The step's numbers over all ranks, and how often each layer's experts were chosen; starts anew.  Waits for the device."""
        reduce_sum(self._sums)
        choices = [part.clone() for part in self._sums[4:].split(self._layers)] if self._layers else []
        values = self._sums[:4].tolist()
        self._sums.zero_()
        taken: dict[str, Any] = {"loss": values[0], "tokens": int(values[1])}
        if choices:
            taken["balance"], taken["z"] = values[2:]
            taken["experts"] = summarize_load([part.tolist() for part in choices])
        return taken, choices


@dataclass(frozen=True)
class Routing:
    """A micro-batch's routing.  balance, z: its shares of the step's mean losses; choices: [E] of each layer, how often experts were chosen."""

    balance: torch.Tensor
    z: torch.Tensor
    choices: list[torch.Tensor]


def summarize_load(choices: Sequence[Sequence[float]]) -> dict[str, list]:
    """How often each layer's experts were chosen, as highest share, lowest share, entropy (1: balanced) and number never chosen."""
    summary: dict[str, list] = {"max": [], "min": [], "entropy": [], "dead": []}
    for counts in choices:
        shares = [count / max(1.0, sum(counts)) for count in counts]
        entropy = -sum(share * math.log(share) for share in shares if share) / math.log(len(counts)) if len(counts) > 1 else 1.0
        summary["max"].append(round(max(shares), 4))
        summary["min"].append(round(min(shares), 4))
        summary["entropy"].append(round(entropy, 4))
        summary["dead"].append(sum(not count for count in counts))
    return summary


class History:
    """One line an optimizer step, and one a look at the held-out blocks; part of every checkpoint."""

    FILE_NAME, HELD_OUT_NAME = "history.jsonl", "held_out.jsonl"

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.held_out: list[dict[str, Any]] = []

    def has_looked(self, step: int) -> bool:
        """Whether the held-out loss after `step` steps is known."""
        return any(line["step"] == step for line in self.held_out)

    def save(self, folder: Path) -> None:
        """Write beside a checkpoint."""
        for name, lines in ((self.FILE_NAME, self.lines), (self.HELD_OUT_NAME, self.held_out)):
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Continue a checkpoint's history."""
        self.lines = _read_lines(folder / self.FILE_NAME)
        looks = folder / self.HELD_OUT_NAME
        self.held_out = _read_lines(looks) if looks.is_file() else []


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Throughput:
    """Tokens a second, without the first step of this process (it warms up)."""

    def __init__(self) -> None:
        self._started: float | None = None
        self.tokens = 0
        self.steps = 0

    def end_step(self, tokens: int) -> None:
        """Count a step."""
        if self._started is not None:
            self.tokens += tokens
            self.steps += 1
        else:
            self._started = time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """Time in which nothing was trained."""
        if self._started is not None:
            self._started += seconds

    @property
    def tokens_per_second(self) -> float:
        """0 until the second step has ended."""
        return self.tokens / max(1e-9, time.monotonic() - self._started) if self._started is not None and self.tokens else 0.0
