"""Real workers that are told to stop while a run goes on: ours lets it save and says so, Prefect's own does not."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from pesc.store import Store
from pesc.store.workspace import is_locked
from tests.deployments.servers import PREFECT, ROOT, PrefectServer, prefect, wait_for
from tests.fake_stages import tiny_recipe_dict

__all__ = ["prefect"]
pytestmark = pytest.mark.slow
OURS = [sys.executable, "-m", "deployments.worker"]


@pytest.fixture(scope="module")
def server(prefect):
    """A server with the flow `saving` deployed, and a recipe."""
    server = prefect
    server.recipe = server.folder / "tiny.yaml"
    server.recipe.write_text(yaml.safe_dump(tiny_recipe_dict(server.folder / "sources")))
    server.prefect("work-pool", "create", "cpu", "--type", "process")
    steps = server.folder / "prefect.yaml"
    steps.write_text(yaml.safe_dump({"pull": [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]}))
    server.prefect(
        "--no-prompt", "deploy", "tests/deployments/programs.py:saving", "--name", "cpu", "--pool", "cpu", "--prefect-file", str(steps)
    )
    return server


def start_run(server: PrefectServer, store: Store) -> tuple[str, int]:
    """A run that has come to its stage: its id, and the process that saves."""
    deployment = server.get("deployments/name/saving/cpu")["id"]
    run = server.post(f"deployments/{deployment}/create_flow_run", {"parameters": {"recipe": str(server.recipe), "store": str(store.root)}})

    def rank() -> int | None:
        found = list(store.root.glob("work/download/*/rank.pid"))
        return int(found[0].read_text() or 0) if found else None

    return run["id"], wait_for(rank, 120, "the stage")


def saved(store: Store) -> bool:
    return any(store.root.glob("work/download/*/saved"))


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def worker_process(launcher: int) -> int:
    """The process of `prefect worker start` below ours."""
    (child,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(child)


def test_a_worker_that_is_told_to_stop_lets_its_run_save_and_say_so(server, tmp_path):
    store = Store(tmp_path / "store")
    launcher = server.start(*OURS, "--pool", "cpu", "--limit", "1", cwd=ROOT)
    run, rank = start_run(server, store)
    worker = worker_process(launcher.pid)
    waiting = server.post(
        f"deployments/{server.get('deployments/name/saving/cpu')['id']}/create_flow_run", {"parameters": {"recipe": "x", "store": "x"}}
    )
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(40) == 0
    assert saved(store)
    assert not alive(rank)
    assert not alive(worker)
    assert not any(is_locked(path) for path in store.root.glob("work/*/*"))
    state = server.wait_for_state(run, "CRASHED", "FAILED", "CANCELLED", seconds=10)["state"]
    assert state["type"] == "CRASHED"
    assert server.get(f"flow_runs/{waiting['id']}")["state_type"] == "SCHEDULED"  # it was not begun meanwhile
    server._ask("DELETE", f"flow_runs/{waiting['id']}", None)


def test_twice_stops_at_once(server, tmp_path):
    store = Store(tmp_path / "store")
    launcher = server.start(*OURS, "--pool", "cpu", "--limit", "1", cwd=ROOT)
    _, rank = start_run(server, store)
    worker = worker_process(launcher.pid)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1)
    begin = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    launcher.wait(20)
    assert time.monotonic() - begin < 3
    assert not alive(worker)
    wait_for(lambda: not alive(rank), 30, "the rank to end")  # by its death signal; it may save on its own


def test_without_runs_it_stops_at_once(server):
    launcher = server.start(*OURS, "--pool", "cpu", "--name", "idle", cwd=ROOT)
    wait_for(lambda: any(worker["name"] == "idle" for worker in server.post("work_pools/cpu/workers/filter", {})), 60, "the worker")
    begin = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == 0
    assert time.monotonic() - begin < 10


def test_it_ends_as_the_worker_ends(server):
    assert server.start(*OURS, "--pool", "", cwd=ROOT).wait(60) != 0
    launcher = server.start(*OURS, "--pool", "cpu", cwd=ROOT)
    worker = wait_for(
        lambda: worker_process(launcher.pid) if Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text() else 0, 30
    )
    os.kill(worker, signal.SIGKILL)
    assert launcher.wait(20) == 128 + signal.SIGKILL


def test_prefects_own_worker_kills_its_run_which_stays_running(server, tmp_path):
    """The reason for ours; when Prefect mends it, deployments/worker.py can go."""
    store = Store(tmp_path / "store")
    worker = server.start(*PREFECT, "worker", "start", "--pool", "cpu", cwd=ROOT)
    run, _ = start_run(server, store)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert server.get(f"flow_runs/{run}")["state_type"] == "RUNNING"
