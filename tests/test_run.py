"""Run, plan, rerun: what is built, what is kept, and why."""

import json
from dataclasses import replace

import pytest

from pesc import pipeline
from pesc.build import adopt, make_job
from pesc.errors import DataError, EvaluationError, HolesError, RecipeError, StoreError, disk_sentence
from pesc.plan import Selection, make_plan
from pesc.run import run_recipe
from pesc.store.maintenance import fsck


def statuses(plan):
    return {action.address: action.status for action in plan}


def faults_of(recipe):
    """Stands for a preflight; called by name."""
    return [f"evaluate.benchmarks.{name}: no such task" for name in recipe.evaluate.benchmarks]


def test_what_would_stop_a_benchmark_is_told_before_the_training_and_only_then(store, fakes, tiny_recipe, monkeypatch):
    stage = replace(pipeline._BY_NAME["evaluate"], preflight="tests.test_run:faults_of")
    monkeypatch.setitem(pipeline._BY_NAME, "evaluate", stage)
    with pytest.raises(RecipeError, match=r"evaluate\.benchmarks\.\w+: no such task"):
        run_recipe(tiny_recipe(), store)
    assert fakes.CALLS == []
    run_recipe(tiny_recipe(), store, Selection(until=("train",)))  # no benchmark is in it
    run_recipe(tiny_recipe(), store)  # no training comes first: the benchmark itself tells


def test_a_second_run_builds_nothing(fakes, store, tiny_recipe):
    first = run_recipe(tiny_recipe(), store)
    built = list(fakes.CALLS)
    second = run_recipe(tiny_recipe(), store)
    assert built == list(first)
    assert built == fakes.CALLS
    assert {o.how for o in second.values()} == {"hit"}
    assert {a: o.ref for a, o in first.items()} == {a: o.ref for a, o in second.items()}


def test_the_graph_has_every_stage_and_the_arms_share_the_data(fakes, store, tiny_recipe):
    outcomes = run_recipe(tiny_recipe(), store)
    assert list(outcomes) == [
        "download[base]", "download[rows]", "dedup", "mix", "tokenize", "upcycle[pesc]", "train[pesc]", "merge[pesc]",
        "evaluate[pesc/quiz]", "routing[pesc]", "train[qlora]", "merge[qlora]", "evaluate[qlora/quiz]", "report",
    ]  # fmt: skip


def test_two_empty_stores_give_the_same_objects_and_fingerprints(fakes, store, tiny_recipe, tmp_path):
    from pesc.store import Store

    first, second = run_recipe(tiny_recipe(), store), run_recipe(tiny_recipe(), Store(tmp_path / "other"))
    assert {a: o.ref for a, o in first.items()} == {a: o.ref for a, o in second.items()}


def test_a_plan_of_an_empty_store_runs_everything(fakes, store, tiny_recipe):
    plan = make_plan(tiny_recipe(), store)
    assert plan.counts == {"HIT": 0, "RUN": 14, "BLOCKED": 0}
    assert plan.actions[0].reason == "never built"
    assert "waits for" in plan.actions[-1].reason


def test_a_changed_setting_is_named_and_reaches_what_depends_on_it(fakes, store, tiny_recipe):
    run_recipe(tiny_recipe(), store)
    plan = make_plan(tiny_recipe(dedup={"near_duplicate_threshold": 0.7}), store)
    reasons = {a.address: a.reason for a in plan}
    assert reasons["dedup"] == "config.near_duplicate_threshold 0.8 → 0.7"
    assert reasons["mix"] == "dedup will run (kept if the bytes stay the same)"
    unaffected = {"download[base]", "download[rows]", "upcycle[pesc]"}
    assert {a for a, s in statuses(plan).items() if s == "HIT"} == unaffected


def test_equal_bytes_upstream_keep_everything_downstream(fakes, store, tiny_recipe):
    run_recipe(tiny_recipe(), store)
    fakes.CALLS.clear()
    changed = tiny_recipe(dedup={"near_duplicate_threshold": 0.7})  # the fake's bytes are the same for 0.7 and 0.8
    outcomes = run_recipe(changed, store)
    assert fakes.CALLS == ["dedup"]
    assert outcomes["report"].how == "hit"
    assert make_plan(changed, store).counts["HIT"] == 14
    different = tiny_recipe(dedup={"near_duplicate_threshold": 0.2})
    run_recipe(different, store)
    assert fakes.CALLS[1:] == [a for a in outcomes if a not in ("download[base]", "download[rows]", "upcycle[pesc]")]


def test_an_edited_local_file_is_another_source(fakes, store, tiny_recipe, tmp_path):
    run_recipe(tiny_recipe(), store)
    recipe = tiny_recipe()
    (tmp_path / "sources" / "rows" / "data.json").write_text('"edited"')
    plan = {a.address: a for a in make_plan(recipe, store)}
    assert plan["download[rows]"].status == "RUN"
    assert plan["download[rows]"].reason.startswith("input local")
    assert plan["download[base]"].status == "HIT"


def test_only_refuses_before_building_when_something_is_missing(fakes, store, tiny_recipe):
    with pytest.raises(RecipeError, match=r"download\[base\] .* is needed but is not in the store.*--until"):
        run_recipe(tiny_recipe(), store, Selection(only=("train[pesc]",)))
    assert fakes.CALLS == []


def test_until_from_and_only_select(fakes, store, tiny_recipe):
    run_recipe(tiny_recipe(), store, Selection(until=("mix",)))
    assert fakes.CALLS == ["download[rows]", "dedup", "mix"]
    run_recipe(tiny_recipe(), store, Selection(until=("train[pesc]",)))
    fakes.CALLS.clear()
    run_recipe(tiny_recipe(), store, Selection(only=("merge[pesc]",)))
    assert fakes.CALLS == ["merge[pesc]"]
    fakes.CALLS.clear()
    run_recipe(tiny_recipe(), store, Selection(start=("evaluate[pesc]",), until=("evaluate[pesc]",)))
    assert fakes.CALLS == ["evaluate[pesc/quiz]"]


def test_refresh_builds_again_and_keeps_what_gave_the_same_bytes(fakes, store, tiny_recipe):
    run_recipe(tiny_recipe(), store)
    fakes.CALLS.clear()
    outcomes = run_recipe(tiny_recipe(), store, Selection(refresh=("evaluate",)))
    assert fakes.CALLS == ["evaluate[pesc/quiz]", "evaluate[qlora/quiz]"]
    assert outcomes["report"].how == "hit"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(only=("trane",)), "no stage 'trane'. Did you mean 'train'"),
        (Selection(only=("train[moe]",)), r"no 'train\[moe\]'. Its train actions: train\[pesc\], train\[qlora\]"),
        (Selection(only=("train[",)), "not an address"),
        (Selection(only=("mix",), refresh=("train",)), r"--refresh names train\[pesc\]"),
        (Selection(only=("mix",), until=("dedup",)), "leaves nothing"),
    ],
)
def test_a_wrong_selection_is_a_sentence(fakes, store, tiny_recipe, selection, message):
    with pytest.raises(RecipeError, match=message):
        run_recipe(tiny_recipe(), store, selection)
    assert fakes.CALLS == []


def test_a_failure_leaves_no_half_artifact_and_the_rerun_goes_on_from_there(fakes, store, tiny_recipe):
    fakes.FAIL_AT.add("train[pesc]")
    with pytest.raises(DataError, match="row 3"):
        run_recipe(tiny_recipe(), store)
    done = list(fakes.CALLS[:-1])
    assert fsck(store).is_clean
    assert statuses(make_plan(tiny_recipe(), store))["train[pesc]"] == "RUN"
    fakes.FAIL_AT.clear()
    fakes.CALLS.clear()
    run_recipe(tiny_recipe(), store)
    assert fakes.CALLS[0] == "train[pesc]"
    assert not set(fakes.CALLS) & set(done)


def test_a_removed_object_is_built_again(fakes, store, tiny_recipe):
    import shutil

    outcome = run_recipe(tiny_recipe(), store)["mix"]
    shutil.rmtree(store.object_path(outcome.ref.digest))
    plan = {a.address: a for a in make_plan(tiny_recipe(), store)}
    assert plan["mix"].reason == "its object is missing from the store"
    fakes.CALLS.clear()
    run_recipe(tiny_recipe(), store)
    assert fakes.CALLS == ["mix"]


def test_the_manifest_says_how_it_was_made(fakes, store, tiny_recipe):
    outcome = run_recipe(tiny_recipe(), store)["train[pesc]"]
    manifest = store.find("train", outcome.ref.fingerprint)
    assert manifest.key.config["learning_rate"] == 2e-4
    assert set(manifest.input_fingerprints) == {"model", "blocks"}
    assert manifest.environment["packages"]["pydantic" if "pydantic" in manifest.environment["packages"] else "torch"]
    assert manifest.environment["hardware"]["cores"] >= 1
    assert len(manifest.ref.model_dump_json()) < 1024
    assert (store.action_path("train", manifest.fingerprint) / "log.txt").read_text() == "building train[pesc]\n"


def test_execution_is_not_in_the_key(fakes, store, tiny_recipe):
    run_recipe(tiny_recipe(), store)
    assert make_plan(tiny_recipe(execution={"num_processes": 16, "zero_stage": 3}), store).counts["RUN"] == 0


def test_a_higher_code_version_is_a_reason(fakes, store, tiny_recipe, monkeypatch):
    from dataclasses import replace

    from pesc import pipeline

    run_recipe(tiny_recipe(), store)
    version = pipeline._BY_NAME["mix"].code_version
    monkeypatch.setitem(pipeline._BY_NAME, "mix", replace(pipeline._BY_NAME["mix"], code_version=version + 1))
    assert {a.address: a.reason for a in make_plan(tiny_recipe(), store)}["mix"] == f"code_version {version} → {version + 1}"


def test_adopt_keeps_a_result_with_the_reason_on_record(fakes, store, tiny_recipe):
    old = run_recipe(tiny_recipe(), store)
    recipe = tiny_recipe(train={"max_grad_norm": 0.31})
    plan = {a.address: a for a in make_plan(recipe, store)}
    action = plan["train[pesc]"]
    assert action.status == "RUN"
    job = make_job(action.node, recipe, {a: o.ref for a, o in old.items()})
    adopt(store, job, store.find("train", old["train[pesc]"].ref.fingerprint), "clipping never engaged")
    plan = {a.address: a for a in make_plan(recipe, store)}
    assert plan["train[pesc]"].status == plan["merge[pesc]"].status == "HIT"
    assert "clipping never engaged" in plan["train[pesc]"].reason
    with pytest.raises(StoreError, match="not of train"):
        adopt(store, job, store.find("mix", old["mix"].ref.fingerprint), "no")


def test_a_full_disk_is_a_sentence_and_loses_nothing(fakes, store, tiny_recipe, monkeypatch):
    import errno

    run_recipe(tiny_recipe(), store, Selection(until=("mix",)))
    before = json.dumps(sorted(p.name for p in store.root.glob("actions/*/*")))

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(store), "publish", full)
    with pytest.raises(StoreError, match=r"is full\. Free space"):
        run_recipe(tiny_recipe(), store)
    assert json.dumps(sorted(p.name for p in store.root.glob("actions/*/*"))) == before
    monkeypatch.undo()
    assert fsck(store).is_clean
    assert disk_sentence(OSError(errno.EROFS, "Read-only file system", "/x"), store.root).startswith("/x cannot be used")


def test_what_a_run_uses_is_recorded_before_each_build(fakes, store, tiny_recipe):
    """So that `gc` beside a day of training keeps the old results that the training reads."""
    run_recipe(tiny_recipe(), store, Selection(until=("tokenize",)))
    fakes.FAIL_AT.add("train[pesc]")
    seen = []

    def on_action(node, _reason):
        seen.append((node.address, [set(json.loads(path.read_text())) for path in store.root.glob("runs/tiny/*.json")]))

    for record in store.root.glob("runs/tiny/*.json"):
        record.unlink()
    with pytest.raises(DataError):
        run_recipe(tiny_recipe(), store, Selection(until=("train[pesc]",)), on_action=on_action)
    [records] = [records for address, records in seen if address == "train[pesc]"]
    assert records == [{"download[base]", "download[rows]", "dedup", "mix", "tokenize", "upcycle[pesc]"}]
    assert len(list(store.root.glob("runs/tiny/*.json"))) == 1


def test_a_store_that_cannot_be_written_still_gives_what_it_has(fakes, store, tiny_recipe, monkeypatch):
    import errno

    run_recipe(tiny_recipe(), store)

    def refuse(*_args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(store), "record_run", refuse)
    assert {o.how for o in run_recipe(tiny_recipe(), store).values()} == {"hit"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report": {"baselines": ["gpt-3.6"]}}, "Did you mean 'gpt-3.5'"),
        ({"evaluate": {"benchmarks": {"quiz": {"baseline": "quizz"}}}}, "no row of the published figures"),
    ],
)
def test_figures_that_the_report_cannot_find_are_told_before_anything_is_built(fakes, store, tiny_recipe, changes, message):
    with pytest.raises(EvaluationError, match=message):
        run_recipe(tiny_recipe(**changes), store)
    assert fakes.CALLS == []


def test_a_benchmark_that_dies_leaves_a_hole_and_the_rerun_fills_it(fakes, store, tiny_recipe):
    recipe = tiny_recipe(evaluate={"benchmarks": {"exam": {"task": "arc_challenge", "metric": "acc"}}})
    fakes.FAIL_AT.add("evaluate[pesc/quiz]")
    seen = []
    with pytest.raises(HolesError) as caught:
        run_recipe(recipe, store, on_hole=lambda node, error: seen.append((node.address, type(error))))
    assert seen == [("evaluate[pesc/quiz]", DataError)]
    assert fakes.CALLS[-4:] == ["train[qlora]", "merge[qlora]", "evaluate[qlora/quiz]", "evaluate[qlora/exam]", "report"][-4:]
    assert "evaluate[pesc/exam]" in fakes.CALLS
    report = caught.value.finished["report"].ref
    sentence = str(caught.value)
    assert sentence.startswith("1 benchmark of tiny ended without a result; the report ")
    assert f"{report.digest}/report.html shows it as a hole. Everything else is finished and kept; run again" in sentence
    assert "evaluate[pesc/quiz]: evaluate[pesc/quiz] failed as asked: row 3 of data.json has no answer. Give it one." in sentence
    manifest = store.find("report", report.fingerprint)
    assert "evaluate[pesc/quiz]" not in manifest.key.inputs
    assert "evaluate[pesc/quiz]" in manifest.key.config["expected"]
    assert fsck(store).is_clean
    fakes.FAIL_AT.clear()
    fakes.CALLS.clear()
    outcomes = run_recipe(recipe, store)
    assert fakes.CALLS == ["evaluate[pesc/quiz]", "report"]
    assert {a for a, o in outcomes.items() if o.how == "built"} == {"evaluate[pesc/quiz]", "report"}
    assert outcomes["report"].ref.fingerprint != report.fingerprint


def test_a_report_is_built_without_benchmarks_that_are_known_to_have_no_result(fakes, store, tiny_recipe):
    recipe = tiny_recipe()
    fakes.FAIL_AT.add("evaluate[pesc/quiz]")
    with pytest.raises(HolesError) as caught:
        run_recipe(recipe, store)
    made = caught.value.finished["report"].ref
    assert {a.address: a.status for a in make_plan(recipe, store, Selection(only=("report",)))}["report"] == "BLOCKED"
    alone = Selection(only=("report",), without=("evaluate[pesc/quiz]",))
    plan = {action.address: action for action in make_plan(recipe, store, alone)}
    assert plan["report"].fingerprint == made.fingerprint, "the same as a run makes that has met the failure"
    assert "evaluate[pesc/quiz]" not in plan
    fakes.CALLS.clear()
    assert run_recipe(recipe, store, alone)["report"].ref == made
    assert fakes.CALLS == []
    with pytest.raises(RecipeError, match=r"merge\[pesc\] is no benchmark: nothing can do without it"):
        make_plan(recipe, store, Selection(only=("report",), without=("merge[pesc]",)))


def test_every_sentence_of_several_failures_is_told_and_a_report_of_nothing_is_not_made(fakes, store, tiny_recipe):
    fakes.FAIL_AT |= {"evaluate[pesc/quiz]", "evaluate[qlora/quiz]"}
    with pytest.raises(HolesError) as caught:
        run_recipe(tiny_recipe(), store)
    assert "report" not in fakes.CALLS
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("2 benchmarks of tiny ended without a result. Everything else is finished")
    assert [line.partition(":")[0] for line in lines[1:]] == ["evaluate[pesc/quiz]", "evaluate[qlora/quiz]"]


def test_a_routing_that_dies_costs_the_report_its_part_and_nothing_else(fakes, store, tiny_recipe):
    fakes.FAIL_AT.add("routing[pesc]")
    with pytest.raises(
        HolesError, match=r"^1 action of tiny ended without a result; the report \S+/report.html is made without it\. Everything"
    ) as caught:
        run_recipe(tiny_recipe(), store)
    assert "routing[pesc]" not in store.find("report", caught.value.finished["report"].ref.fingerprint).key.inputs
    fakes.FAIL_AT |= {"evaluate[pesc/quiz]", "evaluate[qlora/quiz]"}
    fakes.CALLS.clear()
    with pytest.raises(HolesError, match=r"^3 actions of tiny ended without a result\. "):
        run_recipe(tiny_recipe(), store, Selection(refresh=("evaluate",)))
    assert "report" not in fakes.CALLS, "a routing alone is no report"


def test_a_benchmark_asked_for_alone_fails_with_its_own_error(fakes, store, tiny_recipe):
    run_recipe(tiny_recipe(), store, Selection(until=("merge",)))
    fakes.FAIL_AT.add("evaluate[pesc/quiz]")
    with pytest.raises(DataError, match="row 3"):
        run_recipe(tiny_recipe(), store, Selection(only=("evaluate[pesc/quiz]",)))


@pytest.mark.parametrize("address", ["train[pesc]", "report"])
def test_what_others_cannot_do_without_ends_the_run(fakes, store, tiny_recipe, address):
    fakes.FAIL_AT.add(address)
    with pytest.raises(DataError, match="row 3"):
        run_recipe(tiny_recipe(), store)
    assert fakes.CALLS[-1] == address


def test_a_full_disk_in_a_benchmark_ends_the_run(fakes, store, tiny_recipe, monkeypatch):
    import errno

    run_recipe(tiny_recipe(), store, Selection(until=("merge",)))
    fakes.CALLS.clear()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(store), "publish", full)
    with pytest.raises(StoreError, match=r"is full\. Free space"):
        run_recipe(tiny_recipe(), store)
    assert fakes.CALLS == ["evaluate[pesc/quiz]"]
