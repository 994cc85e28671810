"""MODEL: a directory, or an address in the store; anything else is one sentence that says what to do."""

import pytest
import yaml
from safetensors.torch import save_file

from pesc.data.chat import TEMPLATES
from pesc.errors import ModelError, RecipeError
from pesc.model_argument import find_model
from pesc.plan import Selection
from pesc.run import run_recipe
from tests.generate.builders import change_json, save_speaker
from tests.models.builders import save_published, save_trained


@pytest.fixture
def refuses(tmp_path):
    def run(message, argument, template=None):
        with pytest.raises((ModelError, RecipeError), match=message) as error:
            find_model(str(argument), tmp_path / "store", template)
        assert "\n" not in str(error.value)

    return run


def test_a_directory_is_itself(tmp_path):
    place = find_model(str(save_speaker(tmp_path / "a:b")), tmp_path / "store")
    assert (place.directory, place.fields["model_type"], place.template) == (tmp_path / "a:b", "llama", None)


def test_what_is_no_directory_of_a_model_is_one_sentence(refuses, tmp_path):
    refuses("There is no directory .*none: give the directory of a Hugging Face model, or RECIPE:ADDRESS", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refuses("has no config.json", tmp_path / "empty")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuses("model.gguf is a file", tmp_path / "model.gguf")


def test_what_training_leaves_must_be_merged_first(refuses, tmp_path):
    dense = save_speaker(tmp_path / "dense")
    save_trained(dense, tmp_path / "trained", steps=1)
    for directory in (tmp_path / "trained", tmp_path / "trained/adapter"):
        refuses("holds what training changed, not a whole model: merge it first", directory)
    (tmp_path / "trained/adapter").rename(tmp_path / "dense/adapter")
    refuses("merge it first", dense)


def test_published_layouts_must_be_imported_first(refuses, tmp_path):
    save_published(tmp_path / "theirs", "llama", "expert_{}", "camelidae")
    refuses("would load without its experts: read it with `pesc import", tmp_path / "theirs")
    (tmp_path / "checkpoint-1").mkdir()
    save_file({}, tmp_path / "checkpoint-1/moe_model.bin")
    refuses("is a training checkpoint of the reference code", tmp_path / "checkpoint-1")


def test_a_template_that_cannot_be_read_is_one_sentence(refuses, tmp_path):
    refuses("--chat-template chatm cannot be read .*give chatml, pesc, or a file", save_speaker(tmp_path / "m"), "chatm")


@pytest.fixture
def recipe_file(tmp_path, fakes, tiny_recipe):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tokenize={"chat_template": "pesc"}).model_dump(mode="json")))
    return path


def test_an_address_is_the_object_in_the_store(refuses, store, recipe_file):
    from pesc.recipe import load_recipe

    refuses(
        r"merge\[pesc\] is not in the store .*never built.*: run `pesc run .*tiny.yaml --until 'merge\[pesc\]'` first",
        f"{recipe_file}:merge[pesc]",
    )
    done = run_recipe(load_recipe(str(recipe_file)), store, Selection(until=("merge[pesc]",)))
    built = store.open(done["merge[pesc]"].ref)
    built.chmod(0o755)
    (built / "config.json").write_text("{}")
    place = find_model(f"{recipe_file}:merge[pesc]", store.root)
    assert place.directory == built
    assert place.template is None, "a merged model has its own"
    assert find_model(f"{recipe_file}:merge[pesc]", store.root, "chatml").template == TEMPLATES["chatml"]


def test_addresses_of_no_model_are_sentences(refuses, recipe_file):
    refuses(r"train\[pesc\] is what training changed.*use .*tiny.yaml:merge\[pesc\]", f"{recipe_file}:train[pesc]")
    refuses(r"mix makes no model\. The models of recipe", f"{recipe_file}:mix")
    refuses(r"has no action 'merge'\. Its models: .*merge\[pesc\]", f"{recipe_file}:merge")
    refuses("Did you mean 'demo'", "dmo:merge[pesc]")


def test_nothing_of_this_needs_torch(tmp_path):
    import subprocess
    import sys

    change_json(save_speaker(tmp_path / "m") / "config.json", x=1)
    code = (
        "import sys, pathlib, pesc.generate.prompts, pesc.cli\nfrom pesc.model_argument import find_model\n"
        f"find_model({str(tmp_path / 'm')!r}, pathlib.Path('x'))\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
