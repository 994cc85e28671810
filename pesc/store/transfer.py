"""Move files between this disk and a remote: several at a time, only what is missing, each checked by its SHA-256.

Key contracts
- What is complete at the target is not sent again. A file that comes is written in pieces to `parts/`, with a note of each piece that is
  there, so that a killed pull goes on where it was; it gets its name when its SHA-256 is right. A push goes on at the file where it was.
- A file that goes is checked before, unless it has just been made: a damaged copy must not spread.
- The caller's thread waits and shows progress; whatever interrupts it stops the others within a piece.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NoReturn

from pesc.errors import RemoteError, StoreError
from pesc.store.digest import digest_file
from pesc.store.disk import sync_path
from pesc.store.manifest import OutputFile
from pesc.store.places import Stopped
from pesc.store.remote import Remote, file_name

logger = logging.getLogger(__name__)
THREADS = 8
PIECE = 8 << 20
BLOCK = 1 << 20
SHOW_SECONDS = 0.5

OnProgress = Callable[[int, int, str], None]
"""Told bytes done, bytes in all, and what is under way."""


def silent(_done: int, _total: int, _message: str) -> None:
    """Show nothing."""


class Meter:
    """Bytes moved so far, counted by several threads; `count` raises Stopped once the caller has gone."""

    def __init__(self) -> None:
        self.done, self.is_stopped = 0, False
        self._lock = threading.Lock()

    def count(self, more: int) -> None:
        """Add bytes."""
        if self.is_stopped and more > 0:
            raise Stopped
        with self._lock:
            self.done += more


def run_all(tasks: Iterable[Callable[[Meter], None]], total: int, on_progress: OnProgress, message: str) -> None:
    """Run tasks in threads.  Raises the first error after the others have stopped."""
    meter = Meter()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="pesc-transfer") as pool:
        pending: set[Future[None]] = {pool.submit(task, meter) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, timeout=SHOW_SECONDS, return_when=FIRST_COMPLETED)
                on_progress(meter.done, total, message)
                for future in done:
                    future.result()
        except BaseException:
            meter.is_stopped = True
            for future in pending:
                future.cancel()
            raise


# -- to the remote ---------------------------------------------------------------------------------------------------------------


def missing_files(remote: Remote, files: Sequence[OutputFile]) -> list[OutputFile]:
    """Those that the remote lacks, has in another size, or has damaged; one for each SHA-256."""
    damaged = remote.damaged() if files else set()
    distinct = list({file.sha256: file for file in files}.values())
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(lambda file: None if file.sha256 in damaged else remote.place.size(file_name(file.sha256)), distinct))
    return [file for file, size in zip(distinct, sizes, strict=True) if size != file.size]


def upload_files(remote: Remote, files: Sequence[tuple[OutputFile, Path]], is_trusted: bool, on_progress: OnProgress, message: str) -> None:
    """Send files that the remote lacks.  Raises StoreError for one that is damaged here, RemoteError."""

    def task(file: OutputFile, path: Path) -> Callable[[Meter], None]:
        def send(meter: Meter) -> None:
            _must_be_whole(file, path, is_trusted)
            remote.place.upload(path, file_name(file.sha256), meter.count)
            remote.place.remove(f"damaged/{file.sha256}")

        return send

    largest_first = sorted(files, key=lambda pair: -pair[0].size)
    run_all([task(*pair) for pair in largest_first], sum(file.size for file, _ in files), on_progress, message)


def _must_be_whole(file: OutputFile, path: Path, is_trusted: bool) -> None:
    try:
        whole = path.stat().st_size == file.size and (is_trusted or digest_file(path) == file.sha256)
    except OSError:
        whole = False
    if not whole:
        raise StoreError(
            f"{path} is damaged or gone, and was not sent. `pesc fsck --repair` sets its object aside; then build it again, or pull it."
        )


# -- from the remote -------------------------------------------------------------------------------------------------------------


def download_files(
    remote: Remote, files: Sequence[OutputFile], folder: Path, parts: Path, known: dict[str, Path], on_progress: OnProgress, message: str
) -> list[OutputFile]:
    """Fill `folder` with files, all of whose paths have been checked; returns those that were moved, one for each SHA-256.

    `known`: equal files on this disk, which are linked instead.
    What is in `folder` already was checked when it came. Raises RemoteError naming the file that is missing or damaged there.
    """
    parts.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [file for file in files if not _is_there(folder / file.path, file.size)]
    coming: dict[str, list[OutputFile]] = {}
    for file in wanted:
        if not _link(known.get(file.sha256), folder / file.path, file):
            coming.setdefault(file.sha256, []).append(file)
    downloads = [_Download(remote, same, folder, parts) for same in coming.values()]
    tasks = [task for download in sorted(downloads, key=lambda d: -d.file.size) for task in download.tasks()]
    run_all(tasks, sum(download.file.size for download in downloads), on_progress, message)
    return [download.file for download in downloads]


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _link(known: Path | None, target: Path, file: OutputFile) -> bool:
    """Link an equal file of this disk; False when there is none that is whole."""
    if known is None:
        return False
    try:
        if digest_file(known) != file.sha256:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(known, target)
    except OSError:  # gone meanwhile, or a disk without links
        return False
    return True


class _Download:
    """One file on its way, for all the places that it has in the tree."""

    def __init__(self, remote: Remote, same: Sequence[OutputFile], folder: Path, parts: Path) -> None:
        self.file, self._same, self._folder, self._remote = same[0], same, folder, remote
        self._part, self._note = parts / self.file.sha256, parts / f"{self.file.sha256}.pieces"
        self._lock = threading.Lock()
        self._left = 0
        self._is_resumed = False

    def tasks(self) -> list[Callable[[Meter], None]]:
        """What threads have to do: a task a piece that is not there yet."""
        have = self._pieces_here()
        self._is_resumed = bool(have)
        starts = [start for start in range(0, max(self.file.size, 1), PIECE) if start not in have]
        moved = self.file.size - sum(self._length(start) for start in starts)
        self._left = len(starts)
        if not starts:  # all of it came, and then the process was killed
            return [self._only_finish]
        return [self._task(start, moved if start == starts[0] else 0) for start in starts]

    def _only_finish(self, meter: Meter) -> None:
        meter.count(self.file.size)
        self._finish(meter)

    def _length(self, start: int) -> int:
        return min(PIECE, self.file.size - start)

    def _pieces_here(self) -> set[int]:
        with contextlib.suppress(OSError, ValueError):
            if self._part.exists():
                return {int(line) for line in self._note.read_text().splitlines() if line}
        return set()

    def _task(self, start: int, moved: int) -> Callable[[Meter], None]:
        def fetch(meter: Meter) -> None:
            meter.count(moved)
            self._fetch(start, meter)
            with self._lock:
                with self._note.open("a") as note:
                    note.write(f"{start}\n")
                self._left -= 1
                is_last = self._left == 0
            if is_last:
                self._finish(meter)

        return fetch

    def _fetch(self, start: int, meter: Meter) -> None:
        data = self._piece(start)
        descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, memoryview(data)[written : written + BLOCK], start + written)
        finally:
            os.close(descriptor)
        meter.count(len(data))

    def _piece(self, start: int) -> bytes:
        length = self._length(start)
        if length == 0:
            return b""
        data = self._remote.place.read_range(file_name(self.file.sha256), start, start + length)
        if data is None:
            self._refuse("is not there")
        if len(data) != length:
            self._refuse("is shorter than its manifest says")
        return data

    def _is_whole(self) -> bool:
        """Whether the bytes that came are the file's; else they are dropped."""
        if digest_file(self._part) == self.file.sha256:
            return True
        self._note.unlink(missing_ok=True)
        self._part.unlink()
        return False

    def _finish(self, meter: Meter) -> None:
        is_whole = self._is_whole()
        if not is_whole and self._is_resumed:  # a power loss takes bytes whose note it has left; the remote is blamed for what was read now
            logger.warning("What an earlier pull has left of %s was damaged; the whole file is fetched again.", self.file.path)
            meter.count(-self.file.size)
            for start in range(0, max(self.file.size, 1), PIECE):
                self._fetch(start, meter)
            is_whole = self._is_whole()
        if not is_whole:
            self._refuse("has other bytes than its name says")
        self._part.chmod(0o444)
        sync_path(self._part)
        for file in self._same[1:]:
            _place(self._part, self._folder / file.path, os.link)
        _place(self._part, self._folder / self.file.path, os.replace)
        self._note.unlink(missing_ok=True)

    def _refuse(self, how: str) -> NoReturn:
        name = file_name(self.file.sha256)
        with contextlib.suppress(RemoteError):  # these rights may be for reading alone
            self._remote.place.create(f"damaged/{self.file.sha256}", b"")
        raise RemoteError(
            f"{self.file.path} cannot be pulled: {self._remote.url}/{name} {how}. `pesc push` from a machine whose store has the object "
            "sends it again; `pesc run RECIPE --refresh ADDRESS` builds it again."
        )


def _place(part: Path, target: Path, how: Callable[[Path, Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    how(part, target)
