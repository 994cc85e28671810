"""A machine that goes away under its run: the automation of bootstrap marks it Crashed, lets a living one alone, and the same run again begins."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pesc.store import Store
from tests.deployments.servers import ROOT, bootstrap_with_saving, prefect, wait_for
from tests.deployments.test_worker import OURS, alive, start_run, worker_process

__all__ = ["prefect"]
pytestmark = [pytest.mark.slow, pytest.mark.long]
HEARTBEAT_SECONDS = 30
PENDING_SECONDS = 60


@pytest.fixture(scope="module")
def server(prefect):
    """A bootstrapped server whose runs give a sign of life every 30 seconds, and the flow `saving`."""
    server = prefect
    server.environment["PESC_STORE"] = str(server.folder / "store")
    bootstrap_with_saving(server, {"heartbeat_seconds": HEARTBEAT_SECONDS, "pending_seconds": PENDING_SECONDS})
    return server


def taken(server, *later: str) -> str:
    """A run that a worker has taken, and what became of it."""
    run = server.post(
        f"deployments/{server.get('deployments/name/saving/cpu')['id']}/create_flow_run", {"parameters": {"recipe": "x", "store": "x"}}
    )
    for kind in ("PENDING", *later):
        server.post(f"flow_runs/{run['id']}/set_state", {"state": {"type": kind}, "force": True})
    return run["id"]


def test_a_run_that_was_taken_and_does_not_begin_is_crashed(server):
    gone, begun, cancelled = taken(server), taken(server, "RUNNING"), taken(server, "CANCELLED")
    run = server.wait_for_state(gone, "CRASHED", seconds=PENDING_SECONDS + 60)
    assert run["state"]["message"].startswith("A worker took this run, and then it gave no sign of life for 60 s")
    assert server.get(f"flow_runs/{begun}")["state_type"] == "RUNNING"
    assert server.get(f"flow_runs/{cancelled}")["state_type"] == "CANCELLED"
    server.post(f"flow_runs/{begun}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def children(pid: int) -> list[int]:
    """Child processes."""
    with open(f"/proc/{pid}/task/{pid}/children") as listing:
        return [int(word) for word in listing.read().split()]


def test_a_run_whose_machine_is_gone_is_crashed_and_one_that_lives_is_not(server, tmp_path):
    doomed, living = Store(tmp_path / "doomed"), Store(tmp_path / "living")
    first = server.start(*OURS, "--pool", "cpu", "--limit", "1", cwd=ROOT)
    gone, rank = start_run(server, doomed)
    server.start(*OURS, "--pool", "cpu", "--limit", "1", cwd=ROOT)
    healthy, other_rank = start_run(server, living)
    time.sleep(5)  # the first heartbeat is with the server
    worker = worker_process(first.pid)
    (flow,) = children(worker)
    for pid in (first.pid, worker, flow):
        os.kill(pid, signal.SIGSTOP)
    for pid in (flow, worker, first.pid):
        os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    assert server.get(f"flow_runs/{gone}")["state_type"] == "RUNNING"  # nobody is left who could say so
    run = server.wait_for_state(gone, "CRASHED", seconds=4 * HEARTBEAT_SECONDS + 60)
    assert time.monotonic() - begin > 2 * HEARTBEAT_SECONDS
    assert run["state"]["message"].startswith("No sign of life for 90 s: the worker or its machine is gone.")
    wait_for(lambda: not alive(rank), 30, "the rank to end")

    time.sleep(HEARTBEAT_SECONDS)
    assert server.get(f"flow_runs/{healthy}")["state_type"] == "RUNNING"
    assert alive(other_rank)
    (doomed.root / next(doomed.root.glob("work/download/*/rank.pid"))).unlink()
    server.prefect("flow-run", "cancel", healthy)
    again, new_rank = start_run(server, doomed)
    assert new_rank != rank
    assert server.get(f"flow_runs/{again}")["state_type"] == "RUNNING"
    server.prefect("flow-run", "cancel", again)
    server.wait_for_state(again, "CANCELLED")
