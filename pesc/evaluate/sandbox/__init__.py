"""Runs model-written programs so that they can compute and print, and do nothing else.

Promises, each enforced by the kernel and checked by `require_isolation` before the first program runs:
- no network: no socket can be made;
- no change to any file: nothing can be opened for writing, created, renamed or removed, not even in the program's own (empty,
  temporary) folder, so that a program behaves the same on every machine;
- no other process: it cannot fork, exec, trace or signal; threads are allowed;
- bounded CPU seconds, address space, open files and output; a wall-clock net behind the CPU limit (the CPU limit decides, because it
  does not depend on how busy the machine is);
- no environment, no standard input, no capabilities even for root; killed with its whole session, and when its parent dies.
Where the kernel offers Landlock (5.13 or newer), reading is confined to the interpreter and the system's libraries as well.

Needs Linux on x86_64 or aarch64 with seccomp filters, which containers allow for root and ordinary users alike: neither user
namespaces nor privileges are used.  Where that is not given, programs are not run at all (EvaluationError).

Never: it does not hide the interpreter from the program. A program that inspects its own interpreter can forge a pass; scores are
honest for programs written to solve a problem, not for programs written against this harness.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from pesc.errors import EvaluationError

GUARD = Path(__file__).with_name("guard.py")
Status = Literal["passed", "failed", "timeout", "killed"]


@dataclass(frozen=True)
class Limits:
    """What one program may use.  cpu_seconds decides; wall_seconds ends programs that sleep.

    The slowest reference solution of MBPP (problem 123) needs six CPU seconds.
    """

    cpu_seconds: int = 20
    wall_seconds: float = 90.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    status: passed = it ran to its end; failed = it raised (or left early); timeout = CPU or wall limit; killed = a signal.
    reason: the exception's or the signal's name, "" when passed.  Free of addresses and messages, hence the same in each run.
    output: the first bytes of what it printed (both streams), for people.
    """

    status: Status
    reason: str = ""
    output: str = ""
    reads_confined: bool = False

    @property
    def passed(self) -> bool:
        """True when the program, tests included, ran to its end."""
        return self.status == "passed"


DEFAULT_LIMITS = Limits()


class _IsolationError(Exception):
    """The guard could not confine itself."""


def run_program(program: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run one program.  Raises EvaluationError when it cannot be isolated."""
    try:
        return _run(program, limits)
    except _IsolationError as error:
        raise EvaluationError(
            f"Model-written code cannot be isolated on this machine ({error}); run the benchmark on Linux x86_64 or aarch64 with seccomp filters allowed."
        ) from None


def run_programs(programs: Sequence[str], limits: Limits = DEFAULT_LIMITS, workers: int | None = None) -> list[Outcome]:
    """Run many programs, `workers` at a time (default: one a core).  Outcomes in order."""
    require_isolation()
    with ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


_PROBE = """
import os, socket, subprocess, tempfile
def denied(call):
    try:
        call()
    except OSError:
        return True
    return False
assert denied(lambda: socket.socket())
assert denied(lambda: os.fork())
assert denied(lambda: subprocess.run(["true"]))
assert denied(lambda: open("written", "w"))
assert denied(lambda: os.mkdir("made"))
assert denied(lambda: os.remove("canary"))
assert denied(lambda: os.kill(os.getppid(), 0))
assert len(os.environ) < 12 and "HOME" not in os.environ
"""


def require_isolation() -> Outcome:
    """Prove on this machine that the promises hold.  Raises EvaluationError when one does not."""
    outcome = run_program(_PROBE)
    if not outcome.passed:
        raise EvaluationError(
            f"The sandbox for model-written code does not hold on this machine ({outcome.status}: {outcome.reason}); no code was run. "
            "Use another machine or leave the code benchmarks out of the recipe."
        )
    return outcome


def _run(program: str, limits: Limits) -> Outcome:
    folder = tempfile.mkdtemp(prefix="pesc-candidate-")
    token = secrets.token_hex(16)
    read_fd, write_fd = os.pipe()
    try:
        Path(folder, "canary").touch()
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", str(GUARD), str(write_fd)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True, pass_fds=(write_fd,),
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        )  # fmt: skip
        os.close(write_fd)
        request = json.dumps({"program": program, "token": token, "limits": asdict(limits)}).encode()
        output, timed_out = _supervise(process, request, limits)
        with os.fdopen(read_fd, "rb", closefd=False) as answers:
            answer = answers.read(1 << 16)
    finally:
        os.close(read_fd)
        shutil.rmtree(folder, ignore_errors=True)
    return _classify(answer, token, process.returncode, timed_out, output)


def _supervise(process: subprocess.Popen[bytes], request: bytes, limits: Limits) -> tuple[str, bool]:
    """Feed the request, drain the output, wait; the whole session is killed at the end whatever happened."""
    kept = bytearray()
    assert process.stdin is not None
    assert process.stdout is not None
    drain = threading.Thread(target=_drain, args=(process.stdout, kept, limits.output_bytes), daemon=True)
    drain.start()
    timed_out = False
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.close()
        process.wait(limits.wall_seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        drain.join()
        process.stdout.close()
    return kept.decode(errors="replace"), timed_out


def _drain(stream: IO[bytes], kept: bytearray, limit: int) -> None:
    while chunk := stream.read1(1 << 16):  # type: ignore[attr-defined]
        kept += chunk[: max(0, limit - len(kept))]


def _classify(raw: bytes, token: str, returncode: int, timed_out: bool, output: str) -> Outcome:
    try:
        answer = json.loads(raw)
        answer = answer if isinstance(answer, dict) else {}
    except ValueError:
        answer = {}
    if "isolated" in answer and not answer["isolated"]:
        raise _IsolationError(answer.get("error") or "the guard could not confine itself")
    confined = bool(answer.get("reads_confined"))
    if answer.get("token") == token:
        return Outcome("passed", "", output, confined)
    if timed_out or -returncode in (signal.SIGXCPU, signal.SIGKILL):
        return Outcome("timeout", "wall" if timed_out else "cpu", output, confined)  # SIGKILL: the hard CPU limit
    if returncode < 0:
        return Outcome("killed", signal.Signals(-returncode).name, output, confined)
    if not answer and returncode > 0 and "candidate.py" not in output and "guard.py" in output:
        raise _IsolationError(f"the guard failed: {output.strip().splitlines()[-1]}")
    return Outcome("failed", str(answer.get("error") or "left before the end"), output, confined)
