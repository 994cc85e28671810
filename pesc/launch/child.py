"""One child process whose output is read line by line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from pesc.launch.guard import PARENT_VARIABLE
from pesc.launch.supervise import child_environment
from pesc.redaction import redact


def run_child(command: list[str], environment: dict[str, str], on_line: Callable[[str], None]) -> int:
    """Run a command that dies with this process; each line of its output goes to `on_line`, without secrets.  Returns its exit status."""
    child = subprocess.Popen(
        [sys.executable, "-m", "pesc.launch.guard", "--", *command],
        env={**child_environment(), **environment, PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with child:
        try:
            for line in child.stdout or ():
                on_line(redact(line.rstrip()))
            return child.wait()
        except BaseException:
            child.kill()
            raise
