"""Before the ranks start: whether the run fits this machine.

On CUDA what cannot fit is refused, with what would; in doubt (the activations are an estimate, paged optimizer states can leave the GPU) it
is not.  On the CPU it is a warning, because memory is shared and can be swapped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pesc.errors import ModelError, TrainingOutOfMemoryError
from pesc.moe.config import PescConfig
from pesc.stage import Execution
from pesc.train.config import TrainConfig
from pesc.train.memory.need import CONTEXT_BYTES, Layout, Need, Run, fitting_layouts, need_of, usable_bytes
from pesc.train.memory.shapes import shape_from_config

logger = logging.getLogger(__name__)
_DOUBT = 0.85
"""Of the estimated activations, what is sure to be needed."""
_MIB = 1 << 20


def check_fits(address: str, run: Run | None, execution: Execution, ranks: int, per_node: int) -> None:
    """Raises TrainingOutOfMemoryError for a run that the smallest GPU of this machine cannot hold; warns when it may not, and on the CPU.

    run: None for a model whose shape is not known here: nothing is checked.  ranks: of all machines; per_node: of this one.
    """
    if run is None:
        return
    layout = Layout(ranks, execution.zero_stage, execution.gradient_checkpointing, run.config.micro_batch_size)
    need = need_of(run, layout)
    if run.device == "cpu":
        _warn_of_ram(address, need.total * per_node, per_node)
    elif memory := gpu_memory():
        _compare(address, run, layout, need, memory)


def read_run(model_dir: Path, config: TrainConfig, sequence: int, device: str) -> Run | None:
    """The run that `model_dir` makes; None for an architecture whose shape is not known."""
    try:
        fields = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        block = PescConfig.from_dict(fields["pesc"]) if fields.get("pesc") else None
        if config.method == "upcycle-full":
            block = PescConfig(int(fields["num_local_experts"]), int(fields["num_experts_per_tok"]))
            fields = {**fields, "model_type": "llama"}
        run = Run(shape_from_config(fields, str(model_dir)), block, config, sequence, device)
        return run if run.tensors else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError) as error:
        logger.debug("memory is not checked: %s", error)
        return None  # what is wrong with the model is for the one who loads it to say


def _visible(environment: Mapping[str, str]) -> list[str]:
    """nvidia-smi's option for the GPUs that the ranks will see: it takes indices and UUIDs as CUDA_VISIBLE_DEVICES does."""
    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [f"--id={','.join(names)}"] if names else []


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU that the ranks will see, without torch; None when nvidia-smi does not tell."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = [program, *_visible(os.environ), "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        sizes = [int(line) * _MIB for line in answer.stdout.splitlines() if line.strip()]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return min(sizes, default=None)


def _compare(address: str, run: Run, layout: Layout, need: Need, memory: int) -> None:
    paged = need.states.optimizer if run.config.optimizer.startswith("paged") else 0
    transient = int(_DOUBT * max(need.activations.total, need.step))
    surely = max(need.loading, need.states.total - paged + transient) + CONTEXT_BYTES
    said = f"{address} needs about {need.total / 1e9:.1f} GB of each GPU, and the smallest here has {memory / 1e9:.1f} GB"
    if surely > memory:
        raise TrainingOutOfMemoryError(f"{said}: {what_would_fit(run, layout, memory)}.")
    if need.total > usable_bytes(memory):
        logger.warning("%s, so that it may run out of memory: %s.", said, what_would_fit(run, layout, memory))


def what_would_fit(run: Run, layout: Layout, memory: int) -> str:
    """The smallest change of the settings that does, as words; else more or larger GPUs."""
    usable, found = usable_bytes(memory), []
    for fits in fitting_layouts(run, layout.ranks, usable):
        blocks = min(fits.micro_batch, layout.micro_batch)
        while layout.ranks * blocks > run.config.global_batch_size or run.config.global_batch_size % (layout.ranks * blocks):
            blocks -= 1
        found.append(replace(fits, micro_batch=blocks))
    if not found:
        least = min(need_of(run, Layout(layout.ranks, stage, "full", 1)).total for stage in (2, 3))
        return (
            f"no setting makes it fit (ZeRO-3, full checkpointing and one block at a time still take {least / 1e9:.1f} GB); use larger or more "
            "GPUs, a smaller upcycle.adapter_dim, or train.optimizer=paged_adamw_8bit"
        )
    chosen = min(found, key=lambda fits: _changes(layout, fits))
    settings = {
        "train.micro_batch_size": (layout.micro_batch, chosen.micro_batch),
        "execution.zero_stage": (layout.zero_stage, chosen.zero_stage),
        "execution.gradient_checkpointing": (layout.checkpointing, chosen.checkpointing),
    }
    changes = [f"{name}={new} (now {old})" for name, (old, new) in settings.items() if new != old]
    return f"set {' and '.join(changes)}" if changes else "leave other programs no part of the GPU"


def _changes(now: Layout, then: Layout) -> tuple[bool, bool, int]:
    """How much a change costs: another ZeRO stage, more recomputation, smaller micro-batches."""
    policies = ("none", "selective", "full")
    slower = policies.index(then.checkpointing) - policies.index(now.checkpointing)
    return then.zero_stage != now.zero_stage, slower < 0, abs(slower) * 10 + now.micro_batch - then.micro_batch


def _warn_of_ram(address: str, needed: int, ranks: int) -> None:
    available = available_ram()
    if available is not None and needed > available:
        logger.warning(
            "%s needs about %.1f GB of memory for %d ranks, and this machine has %.1f GB free: expect swapping, or a killed process.",
            *(address, needed / 1e9, ranks, available / 1e9),
        )


def available_ram() -> int | None:
    """Bytes that programs can still get; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
