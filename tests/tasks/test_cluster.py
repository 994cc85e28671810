"""A stage's shards on a Dask or Ray cluster, through real Prefect: the same results, the same errors, the same objects."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows.pipeline import pipeline
from pesc import pipeline as table
from pesc.errors import DataError, RecipeError, StageFailedError
from pesc.launch.supervise import child_environment
from pesc.plan import Selection
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from pesc.stage import Execution
from pesc.store import Store
from tasks import cluster
from tasks.cluster import cut, open_shards
from tests.data.builders import write_jsonl
from tests.fake_stages import tiny_recipe_dict
from tests.flows import observe
from tests.launch import shards
from tests.launch.test_supervise import alive, wait_for

RUNNERS = [
    pytest.param("dask", marks=pytest.mark.skipif(not importlib.util.find_spec("prefect_dask"), reason="prefect-dask is not installed")),
    pytest.param(
        "ray",
        marks=[
            pytest.mark.skipif(not importlib.util.find_spec("prefect_ray"), reason="prefect-ray is not installed"),
            pytest.mark.slow,
        ],
    ),
]
needs_dask = pytest.mark.skipif(not importlib.util.find_spec("prefect_dask"), reason="prefect-dask is not installed")


@flow(persist_result=False)
def mapping(execution: Execution, calls: list):
    """Results of several `map_shards` of one stage; an error ends it."""
    with open_shards(execution, "dedup") as map_shards:
        return [list(map_shards(function, items)) for function, items in calls]


def run_mapping(execution, *calls):
    state = mapping(execution, list(calls), return_state=True)
    return state.state_details.flow_run_id, state


@given(st.integers(0, 5000), st.integers(1, 300))
def test_chunks_cover_the_shards_in_order_and_are_even(count, chunks):
    cuts = cut(count, chunks)
    assert [index for chunk in cuts for index in chunk] == list(range(count))
    assert len(cuts) == min(count, chunks)
    assert max(map(len, cuts), default=0) - min(map(len, cuts), default=0) <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_cluster_of_two_gives_the_results_of_one_process_in_their_order(runner, monkeypatch):
    calls = (shards.square, [1, 2, 3]), (shards.slow_first, list(range(20))), (shards.square, [])
    expected = [[function(item) for item in items] for function, items in calls]
    _, local = run_mapping(Execution(num_workers=2), *calls)
    assert local.result() == expected
    monkeypatch.setattr(cluster, "MAX_TASK_RUNS", 5)
    run_id, state = run_mapping(Execution(task_runner=runner, num_workers=2), *calls)
    assert state.result() == expected
    assert task_runs(run_id, 8) == {
        f"dedup {name}": ("Completed", "")
        for name in ("shard 1/3", "shard 2/3", "shard 3/3", *(f"shards {n}-{n + 3}/20" for n in (1, 5, 9, 13, 17)))
    }


def task_runs(flow_run_id, expected: int) -> dict[str, tuple[str, str]]:
    """State and message of the task runs by name."""
    observe.task_states(flow_run_id, expected)
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run_id]}))
    return {run.name: (run.state.name, run.state.message or "") for run in runs}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_bad_shard_is_its_own_error_and_a_failed_task_run(runner):
    run_id, state = run_mapping(Execution(task_runner=runner, num_workers=2), (partial(shards.fail, at=(4, 5)), list(range(6))))
    with pytest.raises(DataError) as caught:
        state.result()
    assert str(caught.value) == "rows.jsonl, row 4: no answer; give it one."
    failed = {name: message for name, (state, message) in task_runs(run_id, 6).items() if state == "Failed"}
    assert failed == {f"dedup shard {n + 1}/6": f"rows.jsonl, row {n}: no answer; give it one." for n in (4, 5)}


@needs_dask
@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_worker_that_is_killed_again_and_again_is_a_sentence():
    _, state = run_mapping(Execution(task_runner="dask", num_workers=2), (shards.killed, list(range(6))))
    with pytest.raises(StageFailedError, match=r"Shard 4/6 of dedup was lost with the worker that did it.*use fewer workers"):
        state.result()


# --- whole stages --------------------------------------------------------------------------------------------------------------


def recipe_file(tmp_path, name: str, **changes) -> str:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**tiny_recipe_dict(tmp_path / "sources"), **changes, "name": name}))
    return str(path)


def through_prefect(recipe: str, store: Store, until: str, **execution):
    overrides = [f"execution.{name}={value}" for name, value in execution.items()]
    return pipeline(recipe=recipe, store=str(store.root), until=[until], overrides=overrides)[until].ref


@pytest.fixture
def two_in_flight(monkeypatch):
    """Few task runs, to keep the tests short."""
    monkeypatch.setattr(cluster, "MAX_TASK_RUNS", 3)


@needs_dask
@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "fakes", "two_in_flight")
@pytest.mark.parametrize("isolated", [False, True])
def test_a_stage_makes_the_same_object_on_workers_and_on_a_cluster(tmp_path, monkeypatch, isolated):
    stage = replace(table._BY_NAME["dedup"], builder="tests.launch.shards:build_sizes", isolated=isolated, sources=())
    monkeypatch.setitem(table._BY_NAME, "dedup", stage)
    recipe, refs = recipe_file(tmp_path, "toy"), {}
    for workers in (1, 2):
        store = Store(tmp_path / f"store-{workers}")
        loaded = load_recipe(recipe, [f"execution.num_workers={workers}"])
        refs[workers] = run_recipe(loaded, store, Selection(until=("dedup",)))["dedup"].ref
    refs["dask"] = through_prefect(recipe, Store(tmp_path / "store-dask"), "dedup", task_runner="dask", num_workers=2)
    assert len(set(refs.values())) == 1


@needs_dask
@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "fakes", "two_in_flight")
@pytest.mark.parametrize("isolated", [False, True])
def test_a_bad_row_fails_the_flow_with_the_same_sentence(tmp_path, monkeypatch, isolated):
    stage = replace(table._BY_NAME["dedup"], builder="tests.launch.shards:build_failing", isolated=isolated, sources=())
    monkeypatch.setitem(table._BY_NAME, "dedup", stage)
    recipe = recipe_file(tmp_path, "toy")
    with pytest.raises(DataError, match=r"^rows.jsonl, row 5: no answer; give it one.$"):
        through_prefect(recipe, Store(tmp_path / "store"), "dedup", task_runner="dask", num_workers=2)


def rows(seed: int, count: int) -> list[dict[str, str]]:
    """Instructions with an exact and a near duplicate and an answer that refuses."""
    draw = random.Random(seed)
    words = [f"word{number}" for number in range(400)]
    made = [{"instruction": " ".join(draw.choices(words, k=30)), "output": " ".join(draw.choices(words, k=40))} for _ in range(count)]
    near = {"instruction": made[1]["instruction"], "output": f"{made[1]['output']} more"}
    return [*made, made[0], near, {"instruction": "Who are you?", "output": "As an AI language model, I cannot say."}]


QUESTION = "a tall ship left the old harbour at dawn with seven sailors and a parrot that spoke four languages"


@pytest.fixture
def small_data(tmp_path):
    """Two data sets with rows in common, and a benchmark whose question stands in one of them."""
    folder = tmp_path / "sources" / "rows"
    write_jsonl(folder / "a.jsonl", rows(1, 60))
    write_jsonl(folder / "b.jsonl", [*rows(2, 40), *rows(1, 5), {"instruction": QUESTION, "output": "Four."}])
    write_jsonl(folder / "bench" / "test.jsonl", [{"q": QUESTION}])
    return folder


ONE_SET = {"datasets": {"rows": {"source": "rows", "files": ["[ab].jsonl"], "domain": "general"}}, "max_duplicate_share": 0.9}
TWO_SETS = {
    "datasets": {name: {"source": "rows", "files": [f"{name}.jsonl"], "domain": "general"} for name in "ab"},
    "benchmarks": {"ships": {"source": "rows", "files": ["bench/*.jsonl"], "fields": ["q"]}},
}


@needs_dask
@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "two_in_flight")
@pytest.mark.parametrize("dedup", [ONE_SET, TWO_SETS], ids=["one data set", "two and a benchmark"])
def test_dedup_through_dask_makes_the_object_of_pesc_run(tmp_path, small_data, dedup):
    recipe = recipe_file(tmp_path, "small", dedup=dedup)
    plain = run_recipe(load_recipe(recipe, ["execution.num_workers=1"]), Store(tmp_path / "plain"), Selection(until=("dedup",)))
    clustered = through_prefect(recipe, Store(tmp_path / "dask"), "dedup", task_runner="dask", num_workers=2)
    assert clustered.digest == plain["dedup"].ref.digest
    sizes = [path.stat().st_size for path in Store(tmp_path / "dask").open(clustered).rglob("*") if path.is_file()]
    assert sum(sizes) > 5000  # there was something to compare


# --- what is said when there is no cluster --------------------------------------------------------------------------------------


def test_a_task_runner_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"prefect_dask is not installed: pip install -e '\.\[dask\]' in this project, or set"):
        open_shards(Execution(task_runner="dask"), "dedup").__enter__()


@needs_dask
@pytest.mark.usefixtures("prefect_server")
def test_a_cluster_that_does_not_answer_is_told(monkeypatch):
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        _, state = run_mapping(Execution(task_runner="dask", cluster="tcp://127.0.0.1:9"), (shards.square, [1, 2]))
    with pytest.raises(RecipeError, match=r"^No Dask cluster answers at execution.cluster tcp://127.0.0.1:9 "):
        state.result()


@needs_dask
@pytest.mark.parametrize(
    ("address", "url", "refused"),
    [
        ("tcp://node7:8786", "http://127.0.0.1:4200/api", True),
        ("node7:8786", None, True),
        ("tcp://node7:8786", "http://prefect.lan:4200/api", False),
        ("tcp://127.0.0.1:8786", "http://127.0.0.1:4200/api", False),
        (None, None, False),
    ],
)
def test_workers_elsewhere_need_a_server_that_they_can_reach(address, url, refused):
    with temporary_settings({PREFECT_API_URL: url}):
        opened = open_shards(Execution(task_runner="dask", cluster=address), "dedup")
        if refused:
            with pytest.raises(RecipeError, match="Set PREFECT_API_URL to a server that they can reach"):
                opened.__enter__()
        else:
            with opened:  # nothing is started before there is a shard
                pass


# --- nothing stays behind -------------------------------------------------------------------------------------------------------


@needs_dask
@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGINT, signal.SIGTERM))]
)
def test_the_workers_of_a_cluster_here_end_with_the_flow(tmp_path, number):
    environment = {**child_environment(), **get_current_settings().to_environment_variables(exclude_unset=True)}
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.tasks.programs", str(tmp_path)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len([path for path in tmp_path.glob("*.pid") if path.read_text()]) == 2, 120, "the shards")
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert all(map(alive, pids))
    program.kill() if number == signal.SIGKILL else os.killpg(program.pid, number)
    program.wait(30)
    wait_for(lambda: not any(map(alive, pids)), 10, "the end of the workers")
