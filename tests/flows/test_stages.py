"""One stage alone: its inputs are found through recipe and store."""

import pytest

from flows import stages
from pesc.errors import RecipeError
from pesc.pipeline import STAGE_NAMES, stage_named
from pesc.plan import Selection
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from tests.flows import observe

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(name, recipe, store, **parameters):
    state = getattr(stages, name)(recipe=recipe, store=str(store.root), return_state=True, **parameters)
    return state.state_details.flow_run_id, state


def test_every_stage_has_a_flow_of_its_name():
    assert [getattr(stages, name).name for name in STAGE_NAMES] == list(STAGE_NAMES)
    assert {name for name in STAGE_NAMES if stages.deployment_name(name).endswith("/gpu")} == {
        n for n in STAGE_NAMES if stage_named(n).wants_gpu
    }


def test_one_benchmark_of_one_arm_runs_again_alone(recipe_file, fakes, store):
    run_recipe(load_recipe(recipe_file), store)
    fakes.CALLS.clear()
    flow_run_id, state = run("evaluate", recipe_file, store, instance="qlora/quiz", refresh=True)
    assert fakes.CALLS == ["evaluate[qlora/quiz]"]
    states = observe.task_states(flow_run_id, 7)
    assert states.pop("evaluate[qlora/quiz]") == "Completed"
    assert set(states.values()) == {"Cached"}
    assert "upcycle[pesc]" not in states
    assert state.result()["evaluate[qlora/quiz]"].how == "built"


def test_a_run_is_named_by_stage_recipe_and_fingerprint(recipe_file, fakes, store):
    from flows.pipeline import pipeline

    run_recipe(load_recipe(recipe_file), store, Selection(until=("mix",)))
    names, refs = [], []
    for settings in (None, {"learning_rate": 1e-05}):
        flow_run_id, state = run("train", recipe_file, store, instance="qlora", settings=settings, build_missing=True)
        again, _ = run("train", recipe_file, store, instance="qlora", settings=settings)
        names.append([observe.run_name(flow_run_id), observe.run_name(again)])
        refs.append(state.result()["train[qlora]"].ref.fingerprint[:8])
    assert names[0] == ["train[qlora] tiny", f"train[qlora] tiny {refs[0]}"], "before tokenize, nobody knows the fingerprint"
    assert names[1] == [f"train[qlora] tiny {refs[1]}"] * 2
    assert refs[0] != refs[1]
    changes = ({}, {}, {"settings": {"mix": {"seed": 3}}})
    states = [pipeline(recipe=recipe_file, store=str(store.root), until=["mix"], return_state=True, **more) for more in changes]
    first, second, third = (observe.run_name(state.state_details.flow_run_id) for state in states)
    assert first == second != third
    assert all(len(name.removeprefix("tiny ")) == 8 for name in (first, third))
    broken = stages.mix(recipe=f"{recipe_file}.none.yaml", store=str(store.root), return_state=True)
    assert observe.run_name(broken.state_details.flow_run_id) == "mix tiny.yaml.none"


def test_typed_settings_and_execution_reach_the_stage(recipe_file, fakes, store):
    run_recipe(load_recipe(recipe_file), store, Selection(until=("train[qlora]",)))
    settings = {"learning_rate": 1e-05, "lora": {"rank": 8}}
    _, state = run("train", recipe_file, store, instance="qlora", settings=settings, execution={"num_processes": 4})
    manifest = store.manifest("train", state.result()["train[qlora]"].ref.fingerprint)
    assert manifest.key.config["learning_rate"] == 1e-05
    assert manifest.key.config["lora"] == {**load_recipe(recipe_file).train.lora.model_dump(mode="json"), "rank": 8}
    assert manifest.execution["num_processes"] == 4


def test_a_source_s_settings_are_a_map(recipe_file, fakes, store):
    _, state = run("download", recipe_file, store, instance="rows", settings={"rows": {"license": "MIT"}})
    assert store.manifest("download", state.result()["download[rows]"].ref.fingerprint).key.config["license"] == "MIT"


def test_a_missing_upstream_fails_at_once_and_says_what_to_run(recipe_file, fakes, store):
    run_recipe(load_recipe(recipe_file), store, Selection(until=("dedup",)))
    fakes.CALLS.clear()
    _, state = run("train", recipe_file, store, instance="pesc")
    assert "train[pesc] of recipe 'tiny' needs download[base], mix, tokenize, upcycle[pesc], which the store" in state.message
    assert "Run the deployments download/cpu, mix/cpu, tokenize/cpu, upcycle/cpu first, or give build_missing=true." in state.message
    with pytest.raises(RecipeError):
        state.result()
    assert fakes.CALLS == []


def test_build_missing_builds_what_is_needed_and_no_more(recipe_file, fakes, store):
    run_recipe(load_recipe(recipe_file), store, Selection(until=("dedup",)))
    fakes.CALLS.clear()
    run("train", recipe_file, store, instance="qlora", build_missing=True)
    assert fakes.CALLS == ["download[base]", "mix", "tokenize", "train[qlora]"]


def test_a_refresh_is_done_once_when_the_run_is_tried_again(recipe_file, fakes, store, monkeypatch):
    """Prefect's Retry starts the flow function again under the same id."""
    from flows import chain

    run_recipe(load_recipe(recipe_file), store, Selection(until=("mix",)))
    selection = Selection(until=("mix",), refresh=("dedup",))
    monkeypatch.setattr(chain.flow_run, "get_id", lambda: "one-run")
    monkeypatch.setattr("tasks.execution.flow_run.get_id", lambda: "one-run")
    from prefect import flow

    @flow
    def again():
        return chain.run_chain(load_recipe(recipe_file), store, selection)

    fakes.CALLS.clear()
    again()
    assert fakes.CALLS == ["dedup"]
    assert again()["dedup"].how == "hit"
    assert fakes.CALLS == ["dedup"]


def test_a_placeholder_that_deploying_left_is_no_store(recipe_file, fakes, monkeypatch, tmp_path):
    monkeypatch.setenv("PESC_STORE", "{{ $PESC_STORE }}")
    monkeypatch.chdir(tmp_path)
    state = stages.download(recipe=recipe_file, return_state=True)
    assert "PESC_STORE was not set when this deployment was made" in state.message
    assert not list(tmp_path.glob("*{{*"))


def test_a_relative_store_becomes_absolute(monkeypatch, tmp_path):
    from flows.chain import open_store

    monkeypatch.chdir(tmp_path)
    assert open_store("here").root == tmp_path / "here"
    monkeypatch.setenv("PESC_STORE", "there")
    assert open_store(None).root == tmp_path / "there"
