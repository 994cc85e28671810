"""Start one command on every machine of a DeepSpeed hostfile, over ssh.

    node0 slots=8
    node1 slots=8        # comments and empty lines are skipped

The first machine is where they meet.  What each says arrives here with its name in front; when one fails, all are ended.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pesc.errors import RecipeError, StageFailedError
from pesc.launch.guard import PARENT_VARIABLE
from pesc.launch.supervise import child_environment
from pesc.launch.torchrun import DEFAULT_PORT
from pesc.redaction import redact

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[1-9]\d*)")
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0
_DRAIN_SECONDS = 2.0


@dataclass(frozen=True)
class Machine:
    """A line of a hostfile.  slots: ranks on it."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Machine]:
    """The machines, in the file's order.  Raises RecipeError for a file that is absent, empty, or not in the format."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecipeError(f"The hostfile {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError:
        raise RecipeError(f"The hostfile {path} is not a text file: write one machine a line, NAME slots=N.") from None
    machines = []
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        if not (match := _LINE.fullmatch(text)):
            raise RecipeError(f"{path}, line {number}: {text!r} is not NAME slots=N.")
        machines.append(Machine(match["name"], int(match["slots"])))
    if not machines:
        raise RecipeError(f"The hostfile {path} names no machine: write one a line, NAME slots=N.")
    if len({machine.name for machine in machines}) < len(machines):
        raise RecipeError(f"The hostfile {path} names a machine twice: give each one line.")
    if len({machine.slots for machine in machines}) > 1:
        raise RecipeError(f"The hostfile {path} has machines of different slots: training needs as many ranks on each.")
    return machines


def settings_for(machines: Sequence[Machine], port: int = DEFAULT_PORT) -> list[str]:
    """The overrides that make a run of these machines; the same for each."""
    meeting = [f"execution.num_nodes={len(machines)}", f"execution.master={machines[0].name}:{port}"] if len(machines) > 1 else []
    return [*meeting, f"execution.num_processes={machines[0].slots}"]


def run_everywhere(machines: Sequence[Machine], argv: Sequence[str], ssh: str, say: Callable[[str], None]) -> None:
    """Run `SSH NAME COMMAND` for each machine; each line of output goes to `say` as "NAME: line".

    ssh: a command line such as "ssh -o BatchMode=yes -tt" (a terminal makes the remote command end with the connection).
    Raises StageFailedError with the name and the exit status of the first that fails, after the others have been ended.
    """
    running: dict[str, subprocess.Popen[str]] = {}
    readers, turn = [], threading.Lock()

    def say_alone(line: str) -> None:
        with turn:  # print writes a line and its end apart
            say(line)

    try:
        for machine in machines:
            running[machine.name] = _start([*shlex.split(ssh), machine.name, shlex.join(argv)])
            readers.append(threading.Thread(target=_follow, args=(machine.name, running[machine.name], say_alone), daemon=True))
            readers[-1].start()
        while any(child.poll() is None for child in running.values()) and not _failed(running):
            time.sleep(_POLL_SECONDS)
        failed = _failed(running)
    finally:
        _end(list(running.values()))
        for reader in readers:
            reader.join(_DRAIN_SECONDS)
    if failed:
        raise StageFailedError(f"The command on {failed} ended with exit status {running[failed].returncode}; the others were ended.")


def _start(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pesc.launch.guard", "--", *argv],
        env={**child_environment(), PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )


def _follow(name: str, child: subprocess.Popen[str], say: Callable[[str], None]) -> None:
    for line in child.stdout or ():
        say(f"{name}: {redact(line.rstrip())}")


def _failed(running: dict[str, subprocess.Popen[str]]) -> str | None:
    return next((name for name, child in running.items() if child.poll()), None)


def _end(children: Sequence[subprocess.Popen[str]]) -> None:
    """SIGTERM to each group that still runs, the grace time, SIGKILL."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
