"""The version of a store's layout: stamped, migrated where that is harmless, refused with a sentence where it is newer."""

import json
import os
from dataclasses import replace

import pytest

from pesc.build import build_or_open, make_job
from pesc.errors import StoreError
from pesc.pipeline import build_graph
from pesc.plan import Selection, make_plan
from pesc.run import run_recipe
from pesc.store import Store, layout
from pesc.store.maintenance import fsck, gc
from tests.store.builders import made


@pytest.fixture
def old_store(store, fakes, tiny_recipe):
    """A store as it was before there was a file `format`: manifests know neither records nor refreshes."""
    run_recipe(tiny_recipe(), store, Selection(until=("mix",)))
    (store.root / "format").unlink()
    for path in store.root.glob("actions/*/*/manifest.json"):
        data = json.loads(path.read_text())
        for name in ("records", "refreshed"):
            data.pop(name)
        path.write_text(json.dumps(data, indent=1))
        os.utime(path, (1_700_000_000, 1_700_000_000))
    fakes.CALLS.clear()
    return Store(store.root)


def test_a_new_store_is_stamped_by_its_first_write_and_not_by_a_read(store):
    assert list(store.manifests()) == []
    assert not store.root.exists()
    made(store, {"data": b"x"})
    assert (store.root / "format").read_text() == f"{layout.STORE_FORMAT}\n"


def test_an_older_store_is_read_as_it_is(old_store, tiny_recipe):
    plan = make_plan(tiny_recipe(), old_store, Selection(until=("mix",)))
    assert {action.status for action in plan} == {"HIT"}
    assert fsck(old_store).is_clean
    assert not (old_store.root / "format").exists()


def test_the_first_write_migrates_it_and_keeps_every_result(old_store, tiny_recipe, fakes):
    refs = {a.address: a.manifest.ref for a in make_plan(tiny_recipe(), old_store, Selection(until=("mix",)))}
    made(old_store, {"data": b"x"}, stage="report")
    assert (old_store.root / "format").read_text() == "2\n"
    outcomes = run_recipe(tiny_recipe(), Store(old_store.root), Selection(until=("mix",)))
    assert {address: outcome.ref for address, outcome in outcomes.items()} == refs
    assert fakes.CALLS == []
    manifest = next(old_store.manifests("mix"))
    assert [file.path for file in manifest.records] == ["log.txt"]
    path = old_store.action_path("mix", manifest.fingerprint) / "manifest.json"
    assert path.stat().st_mtime == 1_700_000_000, "gc goes by it"
    assert fsck(old_store).is_clean


def test_the_command_migrates_and_may_be_killed_and_run_again(old_store, monkeypatch):
    original, calls = layout.write_atomic, []

    def killed(path, data):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(path, data)

    monkeypatch.setattr(layout, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        layout.migrate(old_store.root)
    monkeypatch.undo()
    assert layout.read_format(old_store.root) == 1
    (line,) = layout.migrate(old_store.root)
    assert line == "format 1 → 2: manifests list the records beside them (2 changed)"
    assert layout.migrate(old_store.root) == []
    assert all(manifest.records for manifest in old_store.manifests())


def test_a_migration_that_readers_would_notice_waits_for_the_command(old_store, monkeypatch):
    monkeypatch.setitem(layout.MIGRATIONS, 1, replace(layout.MIGRATIONS[1], automatic=False))
    with pytest.raises(StoreError, match=r"has the older format 1\. `pesc migrate --store .*` brings it to 2"):
        made(old_store, {"data": b"x"}, stage="report")
    layout.migrate(old_store.root)
    made(Store(old_store.root), {"data": b"x"}, stage="report")


def test_a_newer_store_is_refused_by_everything(old_store, fakes, tiny_recipe):
    (old_store.root / "format").write_text("3\n")
    recipe = tiny_recipe()
    job = make_job(build_graph(recipe).by_address["download[rows]"], recipe, {})
    before = sorted(old_store.root.rglob("*"))
    assert old_store.root / ".format.lock" in before
    for use in (
        lambda s: make_plan(recipe, s), lambda s: run_recipe(recipe, s), lambda s: build_or_open(s, job), fsck, lambda s: list(s.manifests()),
        lambda s: gc(s, [], 0, delete=True), lambda s: s.record_run("r", "now", {}), lambda s: layout.migrate(s.root),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=r"has format 3, and this pesc knows 2\. Use a newer pesc"):
            use(Store(old_store.root))
    assert sorted(old_store.root.rglob("*")) == before


def test_a_format_that_is_no_number_is_a_sentence(old_store):
    (old_store.root / "format").write_text("latest")
    with pytest.raises(StoreError, match="holds 'latest' and no format's number"):
        list(Store(old_store.root).manifests())
