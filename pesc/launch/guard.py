"""Become a command that dies with its parent.

    python -m pesc.launch.guard -- CMD ARG...

Linux: ask the kernel for SIGTERM when the parent dies, make sure that it is still alive, then exec CMD (the request survives
exec).  Elsewhere: run CMD as a child and watch the parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PARENT_VARIABLE = "PESC_PARENT_PID"
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 20.0


def die_with_parent(parent: int, number: int = signal.SIGTERM) -> bool:
    """Ask for signal `number` when process `parent` (this one's parent) dies; True when the kernel can do that (Linux).

    Raises ProcessLookupError if the parent is already gone: then nobody would ever send the signal.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:  # it died before the request was made
        raise ProcessLookupError(f"The parent process {parent} has ended.")
    return True


def main(arguments: list[str]) -> int:
    """Guard the command after `--`.  Returns its exit code only where it had to be watched; on Linux it does not return."""
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        print("usage: python -m pesc.launch.guard -- CMD ARG...", file=sys.stderr)
        return 2
    parent = int(os.environ.pop(PARENT_VARIABLE, "0")) or os.getppid()
    try:
        guarded = die_with_parent(parent)
    except ProcessLookupError:
        return 128 + signal.SIGTERM
    if not guarded:
        return _watch(command, parent)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127


def _watch(command: list[str], parent: int) -> int:
    """Run the command and end it when `parent` is no longer this process's parent, or when asked to stop."""
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda number, _frame: child.send_signal(number))
    while child.poll() is None:
        if os.getppid() != parent:
            _end(child)
        time.sleep(_POLL_SECONDS)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
