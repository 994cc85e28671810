"""Recipes run on machines that share only a remote: HITs, what is pulled, what is owed, and who is believed."""

import pytest

from pesc import reproduce as reproduce_module
from pesc.build import build_or_open, make_job
from pesc.errors import RemoteError, TransientRemoteError
from pesc.pipeline import build_graph
from pesc.plan import Selection, make_plan
from pesc.run import run_recipe
from pesc.store import Store, sharing
from pesc.store import remote as remote_module
from pesc.store.maintenance import fsck

SOME = Selection(until=("mix",))
"""Three actions: download[rows], dedup, mix."""


@pytest.fixture
def store(tmp_path, remote):
    return Store(tmp_path / "store")


@pytest.fixture
def there(tmp_path, remote):
    """Another machine's store, empty."""
    return Store(tmp_path / "there")


def test_a_second_machine_builds_nothing_and_pulls_nothing(fakes, store, there, tiny_recipe, remote):
    first = run_recipe(tiny_recipe(), store)
    fakes.CALLS.clear()
    second = run_recipe(tiny_recipe(), there)
    assert fakes.CALLS == []
    assert {o.how for o in second.values()} == {"hit"}
    assert {a: o.ref for a, o in first.items()} == {a: o.ref for a, o in second.items()}
    assert not (there.root / "objects").exists()


def test_what_a_build_reads_is_pulled_and_nothing_else(fakes, store, there, tiny_recipe, remote):
    first = run_recipe(tiny_recipe(), store, SOME)
    fakes.CALLS.clear()
    outcomes = run_recipe(tiny_recipe(mix={"total": 9}), there, SOME)
    assert fakes.CALLS == ["mix"]
    assert {p.name for p in (there.root / "objects").iterdir()} == {first["dedup"].ref.digest, outcomes["mix"].ref.digest}
    assert store.find("mix", outcomes["mix"].ref.fingerprint), "it went to the remote as well"
    assert fsck(there).is_clean


def test_what_was_built_before_there_was_a_remote_is_shared_by_the_next_run(fakes, store, there, tiny_recipe, remote, monkeypatch):
    monkeypatch.delenv("PESC_REMOTE")
    alone = Store(store.root)
    run_recipe(tiny_recipe(), alone, SOME)
    monkeypatch.setenv("PESC_REMOTE", str(remote))
    fakes.CALLS.clear()
    asked = []
    outcomes = run_recipe(tiny_recipe(), Store(store.root), SOME, on_action=lambda node, reason: asked.append(reason))
    assert fakes.CALLS == []
    assert {o.how for o in outcomes.values()} == {"hit"}
    assert len(asked) == 3
    assert all(reason.endswith("; to be pushed") for reason in asked)
    assert make_plan(tiny_recipe(), there, SOME).counts["HIT"] == 3
    asked.clear()
    run_recipe(tiny_recipe(), Store(store.root), SOME, on_action=lambda node, reason: asked.append(reason))
    assert asked == []


def test_a_result_that_cannot_be_pushed_is_kept_and_pushed_by_the_next_run(fakes, store, there, tiny_recipe, remote, monkeypatch):
    def refuse(*_a, **_k):
        raise TransientRemoteError("The remote did not answer.")

    chosen = Selection(until=("download[rows]",))
    told = r"download\[rows\] tiny .* is built and kept in .*, but was not pushed; the next run, or `pesc push`"
    with monkeypatch.context() as patch:
        patch.setattr(sharing, "upload_files", refuse)
        with pytest.raises(TransientRemoteError, match=told):
            run_recipe(tiny_recipe(), store, chosen)
    outcomes = run_recipe(tiny_recipe(), store, chosen)
    assert fakes.CALLS == ["download[rows]"]
    assert outcomes["download[rows]"].how == "hit"
    assert there.find("download", outcomes["download[rows]"].ref.fingerprint)
    assert fsck(store).leftovers == []


def test_a_remote_that_is_gone_stops_a_run_before_it_builds(fakes, store, tiny_recipe, remote):
    remote.rmdir()
    with pytest.raises(RemoteError, match="no such directory"):
        run_recipe(tiny_recipe(), store)
    assert fakes.CALLS == []


def test_a_refresh_is_seen_by_the_other_machine_s_next_run(fakes, store, there, tiny_recipe, remote, monkeypatch):
    chosen = Selection(until=("download[rows]",))
    run_recipe(tiny_recipe(), store, chosen)
    run_recipe(tiny_recipe(), there, Selection(until=("dedup",)))
    original = fakes.build

    def other_bytes(ctx):
        result = original(ctx)
        (ctx.out / "data.json").write_text('"refreshed"')
        return result

    monkeypatch.setattr(fakes, "build", other_bytes)
    new = run_recipe(tiny_recipe(), store, Selection(until=("download[rows]",), refresh=("download[rows]",)))["download[rows]"]
    monkeypatch.setattr(fakes, "build", original)
    remote_module._OPEN.clear()  # another process
    plan = {a.address: a for a in make_plan(tiny_recipe(), there, Selection(until=("dedup",)))}
    assert plan["download[rows]"].manifest.ref == new.ref
    assert plan["dedup"].status == "RUN"
    assert plan["dedup"].reason.startswith("input rows")


def test_the_loser_of_a_race_takes_the_winner_s_result(fakes, store, there, tiny_recipe, remote, monkeypatch):
    """Without leases: both build, with other bytes each, as training on two GPUs may."""
    recipe = tiny_recipe()
    job = make_job(build_graph(recipe).by_address["download[rows]"], recipe, {})
    original = fakes.build

    def while_the_other_builds(ctx):
        monkeypatch.setattr(fakes, "build", original)
        winner.append(build_or_open(there, job))
        result = original(ctx)
        (ctx.out / "data.json").write_text('"of the loser"')
        return result

    winner = []
    from contextlib import nullcontext

    monkeypatch.setattr(Store, "lease", lambda *_a, **_k: nullcontext())
    monkeypatch.setattr(fakes, "build", while_the_other_builds)
    loser = build_or_open(store, job)
    assert winner[0].how == "built"
    assert loser.how == "hit"
    assert loser.ref == winner[0].ref
    assert (store.open(loser.ref) / "data.json").read_bytes() == (there.open(loser.ref) / "data.json").read_bytes()
    assert store.alone().find("download", job.fingerprint).ref == winner[0].ref


def test_a_result_is_reproduced_from_inputs_that_only_the_remote_has(fakes, store, there, tiny_recipe, remote):
    outcomes = run_recipe(tiny_recipe(), store, SOME)
    there.open(outcomes["mix"].ref)
    manifest = reproduce_module.find_manifest(there, outcomes["mix"].ref.digest[:12])
    assert reproduce_module.reproduce(there, manifest).is_same


def test_records_go_with_the_manifest(fakes, store, there, tiny_recipe, remote):
    outcomes = run_recipe(tiny_recipe(), store, SOME)
    ref = outcomes["mix"].ref
    there.open(ref)
    assert (there.action_path("mix", ref.fingerprint) / "log.txt").read_text() == "building mix\n"
