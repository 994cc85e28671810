"""The model card of an export: everything on it stands in a manifest or the recipe, and nothing that is missing is passed over."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from pesc import cli, pipeline
from pesc.model_card import render_model_card
from pesc.plan import Selection
from pesc.recipe import recipe_from_dict
from pesc.run import run_recipe
from pesc.stage import BuildResult
from tests.data.card_recipe import small_recipe
from tests.models.builders import save_dense, save_sparse

QUESTIONS = ["Why is the sky blue?", "Name a moon of Jupiter.", "What is two and two?", "Name a prime."]
CELL = dict(
    arm="pesc", benchmark="quiz", percent=True, value=48.3, low=46.1, high=50.5, metric="acc", num_items=100, num_available=100, num_fewshot=5,
    chat_template=False, figures=[],
)  # fmt: skip
REPORT = {"comparison": {"benchmarks": ["quiz"], "arms": ["pesc"], "cells": [CELL]}, "names": {"quiz": "A quiz"}, "systems": {}}


def build_model(ctx):
    """Stands for upcycle, train and merge: links a model directory, and measures something."""
    for file in Path(os.environ["PESC_TEST_MODEL"]).iterdir():
        shutil.copy(file, ctx.out / file.name)
    (ctx.out / "stats.json").write_text(json.dumps({"tokens": 4321, "fill": 0.97}))  # of tokenize
    logits = {"relative_rms_difference": 0.0123, "relative_rms_of_rounding": 0.0119}
    (ctx.out / "proof.json").write_text(json.dumps({"logits": logits}))  # of merge
    return BuildResult(metrics={"tokens": 4242, "seconds_training": 7200.0, "peak_memory_bytes": 3.2e9, "is_fast": True})


def build_report(ctx):
    (ctx.out / "results.json").write_text(json.dumps(REPORT))
    return BuildResult()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Recipe and its file; the data stages are real, the models tiny, the report canned."""
    save_sparse(save_dense(tmp_path / "dense"), tmp_path / "model")
    (tmp_path / "model/README.md").write_text("the card of the base")
    monkeypatch.setenv("PESC_TEST_MODEL", str(tmp_path / "model"))
    for name in ("tokenize", "upcycle", "train", "merge", "evaluate", "routing", "report"):
        builder = "build_report" if name == "report" else "build_model"
        stage = replace(pipeline._BY_NAME[name], builder=f"tests.test_model_card:{builder}", isolated=False, preflight="")
        monkeypatch.setitem(pipeline._BY_NAME, name, stage)
    changes = small_recipe(tmp_path / "sources", QUESTIONS, arms={"pesc": {"method": "pesc"}}, tokenize={"chat_template": "pesc"})
    changes |= {"description": "A small one", "upcycle": {"num_experts": 4, "adapter_dim": 8}, "train": {"learning_rate": 3e-4}}
    changes["sources"]["base"]["license"] = "Apache-2.0"
    changes["sources"]["rows"]["license"] = "CC BY 4.0 | with a bar"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(changes))
    return recipe_from_dict(changes), tmp_path / "small.yaml"


@pytest.fixture
def pesc(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pesc", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_an_export_from_the_store_has_its_card(world, store, tmp_path, pesc):
    recipe, path = world
    done = run_recipe(recipe, store)
    out = tmp_path / "out"
    code, _, err = pesc("export", f"{path}:merge[pesc]", "--format", "remote-code", "--out", out, "--store", store.root)
    assert code == 0, err
    text = (out / "README.md").read_text()
    card = ModelCard(text)  # the hub's own reader
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert card.data.tags == ["pesc", "mixture-of-experts"]
    assert "trust_remote_code=True" in text
    assert "| experts in a layer | 4 |" in text
    assert "| learning rate | 0.0003, constant with warmup |" in text
    assert "| tokens | 4,242 |" in text
    assert "| merged against unmerged | logits off by 1.23% (root mean square); rounding its weights alone makes 1.19% |" in text
    assert "| time | 2.0 h |" in text
    assert "| peak memory of the first rank | 3.2 GB |" in text
    assert "is fast" not in text
    assert "| A quiz | acc, 5-shot, 100 items | 48.3 [46.1, 50.5] |" in text
    assert "CC BY 4.0 \\| with a bar" in text
    assert "GGUF has no form for its adapters" in text
    assert f"| {done['merge[pesc]'].ref.fingerprint[:12]} | {done['merge[pesc]'].ref.digest[:12]} |" in text
    assert "- **Tokens**: 4,321 (blocks 97.00 % full)" in text
    assert "### The mixture" in text
    assert str(tmp_path) not in text, "paths of this machine mean nothing to others"
    built = store.open(done["merge[pesc]"].ref)
    assert (built / "README.md").read_text() == "the card of the base", "the store is as it was"


def test_a_published_layout_says_how_it_is_read(world, store, tmp_path, pesc):
    run_recipe(world[0], store, Selection(until=("merge[pesc]",)))
    out = tmp_path / "out"
    code, _, err = pesc("export", f"{world[1]}:merge[pesc]", "--format", "camelidae", "--out", out, "--store", store.root)
    assert code == 0, err
    text = (out / "README.md").read_text()
    assert "for the code of its authors, or for `pesc import DIRECTORY --out NEW`" in text
    assert "| experts in a layer | 4 |" in text
    assert "from_pretrained" not in text


def test_what_is_missing_is_said(world, store):
    recipe, _ = world
    done = run_recipe(recipe, store, Selection(until=("upcycle[pesc]",)))
    text = render_model_card(recipe, "upcycle[pesc]", store, store.open(done["upcycle[pesc]"].ref))
    assert "Not trained: the model computes what its base computes." in text
    assert "Not reported yet (not measured: evaluate[pesc/quiz]): `pesc run small`." in text
    assert "nothing can be told of the mixture: `pesc run small --until tokenize`." in text
    assert "Its training data was not checked against the benchmarks." in text
    assert "| rows | training data | CC BY 4.0 \\| with a bar |" in text
    assert "not fetched here" in text


def test_equal_manifests_give_equal_bytes(world, store):
    recipe, _ = world
    built = store.open(run_recipe(recipe, store)["merge[pesc]"].ref)
    cards = {render_model_card(recipe, "merge[pesc]", store, built) for _ in range(2)}
    assert len(cards) == 1


def test_licences_that_the_hub_has_no_word_for_are_given_in_words(world, store):
    recipe, _ = world
    recipe.sources["base"] = recipe.sources["base"].model_copy(update={"license": "House rules"})
    built = store.open(run_recipe(recipe, store, Selection(until=("upcycle[pesc]",)))["upcycle[pesc]"].ref)
    data = ModelCard(render_model_card(recipe, "upcycle[pesc]", store, built)).data
    assert (data.license, data.license_name) == ("other", "House rules")


def test_an_export_from_a_directory_keeps_the_card_it_came_with(world, tmp_path, pesc):
    assert pesc("export", tmp_path / "model", "--format", "remote-code", "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out/README.md").read_text() == "the card of the base"
