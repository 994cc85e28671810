"""`auto` by measurement: the candidates run once on the tensors at hand, the fastest is remembered.

    find_choice(y, down, up, index, gate)    the name, if it is known: the few microseconds that every later call costs
    choose_measured({"dense": run_dense, ...}, y, down, up, index, gate)    measures
    export_choices()      what was chosen, as JSON: for manifests and checkpoints
    adopt_choices(list)   the choices of an earlier process: its continuation repeats them, so that every bit repeats

Pitfall: the first call may stand inside activation checkpointing, autocast or an inference mode.  All of these are states of the calling
thread, so the measurement runs in a thread of its own, on detached tensors; it leaves no trace in the caller's graph.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)
_REPEATS, _REPEATS_OF_SHORT_RUNS, _SHORT_SECONDS = 3, 12, 2e-3
_HOPELESS = 3.0
"""A path that takes this many times the best one's time is not run again."""
_EVICTING_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Written between two runs: in a model each layer finds its bank in memory, not in the cache where the last run left it."""

Path = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class DispatchKey:
    """What a choice holds for.  tokens: the upper end of the range, a power of two."""

    device: str
    dtype: str
    num_experts: int
    top_k: int
    adapter_dim: int
    hidden_size: int
    tokens: int
    gradients: bool


@dataclass(frozen=True)
class DispatchChoice:
    """The path that `auto` takes for a key, and the milliseconds of each candidate (forward, and backward with gradients)."""

    key: DispatchKey
    path: str
    milliseconds: dict[str, float]


_lock = threading.Lock()
_choices: dict[DispatchKey, DispatchChoice] = {}
_paths: dict[tuple, str] = {}
"""The same choices by a tuple that is quick to make (see `_quick_key`)."""


def export_choices() -> list[dict[str, Any]]:
    """All choices of this process as JSON, in the order in which they were made."""
    with _lock:
        made = list(_choices.values())
    return [{**asdict(choice.key), "path": choice.path, "milliseconds": dict(choice.milliseconds)} for choice in made]


def adopt_choices(exported: list[dict[str, Any]]) -> None:
    """Take over the choices of `export_choices`; what is measured already stays."""
    for entry in exported:
        fields = dict(entry)
        path, milliseconds = fields.pop("path"), fields.pop("milliseconds")
        key = DispatchKey(**fields)
        _choices.setdefault(key, DispatchChoice(key, path, milliseconds))


def forget_choices() -> None:
    """Measure everything anew."""
    _choices.clear()
    _paths.clear()


def find_choice(
    y_TH: torch.Tensor, down_ERH: torch.Tensor, up_ERH: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor
) -> str | None:
    """The path that this process has taken for such tensors before."""
    return _paths.get(_quick_key(y_TH, down_ERH, index_TK, is_trained(y_TH, down_ERH, up_ERH, gate_TK)))


def is_trained(*tensors: torch.Tensor) -> bool:
    """Whether gradients are wanted of any of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def tokens_up_to(tokens: int) -> int:
    """The end of the range that shares a choice: the next power of two."""
    return 1 << max(0, tokens - 1).bit_length()


def _quick_key(y_TH: torch.Tensor, down_ERH: torch.Tensor, index_TK: torch.Tensor, trained: bool) -> tuple:
    return (y_TH.device, down_ERH.dtype, down_ERH.shape, index_TK.shape[1], max(0, y_TH.shape[0] - 1).bit_length(), trained)


def choose_measured(
    candidates: Mapping[str, Path],
    y_TH: torch.Tensor,
    down_ERH: torch.Tensor,
    up_ERH: torch.Tensor,
    index_TK: torch.Tensor,
    gate_TK: torch.Tensor,
) -> str:
    """The fastest candidate's name for tensors like these.  Measures, and logs, at the first call for a key; threads wait for one another."""
    if len(candidates) == 1:
        return next(iter(candidates))
    trained = is_trained(y_TH, down_ERH, up_ERH, gate_TK)
    key, quick = _key_of(y_TH, down_ERH, index_TK, trained), _quick_key(y_TH, down_ERH, index_TK, trained)
    with _lock:
        choice = _choices.get(key)
        if choice is None or choice.path not in candidates:
            tensors = [tensor.detach() for tensor in (y_TH, down_ERH, up_ERH, index_TK, gate_TK)]
            choice = DispatchChoice(key, *_in_own_thread(lambda: _measure(candidates, tensors, trained), y_TH.device))
            _choices[key] = choice
            _log(choice)
        _paths[quick] = choice.path
    return choice.path


def _log(choice: DispatchChoice) -> None:
    key, times = choice.key, ", ".join(f"{name} {ms:.3g}" for name, ms in choice.milliseconds.items())
    logger.info(
        "dispatch %s for %d experts of width %d, up to %d tokens in %s on %s%s (ms: %s)",
        choice.path,
        key.num_experts,
        key.adapter_dim,
        key.tokens,
        key.dtype,
        key.device,
        ", with gradients" if key.gradients else "",
        times,
    )


def _key_of(y_TH: torch.Tensor, down_ERH: torch.Tensor, index_TK: torch.Tensor, gradients: bool) -> DispatchKey:
    num_experts, adapter_dim, hidden = down_ERH.shape
    device = torch.cuda.get_device_name(y_TH.device) if y_TH.is_cuda else y_TH.device.type
    tokens = tokens_up_to(y_TH.shape[0])
    dtype = str(down_ERH.dtype).removeprefix("torch.")
    return DispatchKey(device, dtype, num_experts, index_TK.shape[1], adapter_dim, hidden, tokens, gradients)


def _in_own_thread(work: Callable[[], Any], device: torch.device) -> Any:
    """Run `work` in a new thread with this one's number of cores and CUDA device; raises what it raised."""
    threads, result = torch.get_num_threads(), []

    def run() -> None:
        torch.set_num_threads(threads)
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            result.append((True, work()))
        except BaseException as error:  # handed to the caller
            result.append((False, error))

    thread = threading.Thread(target=run, name="pesc-dispatch")
    thread.start()
    thread.join()
    succeeded, value = result[0]
    if not succeeded:
        raise value
    return value


def _measure(candidates: Mapping[str, Path], tensors: list[torch.Tensor], gradients: bool) -> tuple[str, dict[str, float]]:
    """The fastest candidate, and the best of some runs of each in milliseconds.

    One that has no room is left out (its time is infinite); raises its error when none has.
    """
    best: dict[str, float] = {}
    device, lacking = tensors[0].device, None
    evict = torch.zeros(_EVICTING_BYTES.get(device.type, 0), dtype=torch.uint8, device=device)
    for name, path in candidates.items():
        try:
            best[name] = _best_time(path, tensors, gradients, evict, min(best.values(), default=math.inf))
        except (torch.OutOfMemoryError, MemoryError) as error:
            best[name], lacking = math.inf, error
    fastest = min(best, key=best.__getitem__)
    if lacking is not None and best[fastest] == math.inf:
        raise lacking
    return fastest, {name: round(seconds * 1e3, 4) for name, seconds in best.items() if seconds < math.inf}


def _best_time(path: Path, tensors: list[torch.Tensor], gradients: bool, evict: torch.Tensor, fastest: float) -> float:
    """Seconds of the best run; a path that is hopeless beside the `fastest` is not run again."""
    _time(path, tensors, gradients, evict)  # warm up
    best = _time(path, tensors, gradients, evict)
    for _ in range((_REPEATS if best > _SHORT_SECONDS else _REPEATS_OF_SHORT_RUNS) - 1):
        if best > _HOPELESS * fastest:
            break
        best = min(best, _time(path, tensors, gradients, evict))
    return best


def _time(path: Path, tensors: list[torch.Tensor], gradients: bool, evict: torch.Tensor) -> float:
    """Seconds of one run with cold caches."""
    y_TH, down_ERH, up_ERH, index_TK, gate_TK = tensors
    with torch.set_grad_enabled(gradients):
        leaves = [tensor.detach().requires_grad_(gradients) for tensor in (y_TH, down_ERH, up_ERH, gate_TK)]
        evict.add_(1)
        _wait(y_TH.device)
        started = time.perf_counter()
        out_TH = path(*leaves[:3], index_TK, leaves[3])
        if gradients:
            torch.autograd.grad(out_TH, leaves, y_TH)
        _wait(y_TH.device)
        return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
