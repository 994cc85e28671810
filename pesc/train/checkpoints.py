"""Checkpoints that are complete or do not exist.

A checkpoint is a directory `checkpoint-<step>` and counts only when the marker, written last, is in it.  The marker says with how many
ranks and which ZeRO stage it was written (the optimizer's shards fit no other), and the size and SHA-256 of every file: a checkpoint
that was damaged later is set aside as `corrupt-checkpoint-<step>`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pesc.errors import CheckpointSpaceError, TrainingFailedError

logger = logging.getLogger(__name__)
MARKER = "COMPLETE"
_NAME = re.compile(r"checkpoint-(\d+)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint's shards depend on."""

    world_size: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.world_size} {'rank' if self.world_size == 1 else 'ranks'} and ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written.  bytes: its size."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.  files: what was in it, by path below it; {} when an older version of this program wrote it."""

    path: Path
    step: int
    layout: Layout
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(record.bytes for record in self.files.values())


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
    """Declare a checkpoint complete; everything in it must have been written.  Reads every file once, in threads."""
    names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    files = {name: asdict(record) for name, record in zip(names, _digests([path / name for name in names]), strict=True)}
    partial = path / f"{MARKER}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({**asdict(layout), "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path / MARKER)


def find_complete(root: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first; their files are not looked at."""
    found = []
    for path in root.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        try:
            marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
            files = {name: FileRecord(**record) for name, record in marker.pop("files", {}).items()}
            layout = Layout(**marker)
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError):
            continue
        if match:
            found.append(Checkpoint(path, int(match.group(1)), layout, files))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_damage(checkpoint: Checkpoint) -> str:
    """What is wrong with the first file that is not as it was written, in words; "" when all are."""
    for name, record in checkpoint.files.items():
        try:
            size = (checkpoint.path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != record.bytes:
            return f"{name} has {size} bytes instead of {record.bytes}"
    digests = _digests([checkpoint.path / name for name in checkpoint.files])
    for (name, record), now in zip(checkpoint.files.items(), digests, strict=True):
        if now.sha256 != record.sha256:
            return f"{name} has other bytes than were written"
    return ""


def set_aside_damaged(root: Path, address: str) -> None:
    """Rename damaged checkpoints, newest first, until one is sound; each with a warning that names the file and what is used instead."""
    complete = find_complete(root)
    while complete and (damage := find_damage(complete[-1])):
        bad = complete.pop()
        aside = set_aside(bad, "corrupt")
        instead = f"the one at step {complete[-1].step} is tried" if complete else "training begins anew"
        logger.warning(
            "%s: the checkpoint at step %d is damaged (%s) and was set aside as %s; %s instead.", address, bad.step, damage, aside, instead
        )


def set_aside(checkpoint: Checkpoint, why: str) -> Path:
    """Rename a checkpoint to `<why>-checkpoint-<step>`, in the place of an earlier one of that name; returns where it is."""
    aside = checkpoint.path.with_name(f"{why}-{checkpoint.path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint.path, aside)
    return aside


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


def require_rank(checkpoint: Checkpoint, rank: int, address: str) -> None:
    """Raises TrainingFailedError when this machine's part of a checkpoint is of other ranks than it has now."""
    ranks = sorted(int(path.stem.rpartition("_")[2]) for path in checkpoint.path.glob("dispatch_*.json"))
    if ranks and rank not in ranks:
        raise TrainingFailedError(
            f"{address}: {checkpoint.path} has the parts of ranks {', '.join(map(str, ranks))}, but this machine now runs rank {rank}: give each "
            "machine the store that it had (ranks follow the order of the machines' addresses), or a disk that all of them share."
        )


# ---- room on the disk


@contextlib.contextmanager
def room_needed(root: Path, step: int, address: str) -> Iterator[None]:
    """Around the writing of a checkpoint.

    Raises CheckpointSpaceError when one as large as the last would not fit (the first is simply tried), and when the disk proves full;
    then the half that was written is removed, which also makes room for the words about it.
    """
    root.mkdir(parents=True, exist_ok=True)
    complete, path = find_complete(root), checkpoint_path(root, step)
    if complete and not path.exists() and shutil.disk_usage(root).free < complete[-1].bytes:
        raise no_room(root, step, address)
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_full_disk(error):
            raise
        sentence = no_room(root, step, address)
        shutil.rmtree(path, ignore_errors=True)
        raise sentence from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of writing means that the disk is full.  torch's writer says so in its own words, or not at all."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    words = str(error)
    is_writer = any(sign in words for sign in ("PytorchStreamWriter", "unexpected pos", "enforce fail"))
    return isinstance(error, RuntimeError) and is_writer and "allocate memory" not in words


def no_room(root: Path, step: int, address: str) -> CheckpointSpaceError:
    """The error of a checkpoint for which there is no room."""
    complete, usage = find_complete(root), shutil.disk_usage(root)
    needs = f"needs {_megabytes(complete[-1].bytes)}" if complete else "needs more"
    kept = f" The checkpoint at step {complete[-1].step} is kept: the next run continues from it." if complete else ""
    return CheckpointSpaceError(
        f"{address} has no room for the checkpoint at step {step}: the disk of {root} has {_megabytes(usage.free)} of "
        f"{_megabytes(usage.total)} free, and a checkpoint {needs}. Free space (`pesc gc` shows what nothing needs) or lower "
        f"execution.keep_checkpoints, then run again.{kept}"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _digests(paths: Iterable[Path]) -> list[FileRecord]:
    """Size and SHA-256 of files, four at a time: hashing runs outside the interpreter's lock."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)
