"""A flow run as a step of Slurm: what the pool type `slurm` runs in place of the flow's process.

    python -m deployments.slurm_step -- python -m prefect flow-run execute         (work_pools/slurm.json; on the worker's machine)

`srun` waits for the nodes, starts the command there and shows its output.  What it asks for stands in its own variables (SLURM_PARTITION,
SLURM_GPUS_PER_NODE, SLURM_TIMELIMIT ...), which the job template sets.  There the command is Prefect's own supervisor of a run, as in a pod.

What ends a run lets it save:
- a cancellation reaches the supervisor through the server; here it is waited for, while the job is still pending it is taken from the queue.
- a worker that stops sends SIGTERM, which srun itself would make a SIGKILL; it is passed on by scancel.
- a time limit or a preemption is Slurm's SIGTERM to every process of the step.
A step ends with its first process, so that one is ours: it waits until all that it has started, and all that these have left, is gone.
What has not ended after PESC_WORKER_GRACE seconds is ended.  If this process is killed, srun ends, and Slurm ends the step.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from types import FrameType

from pesc.launch.guard import PARENT_VARIABLE
from pesc.launch.supervise import child_environment

GRACE_SECONDS = 120.0
_POLL_SECONDS = 0.5
_PR_SET_CHILD_SUBREAPER = 36
_SRUN = ["srun", "--nodes=1", "--ntasks=1", "--kill-on-bad-exit=1", "--unbuffered"]


def main(arguments: list[str]) -> int:
    """Run the command after `--` on a node; ends with its exit code, 128 + N for signal N."""
    border = arguments.index("--") if "--" in arguments else len(arguments)
    place, command = arguments[:border], arguments[border + 1 :]
    if place not in ([], ["inside"]) or not command:
        print("usage: python -m deployments.slurm_step -- CMD ARG...", file=sys.stderr)
        return 2
    return inside(command) if place else outside(command)


def outside(command: list[str]) -> int:
    """On the worker's machine: srun, until the step has ended."""
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    name = f"pesc-{os.environ.get('PREFECT__FLOW_RUN_ID', os.getpid())}"
    step = _start(name, command)
    while step.poll() is None and not asked:
        time.sleep(_POLL_SECONDS)
    if step.poll() is None:
        _stop(name, step)
    code = step.wait()
    return code if code >= 0 else 128 - code


def inside(command: list[str]) -> int:
    """On the node, as the step's first process: the command, until it and all that it has left behind has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)  # the others have got it as well
    first = subprocess.Popen(command)
    code = first.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return code if code >= 0 else 128 - code


def _start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**child_environment(), PARENT_VARIABLE: str(os.getpid())}
    for variable in ("PYTHONSAFEPATH", "PREFECT__CONTROL_PORT", "PREFECT__CONTROL_TOKEN"):  # a port of this machine, not of the node
        environment.pop(variable, None)
    on_node = [sys.executable, "-m", "deployments.slurm_step", "inside", "--", *command]
    words = [sys.executable, "-m", "pesc.launch.guard", "--", *_SRUN, f"--job-name={name}", *on_node]
    return subprocess.Popen(words, env=environment, start_new_session=True)


def _stop(name: str, step: subprocess.Popen[bytes]) -> None:
    """End a job that waits; let one that runs save, and end it when its time is over."""
    _scancel("--state=PENDING", f"--name={name}")
    if not is_being_cancelled():
        _scancel("--state=RUNNING", "--signal=TERM", f"--name={name}")
    end = time.monotonic() + float(os.environ.get("PESC_WORKER_GRACE", GRACE_SECONDS))
    while step.poll() is None and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    if step.poll() is None:
        _scancel(f"--name={name}")
        step.terminate()


def _scancel(*arguments: str) -> None:
    subprocess.run(["scancel", "--quiet", *arguments], check=False)


def is_being_cancelled() -> bool:
    """Whether the server says that the run is being cancelled; no when it does not answer."""
    url, run = os.environ.get("PREFECT_API_URL"), os.environ.get("PREFECT__FLOW_RUN_ID")
    request = urllib.request.Request(f"{url}/flow_runs/{run}")
    if password := os.environ.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", f"Basic {b64encode(password.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())["state_type"] in ("CANCELLING", "CANCELLED")
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
