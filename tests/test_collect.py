"""What `gc` keeps when nobody names a recipe, and when somebody does."""

import os
import time

import pytest
import yaml

from pesc.collect import collect
from pesc.errors import RecipeError
from pesc.plan import Selection
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from tests.fake_stages import tiny_recipe_dict


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe_dict(tmp_path / "sources")))
    return str(path)


@pytest.fixture
def old_results(recipe_file, fakes, store):
    """Two mixtures, made long ago: the recipe as it is, and with an override; the second was run last."""
    made = [run_recipe(load_recipe(recipe_file, changes), store, Selection(until=("mix",)))["mix"].ref for changes in ([], ["mix.total=7"])]
    then = time.time() - 60 * 86_400
    for path in [*store.root.rglob("*"), store.root]:
        os.utime(path, (then, then))
    return made


def doomed(store, keep_recipes):
    return {path.name for path in collect(store, keep_recipes, 30, delete=False).actions if path.parent.name == "mix"}


def test_the_last_run_of_each_recipe_is_kept_where_nobody_names_one(store, old_results):
    first, last = old_results
    assert doomed(store, None) == {first.fingerprint}
    assert collect(store, None, 30, delete=True).kept_actions > 0
    assert store.find("mix", last.fingerprint)


def test_a_recipe_is_named_with_its_overrides(store, old_results, recipe_file):
    first, second = old_results
    assert doomed(store, [recipe_file]) == {second.fingerprint}
    assert doomed(store, [f"{recipe_file} mix.total=7"]) == {first.fingerprint}
    assert doomed(store, [recipe_file, f"{recipe_file} mix.total=7"]) == set()
    with pytest.raises(RecipeError, match="write it as on a command line"):
        doomed(store, ["demo 'mix.total=7"])


def test_an_empty_list_deletes_nothing(store, old_results):
    with pytest.raises(RecipeError, match="without keeping the results of any recipe"):
        collect(store, [], 30, delete=True)
    assert doomed(store, []) == {ref.fingerprint for ref in old_results}
