"""The demo on a fleet: PostgreSQL, everything as bootstrap makes it, and two workers whose disks share nothing but a bucket.

`PESC_DEMO_RECIPE=study/smollm2-6-layers pytest tests/flows/test_demo_fleet.py` does it with another recipe.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter

import pytest

from pesc.pipeline import build_graph, stage_named
from pesc.recipe import load_recipe
from pesc.store import Store
from pesc.store.maintenance import fsck
from tests.deployments.servers import PrefectServer, postgres, wait_for
from tests.flows.fleet import Fleet
from tests.store.conftest import bucket, bucket_server

__all__ = ["bucket", "bucket_server", "postgres"]
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(7200)]
RECIPE = os.environ.get("PESC_DEMO_RECIPE", "demo")
SECONDS = 6000


@pytest.fixture
def fleet(postgres, bucket, tmp_path):
    with PrefectServer(tmp_path / "prefect", database=postgres.database()) as server:
        yield Fleet.bootstrapped(
            server, tmp_path, {pool: {"PESC_STORE": str(tmp_path / pool), "PESC_REMOTE": bucket.url} for pool in ("cpu", "gpu")}
        )


def test_the_demo_runs_dispatched_on_separate_disks_then_a_benchmark_alone_and_then_nothing(fleet, bucket, tmp_path):
    actions = [node.address for node in build_graph(load_recipe(RECIPE)).nodes]
    began = time.monotonic()
    run = fleet.submit("pipeline/dispatched", recipe=RECIPE)
    ended = fleet.end(run, SECONDS)
    print(f"\n{len(actions)} actions in {time.monotonic() - began:.0f} s")
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    children = fleet.children(run)
    assert [child["name"].split()[0] for child in children] == actions
    assert {child["state_type"] for child in children} == {"COMPLETED"}
    pools = {child["name"].split()[0]: child["work_pool_name"] for child in children}
    assert pools == {address: "gpu" if stage_named(address.partition("[")[0]).wants_gpu else "cpu" for address in actions}
    wait_for(lambda: fleet.tasks(run) == dict.fromkeys(actions, "Completed"), 30, "the task runs' last states")

    stores = {pool: Store(tmp_path / pool, remote=bucket.url) for pool in ("cpu", "gpu")}
    assert all(fsck(store).is_clean for store in stores.values())
    built = {m.prefect_run: m for store in stores.values() for m in store.manifests()}
    assert {child["id"] for child in children} <= set(built), "each result says which run made it"
    twice = {name: count for name, count in bucket.moved("PUT").items() if count > 1}
    assert not twice, f"files that were sent more than once: {twice}"
    print(f"{len(bucket.moved('PUT'))} files of {bucket.moved_bytes('PUT') / 1e6:.0f} MB sent, each once")
    digests = {m.address: m.output.digest for m in built.values()}

    benchmark = next(address for address in actions if address.startswith("evaluate["))
    instance = benchmark.partition("[")[2].rstrip("]")
    alone = fleet.submit("evaluate/gpu", recipe=RECIPE, instance=instance, refresh=True)
    assert fleet.end(alone, SECONDS)["state_type"] == "COMPLETED"
    again = next(m for m in stores["gpu"].manifests("evaluate") if m.prefect_run == alone)
    assert (again.address, again.output.digest) == (benchmark, digests[benchmark])

    whole = fleet.submit("pipeline/dispatched", recipe=RECIPE)
    assert fleet.end(whole, SECONDS)["state_type"] == "COMPLETED"
    assert fleet.children(whole) == [], "no stage starts a worker"
    wait_for(lambda: Counter(fleet.tasks(whole).values()) == {"Cached": len(actions)}, 30, "the task runs' last states")
    (tmp_path / "digests.json").write_text(json.dumps(digests, indent=1))

    if plain := os.environ.get("PESC_PLAIN_STORE"):  # of `pesc run RECIPE --store DIR` on one disk
        server, words = fleet.server, ["-m", "pesc.cli", "run", RECIPE, "--store", plain]
        server.run(sys.executable, *words, seconds=SECONDS)
        assert {m.address: m.output.digest for m in Store(plain, remote=None).manifests() if m.address in digests} == digests
