"""A model of the store is published as what `pesc export` writes, with its card, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from pesc.plan import Selection
from pesc.run import run_recipe


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "dense"])
def test_a_model_of_the_store_goes_out_as_others_open_it(world, kind, store, tmp_path, hub, publish, monkeypatch):
    recipe, path = world
    monkeypatch.setenv("PESC_TEST_MODEL", str(tmp_path / kind))
    run_recipe(recipe, store, Selection(until=("merge[pesc]",)))
    before = {item.name for item in store.root.iterdir()}
    code, out, err = publish(f"{path}:merge[pesc]", "--store", store.root, torch=True)
    assert code == 0, err
    assert "licence: apache-2.0" in out
    assert {item.name for item in store.root.iterdir()} == before
    tree = hub.tree("org/model")
    card = ModelCard(tree["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert hub.commits[0]["summary"].startswith(f"Publish {recipe.name}:merge[pesc] with pesc ")
    assert not any(str(tmp_path).encode() in data for data in tree.values()), "no path of this machine goes out"
    assert ("modeling_pesc.py" in tree) is (kind == "model")
    assert ("auto_map" in json.loads(tree["config.json"])) is (kind == "model")
    assert "stats.json" not in tree
    assert "stays here: stats.json (no file of a model)" in out
    back = tmp_path / "back"
    back.mkdir()
    for name, data in tree.items():
        (back / name).write_bytes(data)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, loading = AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True, output_loading_info=True)
    assert not any(loading.values())
    assert type(model).__name__ == {"model": "PescLlamaForCausalLM", "dense": "LlamaForCausalLM"}[kind]
