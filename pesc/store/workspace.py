"""A workspace: where one action is built, by one process at a time.

The lock is `flock` on `.lock`: the kernel frees it when the holder dies. The directory stays after a failure, so that the next
attempt resumes from what is there; it is removed when the action is committed. Whoever finds it locked waits, with a `Patience`, and
is told who holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pesc.errors import StoreBusyError
from pesc.store.disk import take_lock
from pesc.store.patience import Patience

LOCK_NAME = ".lock"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Workspace:
    """A locked scratch directory.  `out` is empty at first and becomes the object; `root` keeps whatever helps to resume."""

    root: Path

    @property
    def out(self) -> Path:
        """The directory that will be published."""
        return self.root / "out"

    def clear_output(self) -> None:
        """Start with an empty `out`: half of an earlier attempt must not leak into this one."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)

    def discard(self) -> None:
        """Remove everything, the lock file last: while it is there, nobody else starts in a directory that is being removed."""
        with contextlib.suppress(OSError):
            for path in self.root.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK_NAME:
                    path.unlink()
            (self.root / LOCK_NAME).unlink()
            self.root.rmdir()


@contextlib.contextmanager
def locked_workspace(root: Path, label: str, patience: Patience | None = None) -> Iterator[Workspace]:
    """Hold the workspace at `root`.  Raises StoreBusyError, naming the holder, when another process has it (for longer than `patience`)."""
    descriptor = _acquire(root, label, patience)
    try:
        yield Workspace(root)
    finally:
        os.close(descriptor)


def is_locked(root: Path) -> bool:
    """Whether some process holds the workspace."""
    try:
        descriptor = os.open(root / LOCK_NAME, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not take_lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, root)  # NFS gives an exclusive one only to who may write
    finally:
        os.close(descriptor)


def _acquire(root: Path, label: str, patience: Patience | None) -> int:
    path = root / LOCK_NAME
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the previous holder removed the directory between the two lines
            continue
        except FileExistsError:  # or while `mkdir` asked whether what is there is a directory
            if root.is_file() or root.is_symlink():
                raise
            continue
        try:
            is_mine = take_lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, root)
        except BaseException:
            os.close(descriptor)
            raise
        if not is_mine:
            holder = _holder(descriptor)
            os.close(descriptor)
            if patience is None:
                raise StoreBusyError(
                    f"{label} is being built by {holder} in {root}. Wait for it to finish, or stop that process and run again: its checkpoints are kept."
                )
            patience.wait(label, holder, POLL_SECONDS)
            continue
        if _same_file(descriptor, path):
            _sign(descriptor)
            return descriptor
        os.close(descriptor)  # locked a file that its holder has just removed


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino)


def _sign(descriptor: int) -> None:
    note = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(note).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (ValueError, KeyError):
        return "another process"
