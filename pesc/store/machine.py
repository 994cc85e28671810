"""Which machine this is, as far as process numbers go: the same for all processes that can ask the kernel after one another."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

from pesc.store.digest import digest_json


@cache
def machine() -> str:
    """Differs between machines, boots and containers (those with the host's network have its name, but other process numbers); "" where
    nobody can say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def machine_mark() -> str:
    """The same as a part of a file's name."""
    return digest_json(machine())[:16]


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
