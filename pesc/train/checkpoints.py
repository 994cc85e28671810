"""Checkpoints that are complete or do not exist.

A checkpoint is a directory `checkpoint-<step>` and counts only when the marker, written last, is in it.  The marker says with how many
ranks and which ZeRO stage it was written: the optimizer's shards fit no other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pesc.errors import TrainingFailedError

MARKER = "COMPLETE"
KEEP = 2
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Layout:
    """What a checkpoint's shards depend on."""

    world_size: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.world_size} {'rank' if self.world_size == 1 else 'ranks'} and ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    layout: Layout


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps is."""
    return root / f"checkpoint-{step}"


def save_dispatch(path: Path, rank: int, choices: list[dict[str, Any]]) -> None:
    """Leave what a rank's `auto` dispatch has chosen: a continuation that measured anew might add in another order."""
    (path / f"dispatch_{rank}.json").write_text(json.dumps(choices), encoding="utf-8")


def read_dispatch(path: Path, rank: int) -> list[dict[str, Any]]:
    """What the rank had chosen; [] when it left nothing."""
    record = path / f"dispatch_{rank}.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []


def name_latest(path: Path) -> None:
    """Write DeepSpeed's pointer, which it leaves on the disk of rank 0 alone; without it another machine's part cannot be loaded."""
    for part in path.glob("global_step*"):
        (path / "latest").write_text(part.name, encoding="utf-8")


def mark_complete(path: Path, layout: Layout) -> None:
    """Declare a checkpoint complete; everything in it must have been written."""
    partial = path / f"{MARKER}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(asdict(layout), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path / MARKER)


def find_complete(root: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first."""
    found = []
    for path in root.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        try:
            layout = Layout(**json.loads((path / MARKER).read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            continue
        if match:
            found.append(Checkpoint(path, int(match.group(1)), layout))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def clean(root: Path, keep: int | None = None) -> None:
    """Remove incomplete checkpoints and, with `keep`, all but the newest ones.  The marker goes first, so that none is ever half."""
    complete = find_complete(root)
    kept = {checkpoint.path for checkpoint in (complete if keep is None else complete[-keep:])}
    for path in root.glob("checkpoint-*"):
        if path not in kept:
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path)


def require_same_layout(checkpoint: Checkpoint, layout: Layout, address: str) -> None:
    """Raises TrainingFailedError when this run cannot continue the checkpoint, with both ways out."""
    if checkpoint.layout == layout:
        return
    old = checkpoint.layout
    raise TrainingFailedError(
        f"{address} has a checkpoint at step {checkpoint.step} written with {old}, which {layout} cannot continue: continue it with "
        f"execution.zero_stage={old.zero_stage} and execution.num_processes set for {old.world_size} in all, or delete {checkpoint.path.parent} "
        "to train from the start."
    )
