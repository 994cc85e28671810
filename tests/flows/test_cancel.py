"""A real training, cancelled from the API: every rank is gone, the run is Cancelled, and the next one goes on from the checkpoint."""

from __future__ import annotations

import sys
import time

import pytest

from pesc.store.workspace import is_locked
from tests.deployments.servers import PrefectServer, wait_for
from tests.flows.fleet import Fleet, alive
from tests.flows.real_recipe import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
STEPS = 60


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """The real flows deployed, and a store with everything before the training."""
    folder = tmp_path_factory.mktemp("fleet")
    with PrefectServer(folder / "prefect") as server:
        fleet = Fleet(server, folder, entrypoints="flows")
        fleet.real = str(write_recipe(folder / "real", steps=STEPS))
        words = ["-m", "pesc.cli", "run", fleet.real, "--until", "tokenize", "--until", "upcycle", "--store", str(fleet.store.root)]
        server.run(sys.executable, *words, seconds=600)
        fleet.worker("cpu")
        fleet.worker("gpu")
        yield fleet


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_training_is_cancelled_within_seconds_and_resumes(fleet, dispatch):
    overrides = [f"train.seed={1 + dispatch}"]
    parameters = {"recipe": fleet.real, "overrides": overrides, "dispatch": dispatch, "until": ["train[pesc]"]}
    run = fleet.submit("pipeline/cpu", **parameters)
    wait_for(lambda: list(fleet.store.root.glob("work/train/*/checkpoints/*/COMPLETE")), 240, "a checkpoint")
    ranks = [int(path.name) for path in fleet.store.root.glob("work/train/*/pids/[0-9]*")]
    assert ranks
    assert all(map(alive, ranks))
    began = time.monotonic()
    fleet.cancel(run)
    wait_for(lambda: not any(map(alive, ranks)), 60, "the end of every rank")
    took = time.monotonic() - began
    assert fleet.end(run, 60)["state_type"] == "CANCELLED"
    for child in fleet.children(run):
        assert fleet.end(child["id"], 60)["state_type"] == "CANCELLED"
    print(f"\n{len(ranks)} ranks gone {took:.1f} s after the {'parent' if dispatch else 'run'} was cancelled")
    assert took < 15
    assert not any(is_locked(path) for path in fleet.store.root.glob("work/*/*"))
    again = fleet.submit("pipeline/cpu", **parameters)
    ended = fleet.end(again, 600)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    logs = [*fleet.logs(again), *(line for child in fleet.children(again) for line in fleet.logs(child["id"]))]
    assert any("train[pesc] continues from the checkpoint at step" in line for line in logs)
