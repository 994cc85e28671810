"""The process a candidate program runs in: `python -s -P -B guard.py RESULT_FD` with one JSON request on standard input.

Order matters: limits and the filter come first, the program is compiled only behind them.  It imports nothing of pesc, so that an
interpreter starts in some ten milliseconds.  Standard library only.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import resource
import signal
import sys
import types
from typing import Any

_PR_SET_PDEATHSIG = 1
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR, _EXECUTE = 1 << 2, 1 << 3, 1 << 0
_ALL_ABI_1 = (1 << 13) - 1
SYSTEM_FOLDERS = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/urandom",
    "/dev/zero",
    "/sys/devices/system/cpu",
)


def set_limits(limits: dict[str, int]) -> None:
    """CPU seconds, address space, file size, open files, core dumps.  The process dies with its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def drop_capabilities() -> None:
    """Root without capabilities is an ordinary user; without root this changes nothing."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    empty = (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(header), ctypes.byref(empty))


def confine_reads(folder: str) -> bool:
    """Landlock: only the interpreter, the system's libraries and the program's own folder can be read.  False where it is not offered."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_LANDLOCK_CREATE, None, 0, 1) < 1:
        return False
    attributes = ctypes.c_uint64(_ALL_ABI_1)
    ruleset = libc.syscall(_LANDLOCK_CREATE, ctypes.byref(attributes), 8, 0)
    if ruleset < 0:
        return False
    for path in {*SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, folder, *(entry for entry in sys.path if entry)}:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        rule = (ctypes.c_char * 12).from_buffer_copy(rights.to_bytes(8, "little") + handle.to_bytes(4, "little"))
        libc.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0)
        os.close(handle)
    libc.prctl(38, 1, 0, 0, 0)
    confined = libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return confined


def _load_filter() -> types.ModuleType:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "syscall_filter.py")
    spec = importlib.util.spec_from_file_location("syscall_filter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(program: str) -> str:
    """Execute the program; "" when it reached its end, else the name of what it raised."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    try:
        exec(compile(program, "candidate.py", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures too: the tests did not finish
        return type(error).__name__
    return ""


def main() -> None:
    """Read the request, confine, run, answer."""
    result_fd = int(sys.argv[1])
    request: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    answer: dict[str, Any] = {"isolated": False}
    syscall_filter = _load_filter()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    try:
        if len(os.listdir("/proc/self/task")) != 1:
            raise OSError("the guard has more than one thread")
        set_limits(request["limits"])
        drop_capabilities()
        answer["reads_confined"] = confine_reads(os.getcwd())
        syscall_filter.install_filter()
        answer["isolated"] = True
    except (OSError, ValueError) as error:
        answer["error"] = str(error)
    else:
        answer["error"] = run_program(request["program"])
        if not answer["error"]:
            answer["token"] = request["token"]
    os.write(result_fd, json.dumps(answer).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
