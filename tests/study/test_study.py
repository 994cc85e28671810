"""`pesc study` from an empty store: the real graph, store and report over stand-ins for what takes hours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from pesc import cli, pipeline
from pesc.errors import DataError, EvaluationError, RecipeError
from pesc.heldout.results import write_result
from pesc.stage import BuildResult, StageContext
from pesc.store import Store
from pesc.study import commands
from tests import fake_stages
from tests.evaluate.builders import write_evaluation
from tests.evaluate.test_questions import losses
from tests.fake_stages import tiny_recipe_dict

LEVELS = {"pesc": 0.5, "qlora": 0.0, "base": 9.0}
"""What the stand-ins measure: the sparse arm is worse here, by far more than its two seeds differ."""
LOST: set[str] = set()
"""Arms whose losses cannot be measured."""
REPORT = pipeline._BY_NAME["report"]


def seed_of(arm: str) -> int:
    return int(arm[-1]) if "-s" in arm else 1


def build(ctx: StageContext) -> BuildResult:
    """Write what the report reads of a stage."""
    stage, _, instance = ctx.address.rstrip("]").partition("[")
    arm = instance.partition("/")[0]
    if stage == "train":
        record = {"config": {"method": ctx.config.method}, "trainable": [{"group": "lora", "tensors": 2, "parameters": 640}], "facts": {}}
        (ctx.out / "training.json").write_text(json.dumps(record | {"seed": ctx.config.seed}))
        measured = {
            "tokens_per_second": 100.0 + seed_of(arm),
            "peak_memory_bytes": 2_000_000_000,
            "device": "cpu, threads a rank: 1",
            "world_size": 2,
        }
        return BuildResult(metrics=measured)
    if stage == "heldout":
        if arm in LOST:
            raise DataError(f"{ctx.address} failed as asked. Ask for something else.")
        write_result(ctx.out, losses(LEVELS[arm.partition("-")[0]], seed_of(arm)))
        return BuildResult(metrics={"device": "cpu"})
    if stage == "evaluate":
        ctx.out.rmdir()
        write_evaluation(ctx.out, [1, 0, 1, 1], kind="pesc" if arm.startswith("pesc") else "dense", task="arc_easy")
        return BuildResult(metrics={"device": "cpu"})
    return fake_build(ctx)


def fake_build(ctx: StageContext) -> BuildResult:
    (ctx.out / "data.json").write_text(json.dumps([ctx.address, sorted(ctx.inputs)]))
    return BuildResult()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Two arms of two seeds and the base; stand-ins for every stage but the report."""
    fake_stages.install(monkeypatch)
    LOST.clear()
    for name in pipeline.STAGE_NAMES:
        stage = REPORT if name == "report" else replace(pipeline._BY_NAME[name], builder="tests.study.test_study:build")
        monkeypatch.setitem(pipeline._BY_NAME, name, stage)
    arms = {
        arm if seed == 1 else f"{arm}-s{seed}": {"method": arm, "train": {"seed": seed}, **({"upcycle": {"seed": seed}} if arm == "pesc" else {})}
        for arm in ("pesc", "qlora")
        for seed in (1, 2)
    }  # fmt: skip
    asked = {"primary": {"arm": "pesc", "control": "qlora"}, "smallest_difference": 0.001}
    raw = tiny_recipe_dict(tmp_path / "sources") | {
        "arms": {**arms, "base": {"method": "dense"}}, "heldout": {"enabled": True}, "routing": {"enabled": False},
        "report": {
            "title": "A study", "control_arm": "qlora", "baselines": [], "preregistration": asked,
            "replicates": {arm: [f"{arm}-s2"] for arm in ("pesc", "qlora")},
        },
        "description": "two arms",
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def run(recipe, tmp_path, *overrides, out="out", store="store"):
    return CliRunner().invoke(cli.app, ["study", str(recipe), *overrides, "--out", str(tmp_path / out), "--store", str(tmp_path / store)])


def table_of(text, heading):
    """The rows below a heading, as lists of cells."""
    section = text.partition(heading)[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")][2:]


def test_one_command_writes_the_verdict_and_every_arm_and_seed_with_what_it_took(recipe, tmp_path):
    done = run(recipe, tmp_path)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "study.md").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "Primary question, pesc against qlora: worse (+" in text
    assert "Primary question, pesc against qlora: worse (+" in done.output
    rows = {row[0]: row for row in table_of(text, "## What it took")}
    assert list(rows) == ["pesc", "pesc-s2", "qlora", "qlora-s2", "base"]
    means = {entry["arm"]: f"{entry['mean']:.4f}" for entry in results["held_out"]["runs"]}
    assert {arm: row[1] for arm, row in rows.items()} == means
    assert rows["pesc-s2"][2:5] == ["640", "102", "2.00 GB"]
    assert rows["pesc-s2"][7] == "2 ranks on cpu, threads a rank: 1"
    assert (rows["base"][2:6], rows["base"][7]) == (["–", "–", "–", "–"], "cpu")
    assert all((tmp_path / "out" / "plots" / f"questions.{kind}").is_file() for kind in ("svg", "png"))
    assert "how much another seed would differ is not known" not in (tmp_path / "out" / "report.html").read_text()
    assert list(results["training"]) == ["pesc", "pesc-s2", "qlora", "qlora-s2"]


def test_again_it_builds_nothing_from_an_empty_store_it_gives_the_same_numbers_and_one_seed_reruns_alone(recipe, tmp_path):
    assert run(recipe, tmp_path).exit_code == 0
    again = run(recipe, tmp_path)
    assert "0 built" in again.output
    assert run(recipe, tmp_path, out="other", store="empty").exit_code == 0
    first, second = ((tmp_path / folder / "results.json").read_bytes() for folder in ("out", "other"))
    assert first == second
    only = ["run", str(recipe), "--only", "train[qlora-s2]", "--refresh", "train[qlora-s2]", "--store", str(tmp_path / "store")]
    alone = CliRunner().invoke(cli.app, only)
    assert [line.split()[1] for line in alone.output.splitlines() if line.startswith("RUN")] == ["train[qlora-s2]"]
    assert "0 built" in run(recipe, tmp_path).output, "its bytes are the same, so nothing below it runs"


def test_a_seed_without_losses_leaves_the_question_open_and_the_page_says_so(recipe, tmp_path):
    LOST.add("qlora-s2")
    done = run(recipe, tmp_path)
    assert done.exit_code == 1
    text = (tmp_path / "out" / "study.md").read_text()
    assert "Primary question: no answer. pesc against qlora: qlora-s2 has no held-out losses." in text
    rows = {row[0]: row for row in table_of(text, "## What it took")}
    assert (rows["qlora-s2"][1], rows["qlora-s2"][3]) == ("–", "102")


def test_the_page_has_benchmarks_over_all_runs_and_what_the_study_was_built_on(recipe, tmp_path):
    assert run(recipe, tmp_path).exit_code == 0
    text = (tmp_path / "out" / "study.md").read_text()
    hardware = next(iter(Store(tmp_path / "store").manifests())).environment["hardware"]
    assert f"Built on: {hardware['cpu']}." in text
    [pair] = [row for row in table_of(text, "## Benchmarks") if row[0] == "pesc − qlora"]
    assert (pair[2], pair[-1]) == ("2 and 2", "cannot tell")


def test_a_recipe_without_a_question_is_no_study_and_nothing_is_run(recipe, tmp_path):
    done = run(recipe, tmp_path, "report.preregistration=null")
    assert isinstance(done.exception, RecipeError)
    assert "asks no question" in str(done.exception)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_told_before_anything_runs(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(recipe, tmp_path, out="file/sub")
    assert isinstance(done.exception, EvaluationError)
    assert "another directory with --out" in str(done.exception)
    (tmp_path / "mine" / "plots").mkdir(parents=True)
    other = run(recipe, tmp_path, out="mine")
    assert isinstance(other.exception, EvaluationError)
    assert "files that are of no study" in str(other.exception)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_a_study_takes_the_place_of_an_earlier_one_whole_or_not_at_all(recipe, tmp_path, monkeypatch):
    assert run(recipe, tmp_path).exit_code == 0
    out = tmp_path / "out"
    (out / "plots" / "old.png").write_bytes(b"of another arm")
    (out / "mine.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(commands.shutil, "copytree", full)
        done = run(recipe, tmp_path)
    assert isinstance(done.exception, EvaluationError)
    assert "No space left on device" in str(done.exception)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert run(recipe, tmp_path).exit_code == 0
    assert not (out / "plots" / "old.png").exists()
    assert (out / "mine.txt").read_text() == "kept"
    assert not [path.name for path in out.iterdir() if path.name.startswith(".study-")]
