"""What rank 0 says of a run while it runs: events.jsonl in the workspace, and the progress that the caller sees.

    {"event": "start",      "time", "step", "steps", "world_size", "device", "flops_per_token", "peak_flops", ...}
    {"event": "step",       "time", <the step's line of history.jsonl>, "seconds", "tokens_per_second", "mfu", "hfu", "memory_bytes"}
    {"event": "evaluation", "time", "step", "seconds", "loss", "domains": {name: {"loss", "tokens"}}}
    {"event": "checkpoint", "time", "step", "seconds"}
    {"event": "end",        "time", "step", "reason": "" | "signal" | "stop file"}

A step that was left out says why in "skipped".  time: seconds since 1970.  A continued run appends to the file of the one before;
after success it lies beside the manifest.  What depends on time or place is here alone: history.jsonl and held_out.jsonl of the
result are the same bytes for the same run.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pesc.devices import peak_of
from pesc.train.flops import TokenCost
from pesc.train.job import Job
from pesc.train.trackers import Trackers, flatten_line

logger = logging.getLogger(__name__)
FILE_NAME = "events.jsonl"
_SHOWN = ("loss", "balance", "lr", "grad_norm")
Send = Callable[..., None]
"""send(step, message, **fields): tells the caller how far the run is."""


class RunWatch:
    """Notes the events of a run; does nothing on ranks other than 0."""

    def __init__(self, rank: int, job: Job, send: Send, cost: TokenCost | None = None, world_size: int = 1) -> None:
        self._job, self._send, self._cost = job, send, cost
        self._is_on = rank == 0
        self._on_cuda = job.device == "cuda"
        peak = peak_of(torch.cuda.get_device_name()) if self._on_cuda and job.config.compute_dtype == "bfloat16" else None
        self._peak = peak * world_size if peak else None
        self._left_at: float | None = None
        self._paused = 0.0
        self._is_mute = False
        self._held_out: dict[str, float] = {}
        self._trackers = Trackers(job) if self._is_on else None

    def start(self, step: int, **facts: Any) -> None:
        """The ranks are about to train, after `step` steps of an earlier run."""
        cost = vars(self._cost) if self._cost else None
        if self._trackers:
            self._trackers.start()
        self._write("start", step=step, steps=self._job.steps, flops_per_token=cost, peak_flops=self._peak, **facts)

    def step(self, line: Mapping[str, Any], tokens_per_second: float) -> None:
        """A step's line of the history.  tokens_per_second: over the run so far."""
        now = time.monotonic()
        seconds = now - self._left_at - self._paused if self._left_at is not None else None
        self._left_at, self._paused = now, 0.0
        rate = line["tokens"] / seconds if seconds else None
        use = self._use(rate)
        measured = {**line, "seconds": seconds, "tokens_per_second": rate, **use, "memory_bytes": self._memory()}
        self._write("step", **measured)
        self._track(line["step"], flatten_line(measured))
        if line["step"] % self._job.execution.log_every_steps and line["step"] != self._job.steps:
            return
        fields = {name: line[name] for name in _SHOWN if line.get(name) is not None}
        fields |= {"tokens_per_second": round(tokens_per_second, 1), **({"mfu": use["mfu"]} if "mfu" in use else {})}
        self._tell(line["step"], "training", **fields, **summarize_experts(line.get("experts")), **self._held_out)

    def evaluated(self, step: int, measured: Mapping[str, Any], seconds: float) -> None:
        """A look at the held-out blocks."""
        self._pause(seconds)
        self._write("evaluation", step=step, seconds=seconds, **measured)
        losses = {"held_out": measured["loss"]} | {f"held_out/{name}": found["loss"] for name, found in measured["domains"].items()}
        self._held_out = {name: loss for name, loss in losses.items() if loss is not None}
        self._track(step, {f"{name}/all" if name == "held_out" else name: loss for name, loss in self._held_out.items()})
        self._tell(step, "held-out loss", **self._held_out)

    def saved(self, step: int, seconds: float) -> None:
        """A complete checkpoint."""
        self._pause(seconds)
        self._write("checkpoint", step=step, seconds=seconds)

    def end(self, step: int, reason: str) -> None:
        """The run has ended.  reason: why before its last step, "" when it did not."""
        self._write("end", step=step, reason=reason)
        if self._trackers:
            self._trackers.finish()

    def _pause(self, seconds: float) -> None:
        """Time that is no part of a step."""
        self._paused += seconds

    def _use(self, rate: float | None) -> dict[str, float]:
        """Shares of the peak that the model's arithmetic (mfu), and all of it (hfu), takes; {} where no peak is known."""
        if not (self._peak and self._cost and rate):
            return {}
        return {"mfu": rate * self._cost.model / self._peak, "hfu": rate * self._cost.hardware / self._peak}

    def _memory(self) -> int:
        """The highest so far, in bytes: of the device, or of this process."""
        return torch.cuda.max_memory_allocated() if self._on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        if self._trackers:
            self._trackers.log(step, values)

    def _tell(self, step: int, message: str, **fields: float) -> None:
        if self._is_on:
            self._send(step, message, **fields)

    def _write(self, event: str, **fields: Any) -> None:
        if not self._is_on:
            return
        try:
            append_event(self._job.work / FILE_NAME, event, **fields)
        except OSError as error:  # the run matters more; it still says what it does
            if not self._is_mute:
                logger.warning("%s: %s lacks events from now on (%s)", self._job.address, FILE_NAME, error)
            self._is_mute = True


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Add one line; a line that an earlier process left half-written is closed first."""
    with path.open("ab+") as file:
        if file.tell() and not _ends_a_line(file):
            file.write(b"\n")
        file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}).encode("utf-8") + b"\n")


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def summarize_experts(load: Mapping[str, list] | None) -> dict[str, float]:
    """The whole model's expert load in three numbers: highest and lowest share of any layer, mean entropy (1: balanced)."""
    if not load or not load["max"]:
        return {}
    entropy = sum(load["entropy"]) / len(load["entropy"])
    return {"expert_max": max(load["max"]), "expert_min": min(load["min"]), "expert_entropy": round(entropy, 4)}
