"""The pipeline through real Prefect on two workers that share only a remote."""

import pytest

from flows.maintenance import push
from flows.pipeline import pipeline
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from pesc.store import Store
from tests.flows import observe

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(recipe, root, **parameters):
    state = pipeline(recipe=recipe, store=str(root), return_state=True, **parameters)
    return observe.task_states(state.state_details.flow_run_id, 14), state.result()


def test_the_second_worker_s_tasks_are_cached_and_the_report_is_pulled(recipe_file, fakes, tmp_path, remote):
    states, first = run(recipe_file, tmp_path / "cpu")
    assert set(states.values()) == {"Completed"}
    fakes.CALLS.clear()
    states, second = run(recipe_file, tmp_path / "gpu")
    assert set(states.values()) == {"Cached"}
    assert fakes.CALLS == []
    assert {a: o.ref for a, o in second.items()} == {a: o.ref for a, o in first.items()}
    assert Store(tmp_path / "gpu", remote=None).find("report", first["report"].ref.fingerprint), "the UI's report was read from it"
    states, _ = run(recipe_file, tmp_path / "gpu", refresh=["evaluate[pesc]"])
    assert fakes.CALLS == ["evaluate[pesc/quiz]"]
    assert {a for a, s in states.items() if s == "Completed"} == {"evaluate[pesc/quiz]"}


def test_what_a_worker_owes_is_shared_although_prefect_has_a_record(recipe_file, fakes, tmp_path, remote, monkeypatch):
    monkeypatch.delenv("PESC_REMOTE")
    run(recipe_file, tmp_path / "cpu")
    fakes.CALLS.clear()
    monkeypatch.setenv("PESC_REMOTE", str(remote))
    run(recipe_file, tmp_path / "cpu")
    assert fakes.CALLS == []
    states, _ = run(recipe_file, tmp_path / "gpu")
    assert set(states.values()) == {"Cached"}
    assert fakes.CALLS == []


def test_the_push_flow_says_what_it_sent(recipe_file, fakes, store, remote, monkeypatch):
    monkeypatch.delenv("PESC_REMOTE")
    run_recipe(load_recipe(recipe_file), store)
    state = push(what=[recipe_file], remote=str(remote), store=str(store.root), dry_run=True, return_state=True)
    assert len(state.result().actions) == 14
    assert not list(remote.iterdir())
    state = push(remote=str(remote), store=str(store.root), return_state=True)
    assert len(state.result().actions) == 14
    assert "Sent 14 of 14 actions" in observe.artifacts(state.state_details.flow_run_id)["store-push"]
    assert push(remote=str(remote), store=str(store.root)).num_files == 0
