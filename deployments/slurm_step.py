"""A flow run as a step of Slurm: what the pool type `slurm` runs in place of the flow's process.

    python -m deployments.slurm_step -- python -m prefect.engine         (work_pools/slurm.json; the worker runs it, on a login node)

`srun` waits for the nodes, starts the command there and shows its output.  What it asks for stands in its own variables (SLURM_PARTITION,
SLURM_GPUS_PER_NODE, SLURM_TIMELIMIT ...), which the job template sets.

SIGTERM, which a cancellation and a worker that stops send, ends a job that waits and is passed on to one that runs, so that it can save: srun itself
would kill it.  What has not ended after PESC_WORKER_GRACE seconds is ended.  If this process is killed, srun ends and Slurm ends the step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from pesc.launch.guard import PARENT_VARIABLE
from pesc.launch.supervise import child_environment

GRACE_SECONDS = 120.0
_POLL_SECONDS = 0.5
_SRUN = ["srun", "--nodes=1", "--ntasks=1", "--kill-on-bad-exit=1", "--unbuffered"]


def main(arguments: list[str]) -> int:
    """Run the command after `--` on a node; ends with its exit code, 128 + N for signal N."""
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        print("usage: python -m deployments.slurm_step -- CMD ARG...", file=sys.stderr)
        return 2
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


def _start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**child_environment(), PARENT_VARIABLE: str(os.getpid())}
    for variable in ("PYTHONSAFEPATH", "PREFECT__CONTROL_PORT", "PREFECT__CONTROL_TOKEN"):  # a port of this machine, not of the node
        environment.pop(variable, None)
    words = [sys.executable, "-m", "pesc.launch.guard", "--", *_SRUN, f"--job-name={name}", *command]
    return subprocess.Popen(words, env=environment, start_new_session=True)


def _stop(name: str, step: subprocess.Popen[bytes]) -> None:
    """End a job that waits; let one that runs save, and end it when its time is over."""
    _scancel("--state=PENDING", f"--name={name}")
    _scancel("--state=RUNNING", "--signal=TERM", f"--name={name}")
    end = time.monotonic() + float(os.environ.get("PESC_WORKER_GRACE", GRACE_SECONDS))
    while step.poll() is None and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    if step.poll() is None:
        _scancel(f"--name={name}")
        step.terminate()


def _scancel(*arguments: str) -> None:
    subprocess.run(["scancel", "--quiet", *arguments], check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
