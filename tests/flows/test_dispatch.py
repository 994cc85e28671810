"""The dispatched pipeline: a real server on PostgreSQL, real workers; children, their failures, and what is not started."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pesc.store import Store
from pesc.store.maintenance import fsck
from tests.deployments.servers import PrefectServer, postgres, wait_for
from tests.flows.fleet import Fleet, alive
from tests.flows.test_pipeline import ACTIONS

__all__ = ["postgres"]
pytestmark = [pytest.mark.slow, pytest.mark.long]
ON_GPU = {"train", "merge", "evaluate", "routing", "heldout"}


@pytest.fixture(scope="module")
def fleet(postgres, tmp_path_factory):
    """Everything deployed; a worker for the pool `cpu`, one for `gpu`."""
    folder = tmp_path_factory.mktemp("fleet")
    with PrefectServer(folder / "prefect", database=postgres.database()) as server:
        fleet = Fleet(server, folder)
        fleet.worker("cpu")
        fleet.worker("gpu")
        yield fleet


@pytest.fixture
def prepared(fleet):
    """The fleet, and the parameters of a dispatched run whose store has everything."""
    fleet.prepare()
    return fleet, {"recipe": fleet.recipe, "dispatch": True}


def test_each_action_runs_on_the_worker_it_wants_then_one_benchmark_alone_and_then_nothing(fleet):
    run = fleet.submit("pipeline/cpu", recipe=fleet.recipe, dispatch=True, tags=["nightly"], overrides=["train.learning_rate=0.0003"])
    ended = fleet.end(run, 600)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    children = fleet.children(run)
    assert [child["name"].split()[0] for child in children] == ACTIONS
    assert all(child["state_type"] == "COMPLETED" for child in children)
    for child in children:
        address, recipe, fingerprint = child["name"].split()
        stage = address.partition("[")[0]
        assert child["work_pool_name"] == ("gpu" if stage in ON_GPU else "cpu")
        assert {"pesc", "stage", "nightly", "dispatched", "recipe:tiny"} == set(child["tags"])
        assert recipe == "tiny"
        (manifest,) = [m for m in fleet.store.manifests(stage) if m.address == address]
        assert manifest.fingerprint.startswith(fingerprint)
        assert manifest.prefect_run == child["id"]
        given = {name: value for name, value in child["parameters"].items() if value not in (None, False, [])}
        assert given.pop("recipe") == fleet.recipe
        assert given.pop("overrides") == ["train.learning_rate=0.0003"]
        assert given in ({}, {"instance": address.partition("[")[2].rstrip("]")}), (
            "nothing but names: no reference, digest or path of a result"
        )
    assert next(m for m in fleet.store.manifests("train")).key.config["learning_rate"] == 0.0003
    wait_for(lambda: fleet.tasks(run) == dict.fromkeys(ACTIONS, "Completed"), 30, "the task runs' last states")
    assert len(list(fleet.store.root.glob("runs/tiny/*.json"))) == 1, "the history has one run, not one for each child"
    assert len(fleet.versions("plan-tiny")) == 1

    overrides = ["train.learning_rate=0.0003"]
    alone = fleet.submit("evaluate/gpu", recipe=fleet.recipe, instance="qlora/quiz", refresh=True, overrides=overrides)
    assert fleet.end(alone)["state_type"] == "COMPLETED"
    assert fleet.built().count("evaluate-qlora-quiz") == 2
    assert len(fleet.built()) == len(ACTIONS) + 1

    again = fleet.submit("pipeline/cpu", recipe=fleet.recipe, dispatch=True, overrides=overrides)
    assert fleet.end(again)["state_type"] == "COMPLETED"
    assert fleet.children(again) == []
    wait_for(lambda: fleet.tasks(again) == dict.fromkeys(ACTIONS, "Cached"), 30, "the task runs' last states")
    assert len(fleet.built()) == len(ACTIONS) + 1
    assert fsck(fleet.store).is_clean


def test_a_child_s_sentence_is_its_parent_s_and_the_next_run_starts_there(prepared):
    fleet, parameters = prepared
    sentence = "DataError: row 3 of data.json has no answer: give it one."
    fleet.ask_for("train[qlora]", "fail", sentence)
    run = fleet.submit("pipeline/cpu", **parameters, overrides=["train.seed=11"], until=["train[qlora]"])
    ended = fleet.end(run)
    assert ended["state"]["message"] == f"Flow run encountered an exception: {sentence}"
    assert [child["state_type"] for child in fleet.children(run)] == ["FAILED"]
    assert fleet.tasks(run)["train[qlora]"] == "Failed"
    assert fleet.built() == ["train-qlora"], "an error of the data is not tried again"
    fleet.clear()
    again = fleet.submit("pipeline/cpu", **parameters, overrides=["train.seed=11"], until=["train[qlora]"])
    assert fleet.end(again)["state_type"] == "COMPLETED"
    assert fleet.built() == ["train-qlora"]


def test_benchmarks_go_out_together_and_one_that_fails_leaves_a_hole(prepared):
    fleet, parameters = prepared
    names = ("exam", "oral", "quiz")
    overrides = [
        "execution.parallel_benchmarks=3",
        *(f"evaluate.benchmarks.{name}={{task: arc_{name}, metric: acc_norm}}" for name in names),
    ]
    for name in names:
        fleet.ask_for(f"evaluate[pesc/{name}]", "sleep", "15")
    fleet.ask_for("evaluate[pesc/oral]", "fail", "EvaluationError: the benchmark has no items.")
    run = fleet.submit("pipeline/cpu", **parameters, overrides=overrides, start=["evaluate"])
    ended = fleet.end(run)
    assert ended["state_type"] == "FAILED"
    assert "HolesError" in ended["state"]["message"]
    assert "evaluate[pesc/oral]: the benchmark has no items." in ended["state"]["message"]
    children = {child["name"].split()[0]: child for child in fleet.children(run)}
    assert children.keys() == {"report", *(f"evaluate[{arm}/{name}]" for arm in ("pesc", "qlora") for name in names)}
    assert {address for address, child in children.items() if child["state_type"] != "COMPLETED"} == {"evaluate[pesc/oral]"}
    times = [(child["start_time"], child["end_time"]) for address, child in children.items() if address.startswith("evaluate[pesc")]
    assert max(start for start, _ in times) < min(end for _, end in times), "all three at the same time"


def test_a_deployment_that_is_not_there_is_a_sentence_before_anything_starts(prepared):
    fleet, parameters = prepared
    chosen = {"mix": "h100", "train": "elsewhere/gpu"}
    run = fleet.submit("pipeline/cpu", **parameters, overrides=["mix.seed=5"], deployments=chosen)
    message = fleet.end(run)["state"]["message"]
    assert "has no deployment mix/h100, elsewhere/gpu, which would build a part of tiny" in message
    assert fleet.children(run) == []


def test_a_pool_without_a_worker_is_told_and_the_child_that_waits_is_cancelled_outright(prepared):
    fleet, parameters = prepared
    run = fleet.submit("pipeline/cpu", **parameters, overrides=["mix.seed=6"], deployments={"mix": "nobody"}, until=["mix"])
    wanted = "no worker of the work pool 'empty' is alive. Start one: python -m deployments.worker --pool empty."
    wait_for(lambda: any(wanted in line for line in fleet.logs(run)), 90, "the complaint")
    fleet.cancel(run)
    assert fleet.end(run, 60)["state_type"] == "CANCELLED"
    (child,) = fleet.children(run)
    assert child["state_type"] == "CANCELLED"
    assert child["run_count"] == 0, "it never began"


def test_a_worker_that_is_taken_away_is_another_try(prepared):
    fleet, parameters = prepared
    fleet.ask_for("train[qlora]", "sleep", "60")
    run = fleet.submit("pipeline/cpu", **parameters, overrides=["train.seed=12"], until=["train[qlora]"])
    pid = fleet.flow_pid("train[qlora]")
    fleet.clear()
    os.kill(pid, signal.SIGTERM)
    ended = fleet.end(run)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    assert [child["state_type"] for child in fleet.children(run)] == ["CRASHED", "COMPLETED"]
    assert any("The worker of train[qlora] has gone" in line and "tried again" in line for line in fleet.logs(run))
    assert fleet.tasks(run)["train[qlora]"] == "Completed"


def test_cancelling_the_parent_ends_the_ranks_of_its_children(prepared):
    fleet, parameters = prepared
    store = Store(fleet.folder / "cancelled")
    fleet.prepare("mix", store)
    fleet.ask_for("tokenize", "endless")
    run = fleet.submit("pipeline/cpu", **parameters, store=str(store.root), until=["tokenize"])
    pids = fleet.pids("tokenize", store)
    began = time.monotonic()
    fleet.cancel(run)
    wait_for(lambda: not any(map(alive, pids)), 30, "the end of every process")
    took = time.monotonic() - began
    assert fleet.end(run, 60)["state_type"] == "CANCELLED"
    *_, child = fleet.children(run)
    assert child["name"].startswith("tokenize ")
    assert fleet.end(child["id"], 60)["state_type"] == "CANCELLED"
    print(f"\nranks gone {took:.1f} s after the parent was cancelled")
    assert took < 15
    fleet.clear()
    again = fleet.submit("pipeline/cpu", **parameters, store=str(store.root), until=["tokenize"])
    assert fleet.end(again)["state_type"] == "COMPLETED"
