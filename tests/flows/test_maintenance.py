"""Care of the store, as flows."""

import os
import time

import pytest

from flows.maintenance import fsck, gc
from pesc.errors import StoreError
from pesc.plan import Selection
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from tests.flows import observe

pytestmark = pytest.mark.usefixtures("prefect_server")


def age(store, days=60):
    for path in [*store.root.rglob("*"), store.root]:
        os.utime(path, (time.time() - days * 86_400,) * 2)


def test_gc_reports_first_and_removes_only_when_told(recipe_file, fakes, store):
    run_recipe(load_recipe(recipe_file), store, Selection(until=("mix",)))
    run_recipe(load_recipe(recipe_file, ["mix.total=7"]), store, Selection(until=("mix",)))
    age(store)
    state = gc(keep_recipes=[recipe_file], store=str(store.root), return_state=True)
    assert len(state.result().actions) == len(state.result().objects) == 1
    assert "actions/mix/" in observe.artifacts(state.state_details.flow_run_id)["store-gc"]
    assert len(list(store.root.glob("actions/mix/*"))) == 2
    gc(keep_recipes=[recipe_file], delete=True, store=str(store.root))
    assert len(list(store.root.glob("actions/mix/*"))) == 1
    fakes.CALLS.clear()
    run_recipe(load_recipe(recipe_file), store, Selection(until=("mix",)))
    assert fakes.CALLS == []


def test_fsck_fails_on_damage_and_repairs_when_told(recipe_file, fakes, store):
    ref = run_recipe(load_recipe(recipe_file), store, Selection(until=("mix",)))["mix"].ref
    assert fsck(store=str(store.root)).is_clean
    path = store.object_path(ref.digest) / "data.json"
    path.chmod(0o644)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(StoreError, match="repair=true"):
        fsck(store=str(store.root))
    assert len(fsck(repair=True, store=str(store.root)).repaired) == 2
    assert fsck(store=str(store.root)).is_clean
