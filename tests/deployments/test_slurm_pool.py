"""A pool of the type slurm on a real Slurm of one node: a run is a step with the GPUs that it asks for; what ends it lets it save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pesc.store import Store
from pesc.store.workspace import is_locked
from tests.deployments.servers import ROOT, PrefectServer, bootstrap_with_saving, prefect, wait_for
from tests.deployments.slurm_cluster import slurm
from tests.deployments.test_worker import OURS, alive, saved, start_run

__all__ = ["prefect", "slurm"]
pytestmark = [pytest.mark.slow, pytest.mark.long]
STEP = [sys.executable, "-m", "deployments.slurm_step", "--"]


@pytest.fixture(scope="module")
def server(prefect, slurm):
    """A bootstrapped server with a slurm pool `cpu`, the flow `saving` in it, a recipe, and a worker on the login node."""
    server = prefect
    server.environment |= {
        **slurm,
        "PESC_STORE": str(server.folder / "store"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    pool = {"type": "slurm", "gpus": 1, "variables": {"partition": "gpu", "memory": "0", "cpus": "1"}}
    bootstrap_with_saving(server, {"pools": {"cpu": pool}})
    server.worker = server.start(*OURS, "--pool", "cpu", cwd=ROOT)
    return server


def queue(server: PrefectServer, what: str = "%j") -> list[str]:
    """What Slurm says of its jobs."""
    return server.run("squeue", "--noheader", f"--format={what}").split()


def submit(server: PrefectServer, name: str, **parameters: object) -> str:
    deployment = server.get(f"deployments/name/{name}")["id"]
    return server.post(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]


def test_a_stage_runs_as_a_step_with_its_gpu(server):
    run = submit(server, "download/cpu", recipe=str(server.recipe), instance="rows", store=str(server.folder / "store"))
    done = server.wait_for_state(run, "COMPLETED", "FAILED", "CRASHED")
    assert done["state_type"] == "COMPLETED", done["state"]
    (manifest,) = Store(server.folder / "store").manifests("download")
    assert manifest.prefect_run == run
    wait_for(lambda: not queue(server), 30, "the step to end")


def test_a_run_that_is_cancelled_saves_and_its_step_is_gone(server, tmp_path):
    store = Store(tmp_path / "store")
    run, rank = start_run(server, store)
    assert queue(server) == [f"pesc-{run}"]
    assert queue(server, "%P %b") == ["gpu", "gres:gpu:1"]
    server.prefect("flow-run", "cancel", run)
    assert server.wait_for_state(run, "CANCELLED", "CRASHED", "FAILED", seconds=60)["state_type"] == "CANCELLED"
    wait_for(lambda: not queue(server), 60, "the step to end")
    assert not alive(rank)
    assert saved(store)
    assert not any(is_locked(path) for path in store.root.glob("work/*/*"))


def test_a_worker_that_is_told_to_stop_lets_its_step_save_and_say_so(server, tmp_path):
    store = Store(tmp_path / "store")
    run, rank = start_run(server, store)
    server.worker.send_signal(signal.SIGTERM)
    assert server.worker.wait(60) == 0
    assert saved(store)
    assert not alive(rank)
    assert queue(server) == []
    assert server.wait_for_state(run, "CRASHED", "FAILED", "CANCELLED", seconds=10)["state_type"] == "CRASHED"
    server.worker = server.start(*OURS, "--pool", "cpu", cwd=ROOT)


def test_slurms_own_signal_lets_a_step_save(server, tmp_path):
    """A time limit and a preemption end a step so."""
    store = Store(tmp_path / "store")
    run, rank = start_run(server, store)
    server.run("scancel", f"--name=pesc-{run}")
    assert server.wait_for_state(run, "CRASHED", "FAILED", "CANCELLED", seconds=60)["state_type"] == "CRASHED"
    wait_for(lambda: not queue(server), 60, "the step to end")
    assert saved(store)
    assert not alive(rank)


def test_a_step_whose_launcher_is_killed_is_ended(server, tmp_path):
    store = Store(tmp_path / "store")
    run, rank = start_run(server, store)
    os.kill(launcher_of(run), signal.SIGKILL)
    wait_for(lambda: not queue(server), 60, "the step to end")
    wait_for(lambda: not alive(rank), 30, "the rank to end")
    assert server.wait_for_state(run, "CRASHED", "FAILED", seconds=60)["state_type"] == "CRASHED"


def launcher_of(run: str) -> int:
    """The process of `deployments.slurm_step` of a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"deployments.slurm_step" in words and f"PREFECT__FLOW_RUN_ID={run}".encode() in environment:
            return int(folder.name)
    raise AssertionError("no launcher")


def test_a_job_that_waits_is_taken_from_the_queue(server, slurm):
    environment = {**server.environment, "PREFECT__FLOW_RUN_ID": "waits"}
    held = subprocess.Popen([*STEP, "sleep", "600"], cwd=ROOT, env={**environment, "SLURM_GPUS_PER_NODE": "2"})
    first = wait_for(lambda: queue(server), 60, "the first job")
    assert first == ["pesc-waits"]
    waiting = subprocess.Popen(
        [*STEP, "sleep", "600"], cwd=ROOT, env={**environment, "PREFECT__FLOW_RUN_ID": "second", "SLURM_GPUS_PER_NODE": "2"}
    )
    wait_for(lambda: sorted(queue(server, "%j %T")) == ["PENDING", "RUNNING", "pesc-second", "pesc-waits"], 60, "the second to wait")
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(30) != 0
    assert queue(server) == ["pesc-waits"]
    held.send_signal(signal.SIGTERM)
    assert held.wait(30) != 0
    wait_for(lambda: not queue(server), 30, "the queue to be empty")


def test_a_step_ends_as_its_command_ends(server):
    done = subprocess.run(
        [*STEP, "bash", "-c", "echo said; exit 7"],
        cwd=ROOT,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 7
    assert done.stdout == "said\n"
    assert subprocess.run(STEP, cwd=ROOT, env=server.environment, capture_output=True, timeout=60, check=False).returncode == 2


def test_what_does_not_end_in_its_time_is_ended(server):
    environment = {**server.environment, "PREFECT__FLOW_RUN_ID": "deaf", "PESC_WORKER_GRACE": "2"}
    deaf = subprocess.Popen([*STEP, "bash", "-c", "trap '' TERM; while true; do sleep 1; done"], cwd=ROOT, env=environment)
    wait_for(lambda: queue(server, "%T") == ["RUNNING"], 60, "the job")
    deaf.send_signal(signal.SIGTERM)
    assert deaf.wait(40) != 0
    wait_for(lambda: not queue(server), 60, "the step to end")
