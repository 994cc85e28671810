"""The command as a user meets it: in its own process, by exit code and by what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pesc(tmp_path):
    def run(*arguments, **environment):
        env = {**os.environ, "PESC_STORE": str(tmp_path / "store"), **environment}
        return subprocess.run([sys.executable, "-m", "pesc.cli", *arguments], capture_output=True, text=True, env=env, cwd=ROOT)

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "dmo"], "Did you mean 'demo'"),
        (["run", "demo", "--only", "trian"], "Did you mean 'train'"),
        (["plan", "demo", "train.learning_rat=1"], "train.learning_rat: there is no such setting"),
        (["plan", "demo", "upcycle.top_k=9"], "top_k (9) is larger than num_experts (8)"),
        (["run", "demo", "--only", "train[pesc]"], "pesc run demo --until"),
        (["run", "demo", "--only", "train[moe]"], "Its train actions: train[pesc]"),
        (["explain", "demo", "evaluate[x]"], "has no action 'evaluate[x]'"),
        (["plan", "missing/recipe.yaml"], "no recipe file missing/recipe.yaml"),
        (["card", "demo", "--out", "card"], "Nothing is built of the data of recipe 'demo'"),
        (["adopt", "demo", "mix", "--from", "ab", "--reason", "r"], "before its inputs are there"),
    ],
)
def test_a_mistake_is_one_sentence_without_a_traceback(pesc, arguments, message):
    done = pesc(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("pesc: ")
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_store_that_cannot_be_written_is_a_sentence(pesc, tmp_path):
    (tmp_path / "file").write_text("")
    done = pesc("run", "demo", "--only", "download[human-eval]", "--store", str(tmp_path / "file" / "store"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "--store" in done.stderr


def test_plan_is_quick_and_exits_as_asked(pesc):
    best = 9.0
    for _ in range(3):
        before = os.times()
        done = pesc("plan", "demo")
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    assert done.returncode == 0
    assert "never built" in done.stdout
    assert best < 1.5, "0.6 s of a CPU on a quiet machine; two processes on one core may need twice that"
    assert pesc("plan", "demo", "--exit-code").returncode == 10


def test_show_prints_a_recipe_that_loads_again(pesc, tmp_path):
    done = pesc("show", "demo", "train.learning_rate=1e-4")
    path = tmp_path / "again.yaml"
    path.write_text(done.stdout)
    assert pesc("show", str(path)).stdout == done.stdout
    assert "learning_rate: 0.0001" in done.stdout


def test_show_deepspeed_says_what_each_trained_arm_runs_with(pesc):
    import json

    asked = ("execution.num_processes=4", "execution.num_nodes=2", "execution.device=cuda", "execution.zero_stage=3")
    shown = json.loads(pesc("show", "camelidae-8x7b", "--deepspeed", *asked).stdout)
    assert (shown["device"], shown["world_size"], list(shown["arms"])) == ("cuda", 8, ["pesc", "qlora"])
    for arm in shown["arms"].values():
        assert arm["zero_optimization"]["stage"] == 3
        assert arm["train_micro_batch_size_per_gpu"] * arm["gradient_accumulation_steps"] * 8 == arm["train_batch_size"] == 128
    assert "cannot share evenly" in " ".join(pesc("show", "demo", "--deepspeed", "execution.num_processes=7").stderr.split())


def test_gc_is_a_dry_run_and_fsck_of_an_empty_store_is_clean(pesc):
    assert "Would free 0.0 MB" in pesc("gc").stdout
    assert "0 actions, 0 objects: clean" in pesc("fsck").stdout


def test_card_writes_what_is_built_and_names_what_is_not(pesc, tmp_path):
    import yaml

    from tests.data.card_recipe import small_recipe

    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path / "sources", ["Why is the sky blue?", "Name a moon of Jupiter."])))
    assert pesc("run", str(path), "--until", "mix").returncode == 0
    done = pesc("card", str(path), "--out", str(tmp_path / "new" / "card"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("not on the card: tokenize (never built")
    assert (tmp_path / "new" / "card" / "card.html").read_text().startswith("<!doctype html>")
    assert "## The mixture" in (tmp_path / "new" / "card" / "card.md").read_text()
    refused = pesc("card", str(path), "--out", str(path / "below-a-file"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("pesc: The data card cannot be written to ")
