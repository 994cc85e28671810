"""Start a command, follow its output, and leave nothing behind.

The command runs in a session of its own behind `pesc.launch.guard`.  One loop in the caller's main thread reads its pipe: events go
to `on_event`, everything else to the log file.  Whatever interrupts the loop (an error of `on_event`, Ctrl-C, SIGTERM, Prefect's
cancellation) is raised again after the tree has been stopped: SIGTERM to the group, the grace time, SIGKILL to the group, then to
every recorded pid that is still the same process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from pesc.launch.events import Event, parse
from pesc.launch.guard import PARENT_VARIABLE
from pesc.redaction import redact

logger = logging.getLogger(__name__)
TAIL_LINES = 50
_POLL_SECONDS = 0.5
_DRAIN_SECONDS = 2.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Outcome:
    """How a command ended.  returncode: negative for the signal that killed it.  tail: the last lines that were not events."""

    returncode: int
    tail: str


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log_path: Path,
    on_event: Callable[[Event], object],
    grace_seconds: float = 20.0,
    pids_dir: Path | None = None,
    step: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run a command to its end, in the caller's main thread.

    env: variables added to `child_environment()`.  pids_dir: where members of other sessions (ranks) leave their pids.
    step: work of the caller's own, a piece at a time between two reads; true while there is more.
    A log file that exists is continued.  Raises whatever interrupted it, with the tail of the log as a note.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("supervise.run must be called from the main thread: only it receives signals, and the child dies with it.")
    with termination_raised(), log_path.open("a", encoding="utf-8", errors="replace") as log:
        process = start(argv, env)
        output = Output(process, log, on_event)
        try:
            output.follow(step)
        except BaseException as error:
            output.on_event = None
            stop(process, output, grace_seconds)
            if output.tail:
                error.add_note(f"The last lines of {log_path}:\n{output.tail}")
            raise
        finally:
            kill_group(process.pid, signal.SIGKILL)  # stragglers, after an orderly end too
            kill_recorded(pids_dir)
            output.close()
        return Outcome(process.returncode, output.tail)


def start(argv: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a command behind the guard, in a session of its own, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "pesc.launch.guard", "--", *argv],
        env={**child_environment(), **(env or {}), PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def child_environment() -> dict[str, str]:
    """This process's environment, made safe for `python -m pesc...` from any working directory."""
    paths = [_PACKAGE_ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONSAFEPATH": "1",  # a folder `datasets` in the working directory must not shadow the library
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
    }


class Output:
    """The read end of a command's pipe."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[str], on_event: Callable[[Event], object] | None) -> None:
        assert process.stdout is not None
        self.on_event = on_event
        self._process = process
        self._log = log
        self._pipe = process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._rest = b""
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)

    @property
    def tail(self) -> str:
        """The last lines that were not events."""
        return "\n".join(self._lines)

    def follow(self, step: Callable[[], bool]) -> None:
        """Read until the command has ended and the pipe is empty; do a piece of the caller's work between two reads.

        A grandchild may hold the pipe open after the command is gone, so the end of the pipe is waited for only a moment.
        """
        is_open = True
        while self._process.poll() is None:
            seconds = 0 if step() else _POLL_SECONDS
            if is_open:
                is_open = self.pump(seconds)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        self.drain(_DRAIN_SECONDS)

    def drain(self, seconds: float) -> None:
        """Read what is left, at most for `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.pump(0.1):
            pass
        self._take(b"\n" if self._rest else b"")

    def pump(self, timeout: float) -> bool:
        """Read once, waiting at most `timeout` seconds; False when every writer has closed the pipe."""
        if not self._selector.select(timeout):
            return True
        data = os.read(self._pipe.fileno(), 65536)
        self._take(data)
        return bool(data)

    def close(self) -> None:
        """Close the pipe."""
        self._selector.close()
        self._pipe.close()

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for position, line in enumerate(lines):
            noise, event = parse(line.decode("utf-8", errors="replace"))
            self._note(noise)
            if event is not None and self.on_event is not None:
                try:
                    self.on_event(event)
                except BaseException:
                    self._rest = b"\n".join([*lines[position + 1 :], self._rest])  # nothing of the log is lost
                    raise
        self._log.flush()

    def _note(self, text: str) -> None:
        text = text.rstrip("\r").rpartition("\r")[2]  # progress bars: what a terminal would still show
        if text.strip():
            text = redact(text)
            self._log.write(f"{text}\n")
            self._lines.append(text)
            logger.debug("%s", text)


def stop(process: subprocess.Popen[bytes], output: Output, grace_seconds: float) -> None:
    """SIGTERM to the group, wait while reading on (a full pipe would block the child), then SIGKILL."""
    kill_group(process.pid, signal.SIGTERM)
    end = time.monotonic() + grace_seconds
    try:
        while not _reap(process, os.WNOHANG) and time.monotonic() < end:
            if not output.pump(0.1):
                time.sleep(0.1)
    finally:  # a second Ctrl-C ends the wait, not the cleaning
        kill_group(process.pid, signal.SIGKILL)
        _reap(process, 0)
        output.drain(0.5)


def _reap(process: subprocess.Popen[bytes], options: int) -> bool:
    """Whether the child has ended, as `Popen.poll` and `wait` find it, but without their lock.

    What a signal handler raises inside `poll` may leave that lock taken, and then nobody would ever return from `wait`.
    """
    if process.returncode is None:
        try:
            pid, status = os.waitpid(process.pid, options)
        except ChildProcessError:  # that `poll` had it already
            pid, status = process.pid, signal.SIGKILL
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode is not None


def kill_group(group: int, number: int) -> None:
    """Send a signal to a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@contextlib.contextmanager
def termination_raised() -> Iterator[None]:
    """Let SIGTERM raise SystemExit(143) while a command runs, unless the program has a handler of its own (Prefect has)."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def record_pid(pids_dir: Path) -> None:
    """Leave this process's pid, and when it started, for the supervisor."""
    pids_dir.mkdir(parents=True, exist_ok=True)
    (pids_dir / str(os.getpid())).write_text(_started(os.getpid()) or "", encoding="ascii")


def signal_recorded(pids_dir: Path, number: int) -> None:
    """Send a signal to every recorded process that is still the one that recorded itself."""
    for record in sorted(pids_dir.glob("[0-9]*")):
        pid = int(record.name)
        started = _started(pid)
        if started is not None and started == record.read_text(encoding="ascii"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def kill_recorded(pids_dir: Path | None) -> None:
    """SIGKILL every recorded process that is still the one that recorded itself, and forget the records."""
    for record in sorted(pids_dir.glob("[0-9]*")) if pids_dir else ():
        pid = int(record.name)
        started = _started(pid)
        if started is not None and started == record.read_text(encoding="ascii"):
            logger.warning("Process %d was still there after its launcher had ended; it was killed.", pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        record.unlink(missing_ok=True)


def _started(pid: int) -> str | None:
    """When a living process started, as the system writes it; None when there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        pass
    if sys.platform.startswith("linux"):
        return None
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
