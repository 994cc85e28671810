"""What a run survives: its server, its worker, its schedule, and seven others like it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from pesc.store import Store
from pesc.store.maintenance import fsck
from pesc.store.workspace import is_locked
from tests.deployments.servers import PrefectServer, postgres, wait_for
from tests.flows.fleet import ENDED, Fleet, alive
from tests.flows.test_pipeline import ACTIONS

__all__ = ["postgres"]
pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def fleet(postgres, tmp_path_factory):
    """Everything deployed, a worker for each pool; heartbeats as often as Prefect allows."""
    folder = tmp_path_factory.mktemp("fleet")
    settings = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2"}
    with PrefectServer(folder / "prefect", database=postgres.database(), settings=settings) as server:
        server.environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = "30"
        fleet = Fleet(server, folder)
        fleet.worker("cpu")
        fleet.worker("gpu")
        yield fleet


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_server_that_is_killed_and_comes_back_costs_no_run(fleet, dispatch):
    store = Store(fleet.folder / f"server-{dispatch}")
    fleet.prepare("mix", store)
    fleet.ask_for("tokenize", "sleep", "20")
    run = fleet.submit("pipeline/cpu", recipe=fleet.recipe, store=str(store.root), dispatch=dispatch, until=["tokenize"])
    fleet.flow_pid("tokenize")
    fleet.server.kill()
    time.sleep(75)  # the stage ends, and its flow with it, while nobody is there; longer than a client waits by default
    fleet.server.serve()
    ended = fleet.end(run)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    assert Counter(fleet.built()) == {"download-base": 1, "tokenize": 1}
    assert fsck(store).is_clean
    fleet.clear()
    again = fleet.submit("pipeline/cpu", recipe=fleet.recipe, store=str(store.root), until=["train[qlora]"])  # the worker lives as well
    assert fleet.end(again)["state_type"] == "COMPLETED"
    assert fleet.built() == ["train-qlora"]
    fleet.clear()


def test_a_killed_worker_leaves_a_run_that_the_automation_marks_and_the_next_one_resumes(fleet):
    store = Store(fleet.folder / "zombie")
    fleet.prepare("mix", store)
    fleet.ask_for("tokenize", "endless")
    fleet.automate_zombies(90)
    worker = fleet.worker("empty")
    run = fleet.submit("tokenize/empty", recipe=fleet.recipe, store=str(store.root), build_missing=True)
    pids = fleet.pids("tokenize", store)
    for pid in (worker.pid, pids[0]):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)), 20, "the end of the orphans")
    assert fleet.server.get(f"flow_runs/{run}")["state_type"] == "RUNNING", "nobody could tell the server"
    assert not any(is_locked(path) for path in store.root.glob("work/*/*"))
    ended = fleet.end(run, 240)
    assert ended["state_type"] == "CRASHED"
    fleet.clear()
    again = fleet.submit("tokenize/cpu", recipe=fleet.recipe, store=str(store.root))
    assert fleet.end(again)["state_type"] == "COMPLETED"
    assert fleet.built() == ["tokenize"]
    fleet.clear()


def test_a_schedule_fires_and_its_runs_find_what_the_first_has_built(fleet):
    store = Store(fleet.folder / "scheduled")
    start = (datetime.now(UTC) + timedelta(seconds=5)).strftime("%Y%m%dT%H%M%SZ")
    schedule = {"rrule": f"DTSTART:{start}\nRRULE:FREQ=SECONDLY;INTERVAL=20;COUNT=3", "timezone": "UTC"}
    deployment = fleet.server.get("deployments/name/pipeline/cpu")["id"]
    parameters = {"recipe": fleet.recipe, "store": str(store.root), "until": ["mix"]}
    body = [{"schedule": schedule, "active": True, "slug": "seconds", "parameters": parameters}]
    (made,) = fleet.server.post(f"deployments/{deployment}/schedules", body)
    try:
        runs = wait_for(lambda: _ended(fleet, deployment, 3), 240, "three scheduled runs")
    finally:
        fleet.server.delete(f"deployments/{deployment}/schedules/{made['id']}")
    assert [run["state_type"] for run in runs] == ["COMPLETED"] * 3
    assert Counter(fleet.built()) == {"download-rows": 1, "dedup": 1, "mix": 1}
    in_order = sorted(runs, key=lambda run: run["start_time"])
    wanted = [{"Completed"}, {"Cached"}, {"Cached"}]
    wait_for(lambda: [set(fleet.tasks(run["id"]).values()) for run in in_order] == wanted, 30, f"the task runs to be {wanted}")
    fleet.clear()


def _ended(fleet, deployment, count):
    wanted = {"deployment_id": {"any_": [deployment]}, "tags": {"all_": ["auto-scheduled"]}, "state": {"type": {"any_": list(ENDED)}}}
    runs = fleet.server.post("flow_runs/filter", {"flow_runs": wanted})
    return runs if len(runs) >= count else None


def test_eight_runs_of_one_recipe_at_once_build_each_action_once(fleet):
    store = Store(fleet.folder / "eight")
    for address in ACTIONS:
        fleet.ask_for(address, "sleep", "0.5")
    runs = [fleet.submit("pipeline/cpu", recipe=fleet.recipe, store=str(store.root)) for _ in range(8)]
    ended = [fleet.end(run, 600) for run in runs]
    assert [(run["state_type"], run["state"]["message"]) for run in ended if run["state_type"] != "COMPLETED"] == []
    assert sorted(fleet.built()) == sorted(address.replace("[", "-").replace("/", "-").rstrip("]") for address in ACTIONS)
    assert fsck(store).is_clean
    fleet.clear()
