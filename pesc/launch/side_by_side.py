"""Build several independent actions at once, each in a process of its own, at most so many at a time.

    with SideBySide(store, slots=4) as side:
        side.add(job, on_progress)                     # as long as side.has_room
        for job, result in side.step(): ...            # Outcome, or the PescError that it failed with

Key contracts
- The bytes are those of building one after another: a job knows nothing of its neighbours.
- Each slot sees one GPU (the slots share them in turn when there are fewer), so that neighbours never compete for its memory by chance.
- One loop in the caller's main thread reads all of them. Whatever leaves the `with` block stops every process that is still there.

Pitfall: on a CPU the processes share its cores, so several at once are seldom faster than one after another.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from pesc.build import Job, Outcome
from pesc.errors import PescError
from pesc.launch import supervise
from pesc.launch.events import relay
from pesc.launch.isolated import ended_badly, error_from_record
from pesc.stage import Execution, Progress
from pesc.store import ArtifactRef, Store

logger = logging.getLogger(__name__)
PROGRAM = (sys.executable, "-m", "pesc.launch.one_job")
GRACE_SECONDS = 20.0


@dataclass
class _Child:
    job: Job
    slot: int
    folder: Path
    log: IO[str]
    process: subprocess.Popen[bytes]
    output: supervise.Output


class SideBySide:
    """Jobs in processes of their own.  A context manager, in the main thread."""

    def __init__(self, store: Store, slots: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("SideBySide must be used from the main thread: only it receives signals, and the children die with it.")
        self._store, self._slots = store, slots
        self._children: list[_Child] = []
        self._stack = ExitStack()

    def __enter__(self) -> SideBySide:
        self._stack.enter_context(supervise.termination_raised())
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            for child in self._children:  # all at once, so that they share one grace time
                supervise.kill_group(child.process.pid, signal.SIGTERM)
            for child in list(self._children):
                child.output.on_event = None
                supervise.stop(child.process, child.output, GRACE_SECONDS)
                self._close(child)
        finally:
            self._stack.close()

    @property
    def has_room(self) -> bool:
        """Whether another job may be added."""
        return len(self._children) < self._slots

    @property
    def is_busy(self) -> bool:
        """Whether a job is under way."""
        return bool(self._children)

    def add(self, job: Job, on_progress: Callable[[Progress], None]) -> None:
        """Start a job.  Its progress comes to `on_progress`, from within `step`."""
        slot = min(set(range(self._slots)) - {child.slot for child in self._children})
        folder = Path(tempfile.mkdtemp(prefix="pesc-job-"))
        (folder / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
        log = (folder / "log.txt").open("a", encoding="utf-8", errors="replace")
        paths = [str(self._store.root), str(folder / "job.json"), str(folder / "result.json")]
        process = supervise.start([*PROGRAM, *paths], gpu_of_slot(slot, job.execution))
        output = supervise.Output(process, log, lambda event: relay(event, on_progress))
        self._children.append(_Child(job, slot, folder, log, process, output))

    def step(self, seconds: float = 0.2) -> Iterator[tuple[Job, Outcome | PescError]]:
        """Read what the children say, for about so long; the jobs that have ended, with what became of them."""
        for child in list(self._children):
            child.output.pump(seconds / max(1, len(self._children)))
            if child.process.poll() is not None:
                child.output.drain(1.0)
                result = self._result(child)
                self._close(child)
                yield child.job, result

    def _result(self, child: _Child) -> Outcome | PescError:
        path = child.folder / "result.json"
        if not path.exists():
            ended = supervise.Outcome(child.process.returncode, child.output.tail)
            return ended_badly(child.job.address, ended, self._keep_log(child))
        record = json.loads(path.read_text(encoding="utf-8"))
        if error := record.get("error"):
            return error_from_record(error)
        return Outcome(child.job.address, ArtifactRef.model_validate(record["ref"]), record["how"], record["seconds"])

    def _keep_log(self, child: _Child) -> Path:
        """What the child printed, where the job's workspace keeps it."""
        work = self._store.workspace_path(child.job.key.stage, child.job.fingerprint)
        child.log.flush()
        work.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(child.folder / "log.txt", work / "process.log"))

    def _close(self, child: _Child) -> None:
        self._children.remove(child)
        supervise.kill_group(child.process.pid, signal.SIGKILL)  # stragglers, after an orderly end too
        child.process.wait()
        child.output.close()
        child.log.close()
        shutil.rmtree(child.folder, ignore_errors=True)


def run_jobs(
    store: Store,
    jobs: list[Job],
    slots: int,
    on_start: Callable[[Job], None],
    on_progress: Callable[[Job, Progress], None],
    on_end: Callable[[Job, Outcome | PescError], None],
) -> None:
    """Build all of them, at most `slots` at a time.  An error that `on_end` raises stops the others."""
    waiting = list(jobs)
    with SideBySide(store, slots) as side:
        while waiting or side.is_busy:
            while waiting and side.has_room:
                job = waiting.pop(0)
                on_start(job)
                side.add(job, lambda progress, job=job: on_progress(job, progress))
            for job, result in side.step():
                on_end(job, result)


def gpu_of_slot(slot: int, execution: Execution) -> Mapping[str, str]:
    """The environment that gives a slot one of this process's GPUs; nothing where there is none, or the CPU is asked for."""
    gpus = visible_gpus() if execution.device != "cpu" else []
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    from pesc.provenance import hardware

    return [str(number) for number in range(len(hardware()["gpus"]))]
