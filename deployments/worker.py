"""A worker that lets its runs save before it stops.

    python -m deployments.worker --pool gpu --limit 1            what `prefect worker start` takes
    PESC_WORKER_GRACE=120 python -m deployments.worker ...       seconds that the runs have

`prefect worker start` ends its runs with SIGKILL when it is told to stop: training loses the steps since its last checkpoint, and the run
stays Running until the zombie automation finds it.  This one keeps the worker from taking new runs, tells each run to stop, waits until
they have saved and said so (they are Crashed, and the same run again goes on from there), and stops the worker then.  A run that had not
begun yet goes back to its queue.  A second SIGTERM or Ctrl-C, or the end of the time, ends everything at once.  A worker of the type
docker or kubernetes has no runs of its own to wait for and simply stops.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from uuid import UUID

from pesc.launch.guard import PARENT_VARIABLE
from pesc.launch.supervise import child_environment

logger = logging.getLogger(__name__)
GRACE_SECONDS = 120.0
_POLL_SECONDS = 0.2
_RUN_ID = re.compile(rb"(?:^|\0)PREFECT__FLOW_RUN_ID=([0-9a-f-]{36})")


def runs_of(worker: int) -> dict[int, UUID]:
    """Processes of flow runs that the worker has started and that have not ended, and which run each is."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            run = _RUN_ID.search((folder / "environ").read_bytes()) if int(parent) == worker and state not in "ZX" else None
        except OSError:  # it has just ended
            continue
        if run:
            found[int(folder.name)] = UUID(run[1].decode())
    return found


def give_back(runs: Iterable[UUID]) -> list[str]:
    """Put runs that were taken and have not begun (Pending) back into their queues: without a process nobody would; returns their names."""
    from prefect.client.orchestration import get_client
    from prefect.states import Scheduled

    given = []
    with get_client(sync_client=True) as client:
        for number in runs:
            run = client.read_flow_run(number)
            if run.state and run.state.is_pending():
                client.set_flow_run_state(number, Scheduled(message="Its worker was stopped before it began."), force=True)
                given.append(run.name)
    return given


class Worker:
    """`prefect worker start` as a child of this process."""

    def __init__(self, arguments: list[str], grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._asked = 0
        self._told: set[UUID] = set()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        command = [sys.executable, "-m", "pesc.launch.guard", "--", sys.executable, "-m", "prefect", "worker", "start", *arguments]
        environment = {**child_environment(), PARENT_VARIABLE: str(os.getpid())}
        environment.pop("PYTHONSAFEPATH")  # flows are imported from the checkout to which a run goes
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)  # a Ctrl-C is this process's alone

    def wait(self) -> int:
        """Until the worker has ended, by itself or because it was asked to.  Returns its exit code."""
        while self._process.poll() is None and not self._asked:
            time.sleep(_POLL_SECONDS)
        if self._process.poll() is None:
            self._drain()
            self._end()
            self._give_back()
        code = self._process.wait()
        if self._asked == 1 and code == -signal.SIGTERM:  # it was not yet listening
            return 0
        return code if code >= 0 else 128 - code

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked += 1

    def _drain(self) -> None:
        """Tell the runs to stop and wait for them, while the worker stands still and takes no others."""
        runs = runs_of(self._process.pid)
        if not runs:
            return
        print(f"Stopping: {len(runs)} runs have {self._grace_seconds:.0f} s to save. Once more stops them at once.", flush=True)
        self._process.send_signal(signal.SIGSTOP)
        runs = runs_of(self._process.pid)  # it may have started one in the meantime
        self._told = set(runs.values())
        for process in runs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        end = time.monotonic() + self._grace_seconds
        while runs_of(self._process.pid) and time.monotonic() < end and self._asked < 2:
            time.sleep(_POLL_SECONDS)

    def _end(self) -> None:
        """SIGTERM to the worker, which it gets when it may go on; it ends what is left of its runs."""
        self._process.terminate()
        self._process.send_signal(signal.SIGCONT)
        while self._process.poll() is None and self._asked < 2:
            time.sleep(_POLL_SECONDS)
        self._process.kill()

    def _give_back(self) -> None:
        """Runs that were told to stop while they were still importing have said nothing to anybody."""
        self._process.wait()
        try:
            for name in give_back(self._told) if self._told else ():
                print(f"{name} had not begun and waits for another worker.", flush=True)
        except Exception as error:
            logger.warning("Runs that had not begun may stay Pending (%s: %s).", type(error).__name__, error)


def main(arguments: list[str]) -> int:
    """Entry point; ends as the worker ends."""
    return Worker(arguments, float(os.environ.get("PESC_WORKER_GRACE", GRACE_SECONDS))).wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
