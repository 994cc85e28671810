"""The pipeline through real Prefect: hits, misses, refreshes, failures, and what the UI shows."""

import shutil

import pytest

from flows.pipeline import pipeline
from pesc.errors import DataError, HolesError, RecipeError
from pesc.pipeline import build_graph
from pesc.plan import Selection
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from pesc.store.maintenance import fsck
from tests.flows import observe

pytestmark = pytest.mark.usefixtures("prefect_server")
ACTIONS = [
    "download[base]", "download[rows]", "dedup", "mix", "tokenize", "upcycle[pesc]", "train[pesc]", "merge[pesc]",
    "evaluate[pesc/quiz]", "routing[pesc]", "train[qlora]", "merge[qlora]", "evaluate[qlora/quiz]", "report",
]  # fmt: skip


def run(recipe, store, **parameters):
    state = pipeline(recipe=recipe, store=str(store.root), return_state=True, **parameters)
    return state.state_details.flow_run_id, state


def test_a_second_run_is_cached_throughout_and_a_refresh_builds_one_stage(recipe_file, fakes, store):
    first_id, first = run(recipe_file, store)
    assert list(first.result()) == ACTIONS
    assert {outcome.how for outcome in first.result().values()} == {"built"}
    assert set(observe.task_states(first_id, 14).values()) == {"Completed"}
    assert fsck(store).is_clean
    fakes.CALLS.clear()
    second_id, second = run(recipe_file, store)
    assert observe.task_states(second_id, 14) == dict.fromkeys(ACTIONS, "Cached")
    assert {address: outcome.ref for address, outcome in second.result().items()} == {a: o.ref for a, o in first.result().items()}
    third_id, third = run(recipe_file, store, refresh=["evaluate[pesc]"])
    assert fakes.CALLS == ["evaluate[pesc/quiz]"]
    assert {a for a, s in observe.task_states(third_id, 14).items() if s == "Completed"} == {"evaluate[pesc/quiz]"}
    assert {a for a, o in third.result().items() if o.how == "built"} == {"evaluate[pesc/quiz]"}
    fourth_id, _ = run(recipe_file, store)
    assert set(observe.task_states(fourth_id, 14).values()) == {"Cached"}


def test_hits_are_shared_with_runs_without_a_server_in_both_directions(recipe_file, fakes, store):
    run_recipe(load_recipe(recipe_file), store, Selection(until=("mix",)))
    fakes.CALLS.clear()
    flow_run_id, _ = run(recipe_file, store, until=["tokenize"])
    assert fakes.CALLS == ["download[base]", "tokenize"]
    assert observe.task_states(flow_run_id, 5) == {
        "download[base]": "Completed", "download[rows]": "Cached", "dedup": "Cached", "mix": "Cached", "tokenize": "Completed"
    }  # fmt: skip
    fakes.CALLS.clear()
    outcomes = run_recipe(load_recipe(recipe_file), store, Selection(until=("tokenize",)))
    assert fakes.CALLS == []
    assert {outcome.how for outcome in outcomes.values()} == {"hit"}


@pytest.mark.parametrize("lost", ["object", "manifest", "action"])
def test_prefect_never_believes_in_what_the_store_has_lost(recipe_file, fakes, store, lost):
    _, state = run(recipe_file, store, until=["mix"])
    ref = state.result()["mix"].ref
    action = store.action_path("mix", ref.fingerprint)
    assert (action / "prefect.json").is_file()
    assert (action / "prefect.json").stat().st_size < 1024
    shutil.rmtree(store.object_path(ref.digest)) if lost == "object" else None
    (action / "manifest.json").unlink() if lost == "manifest" else None
    shutil.rmtree(action) if lost == "action" else None
    fakes.CALLS.clear()
    flow_run_id, state = run(recipe_file, store, until=["mix"])
    assert fakes.CALLS == ["mix"]
    assert observe.task_states(flow_run_id, 3) == {"download[rows]": "Cached", "dedup": "Cached", "mix": "Completed"}
    assert state.result()["mix"].ref == ref
    assert store.open(ref).is_dir()


def test_a_record_of_other_bytes_is_not_believed(recipe_file, fakes, store):
    _, state = run(recipe_file, store, until=["dedup"])
    refs = {address: outcome.ref for address, outcome in state.result().items()}
    records = {a: store.action_path(ref.stage, ref.fingerprint) / "prefect.json" for a, ref in refs.items()}
    shutil.copyfile(records["download[rows]"], records["dedup"])
    _, state = run(recipe_file, store, until=["dedup"])
    assert state.result()["dedup"].ref == refs["dedup"]
    assert refs["dedup"].digest in records["dedup"].read_text()


def test_a_changed_setting_misses_and_equal_bytes_keep_what_is_below(recipe_file, fakes, store):
    run(recipe_file, store)
    fakes.CALLS.clear()
    flow_run_id, _ = run(recipe_file, store, settings={"dedup": {"near_duplicate_threshold": 0.7}})
    assert fakes.CALLS == ["dedup"]
    states = observe.task_states(flow_run_id, 14)
    assert [address for address, state in states.items() if state != "Cached"] == ["dedup"]
    fakes.CALLS.clear()
    run(recipe_file, store, overrides=["train.max_grad_norm=0.31"], until=["train[qlora]"])
    assert fakes.CALLS == ["train[qlora]"]


def test_a_failure_shows_its_sentence_and_the_next_run_goes_on_from_there(recipe_file, fakes, store):
    fakes.FAIL_AT.add("train[pesc]")
    flow_run_id, state = run(recipe_file, store)
    assert state.is_failed()
    sentence = "train[pesc] failed as asked: row 3 of data.json has no answer. Give it one."
    assert sentence in state.message
    assert sentence in observe.task_messages(flow_run_id, 7)["train[pesc]"]
    with pytest.raises(DataError, match="row 3"):
        state.result()
    assert any("run it again to go on" in line for line in observe.logs(flow_run_id, "to go on"))
    assert fsck(store).is_clean
    fakes.FAIL_AT.clear()
    fakes.CALLS.clear()
    _, state = run(recipe_file, store)
    assert fakes.CALLS[0] == "train[pesc]"
    assert state.is_completed()


def test_a_benchmark_that_dies_is_a_failed_task_and_a_hole_and_the_next_run_fills_it(recipe_file, fakes, store):
    fakes.FAIL_AT.add("evaluate[pesc/quiz]")
    flow_run_id, state = run(recipe_file, store)
    assert state.is_failed()
    states = observe.task_states(flow_run_id, 13)
    assert {address: name for address, name in states.items() if name != "Completed"} == {"evaluate[pesc/quiz]": "Failed"}
    with pytest.raises(HolesError, match=r"row 3 of data\.json has no answer"):
        state.result()
    assert {"benchmarks-tiny", "run-tiny"} <= set(observe.artifacts(flow_run_id))
    fakes.FAIL_AT.clear()
    fakes.CALLS.clear()
    flow_run_id, state = run(recipe_file, store)
    assert state.is_completed()
    assert fakes.CALLS == ["evaluate[pesc/quiz]"]
    assert {a for a, name in observe.task_states(flow_run_id, 13).items() if name == "Completed"} == {"evaluate[pesc/quiz]", "report"}


def test_the_ui_gets_the_plan_the_results_and_the_library_s_log(recipe_file, fakes, store):
    flow_run_id, _ = run(recipe_file, store)
    shown = observe.artifacts(flow_run_id)
    assert "| **RUN** | `dedup` | never built; waits for download[rows] |" in shown["plan-tiny"]
    assert "```mermaid" in shown["plan-tiny"]
    assert "61.0" in shown["benchmarks-tiny"]
    assert "report.html" in shown["page-tiny"]
    assert "evaluate[qlora/quiz]" in shown["run-tiny"]
    assert "learning_rate" in shown["train-pesc-tiny"]
    assert "rows" in shown["train-pesc-tiny"]
    assert any("pesc" in line and "built in" in line for line in observe.logs(flow_run_id, "report tiny"))


def test_the_graph_of_the_run_is_the_recipe_s(recipe_file, fakes, store):
    first, _ = run(recipe_file, store)
    second, _ = run(recipe_file, store, refresh=["merge[qlora]"])
    wanted = {node.address: set(node.inputs.values()) for node in build_graph(load_recipe(recipe_file)).nodes}
    assert observe.parents(first, 14) == wanted
    assert observe.parents(second, 14) == wanted, "cached ones as well"


def test_the_manifest_names_the_flow_run(recipe_file, fakes, store):
    flow_run_id, state = run(recipe_file, store, until=["dedup"])
    ref = state.result()["dedup"].ref
    assert store.manifest("dedup", ref.fingerprint).prefect_run == str(flow_run_id)
    assert [path.name for path in store.root.glob("runs/tiny/*.json")]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"only": ["train[pesc]"]}, "is needed but is not in the store"),
        ({"only": ["trane"]}, "Did you mean 'train'"),
        ({"overrides": ["train.learning_rate=-1"]}, "train.learning_rate"),
    ],
)
def test_a_wrong_request_fails_before_anything_is_built(recipe_file, fakes, store, parameters, message):
    _, state = run(recipe_file, store, **parameters)
    assert message in state.message
    with pytest.raises(RecipeError):
        state.result()
    assert fakes.CALLS == []


def test_the_data_card_is_published_once_the_data_is_there_and_only_when_it_is_new(recipe_file, fakes, store, monkeypatch):
    cards = []
    monkeypatch.setattr("flows.chain.publish_card", lambda _store, recipe: cards.append((recipe.name, fakes.CALLS[-1])))
    run(recipe_file, store, until=["mix"])
    assert cards == [("tiny", "mix")]
    run(recipe_file, store)
    assert cards[1:] == [("tiny", "tokenize")], "before the model is touched"
    run(recipe_file, store, refresh=["evaluate[pesc]"])
    assert len(cards) == 2


def test_benchmarks_at_the_same_time_are_tasks_of_their_own_and_one_that_fails_leaves_the_others(
    recipe_file, fakes, store, tmp_path, monkeypatch
):
    import sys

    from pesc.launch import side_by_side

    trace = tmp_path / "trace"
    trace.mkdir()
    monkeypatch.setenv("PESC_TEST_TRACE", str(trace))
    monkeypatch.setenv("PESC_TEST_MEET", "pesc-quiz,pesc-exam")
    monkeypatch.setenv("PESC_TEST_FAIL", "pesc-oral")
    monkeypatch.setattr(side_by_side, "PROGRAM", (sys.executable, "-m", "tests.launch.fake_job"))
    run_recipe(load_recipe(recipe_file), store, Selection(until=("merge[pesc]",)))
    fakes.CALLS.clear()
    overrides = [f"evaluate.benchmarks.{name}={{task: arc_{name}, metric: acc}}" for name in ("exam", "oral")]
    flow_run_id, state = run(
        recipe_file, store, until=["evaluate[pesc]"], overrides=[*overrides, "execution.parallel_benchmarks=2"]
    )  # fmt: skip
    with pytest.raises(DataError, match="failed as asked"):
        state.result()
    states = {address: name for address, name in observe.task_states(flow_run_id, 11).items() if address.startswith("evaluate")}
    assert states == {"evaluate[pesc/quiz]": "Completed", "evaluate[pesc/exam]": "Completed", "evaluate[pesc/oral]": "Failed"}
    assert fakes.CALLS == []
    assert {path.stem: path.read_text() for path in trace.glob("pesc-[qe]*.met")}.keys() == {"pesc-quiz", "pesc-exam"}
    assert "2" in {path.read_text() for path in trace.glob("*.met")}
