"""Signs of life of the ranks, and the watchdog that ends a run without any.

    heartbeat/rank_N    pid, number of the beat, what the rank is doing; written anew at each micro-batch and phase

The watchdog looks at changes of the text, not at times of files: clocks may be set, and a suspended machine is no hung rank.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pesc.errors import TrainingHungError
from pesc.launch import supervise
from pesc.stage import Execution

_WIDTH = 96
_STACK_SECONDS = 2.0
_PATIENT = ("loading", "saving", "writing")


class Heartbeat:
    """One rank's sign of life: a `pwrite` of a hundred bytes.  From now on SIGUSR1 writes the stacks of all threads to stderr."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"rank_{rank}", os.O_WRONLY | os.O_CREAT, 0o644)
        self._count = 0
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        self.beat("loading the model")

    def beat(self, doing: str) -> None:
        """Say what is done now.  `doing` beginning with loading, saving or writing may take `execution.load_seconds`."""
        self._count += 1
        text = f"{os.getpid()} {self._count} {doing}"[: _WIDTH - 1].ljust(_WIDTH - 1) + "\n"
        os.pwrite(self._file, text.encode("ascii", errors="replace"), 0)


@dataclass
class _Sign:
    """The last that was heard of a rank, and when (monotonic seconds)."""

    text: str
    heard: float

    @property
    def doing(self) -> str:
        return self.text.split(maxsplit=2)[2].strip()

    @property
    def count(self) -> int:
        return int(self.text.split()[1])

    @property
    def pid(self) -> int:
        return int(self.text.split()[0])


class Watchdog:
    """Work for `supervise.run(step=...)`: raises TrainingHungError, after all ranks were killed, when one gave no sign for too long."""

    def __init__(
        self, address: str, folder: Path, pids: Path, execution: Execution, log_path: Path, describe_kept: Callable[[], str]
    ) -> None:
        """pids: where the ranks left their pids.  describe_kept: a sentence about the checkpoint that is kept, or ""."""
        self._address, self._folder, self._pids, self._log_path, self._describe_kept = address, folder, pids, log_path, describe_kept
        self._allowed, self._allowed_loading = execution.hang_seconds, max(execution.hang_seconds, execution.load_seconds)
        self._interval = min(5.0, execution.hang_seconds / 10)
        self._signs: dict[int, _Sign] = {}
        self._looked = float("-inf")
        self._error: tuple[float, TrainingHungError] | None = None
        shutil.rmtree(folder, ignore_errors=True)

    def __call__(self) -> bool:
        """Look, if it is time to; always False (there is no more work)."""
        now = time.monotonic()
        if self._error is not None:
            if now >= self._error[0]:
                supervise.kill_recorded(self._pids)
                raise self._error[1]
        elif now - self._looked >= self._interval:
            self._looked = now
            self._listen(now)
            if self._silent(now):
                self._error = (now + _STACK_SECONDS, self._describe(now))
                for number in (signal.SIGUSR1, signal.SIGCONT):  # a stopped process must run to write its stack
                    supervise.signal_recorded(self._pids, number)
        return False

    def _listen(self, now: float) -> None:
        for path in self._folder.glob("rank_*"):
            rank, text = int(path.name.removeprefix("rank_")), path.read_text(encoding="ascii", errors="replace")
            if len(text) == _WIDTH and (rank not in self._signs or self._signs[rank].text != text):
                self._signs[rank] = _Sign(text, now)

    def _silent(self, now: float) -> bool:
        return any(now - sign.heard > self._allowance(sign) for sign in self._signs.values())

    def _allowance(self, sign: _Sign) -> float:
        return self._allowed_loading if sign.doing.startswith(_PATIENT) else self._allowed

    def _describe(self, now: float) -> TrainingHungError:
        """The error, about the rank that the others wait for: the one with the fewest beats, a stopped one first."""
        rank, sign = min(self._signs.items(), key=lambda item: (not is_stopped(item[1].pid), item[1].count, item[1].heard))
        state = ", which somebody stopped (SIGSTOP)" if is_stopped(sign.pid) else ""
        setting = "load_seconds" if sign.doing.startswith(_PATIENT) else "hang_seconds"
        return TrainingHungError(
            f"{self._address} hung: rank {rank} (process {sign.pid}{state}) gave no sign of life for {now - sign.heard:.0f} seconds while "
            f"{sign.doing}; execution.{setting} allows {self._allowance(sign):g}. All ranks were ended; their stacks are in "
            f"{self._log_path}.{self._describe_kept()}"
        )


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; False where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False
