"""Each benchmark over the runs of a recipe, from the store's own records."""

from __future__ import annotations

import base64
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from pesc import pipeline
from pesc.evaluate.history import benchmark_markdown, history_markdown, history_rows, read_history
from pesc.evaluate.results import write_results
from pesc.plan import Selection
from pesc.run import run_recipe
from pesc.stage import BuildResult, StageContext
from tests.evaluate.builders import make_result, make_samples

SCORE: list[int] = []


def build_evaluation(ctx: StageContext) -> BuildResult:
    """A score that is the seed, or SCORE where that is set: so many of 100 right."""
    right = (SCORE or [ctx.config.seed])[0]
    correct = [1] * right + [0] * (100 - right)
    write_results(ctx.out, make_result(correct, task=ctx.config.task, settings=ctx.config), make_samples(correct, ctx.config.task))
    return BuildResult()


@pytest.fixture
def score(tiny_recipe, fakes, store, monkeypatch):
    """Runs the recipe up to its benchmarks with a given score of the arm pesc's and qlora's quiz."""
    original = next(stage for stage in pipeline.STAGES if stage.name == "evaluate")
    monkeypatch.setitem(
        pipeline._BY_NAME, "evaluate", replace(original, builder=f"{__name__}:build_evaluation", isolated=False, preflight="")
    )

    def run(seed: int, **selection):
        selected = Selection(**{"until": ("evaluate",), **selection})
        return run_recipe(tiny_recipe(evaluate={"benchmarks": {"quiz": {"seed": seed}}}), store, selected)

    return run


def test_a_run_that_finds_the_result_is_a_point_as_one_that_computes_it(score, store):
    outcomes = [score(seed) for seed in (40, 40, 55)]
    assert [outcome["evaluate[pesc/quiz]"].how for outcome in outcomes] == ["built", "hit", "built"]
    history = read_history(store, "tiny")
    assert list(history) == ["evaluate[pesc/quiz]", "evaluate[qlora/quiz]"]
    points = history["evaluate[pesc/quiz]"]
    assert [point.value for point in points] == pytest.approx([40, 40, 55])
    assert points[0].time < points[1].time < points[2].time
    assert [point.digest for point in points] == [outcome["evaluate[pesc/quiz]"].ref.digest for outcome in outcomes]
    assert [point.changed for point in points] == [(), (), ("config.seed 40 → 55",)]
    assert (points[0].low, points[0].high) == pytest.approx((30.94, 49.80), abs=0.01), "Wilson's interval of 40 of 100"


def test_a_benchmark_that_ran_alone_before_the_others_does_not_come_first(score, store):
    score(40, until=("evaluate[qlora]",))
    score(40)
    assert list(read_history(store, "tiny")) == ["evaluate[pesc/quiz]", "evaluate[qlora/quiz]"]


def test_a_refresh_does_not_rewrite_the_history(score, store, monkeypatch):
    """A benchmark that is not deterministic, or other hardware: the same key gives other numbers."""
    first = score(40)["evaluate[pesc/quiz]"].ref
    monkeypatch.setattr(f"{__name__}.SCORE", [47])
    second = score(40, refresh=("evaluate",))["evaluate[pesc/quiz]"].ref
    assert first.fingerprint == second.fingerprint
    points = read_history(store, "tiny")["evaluate[pesc/quiz]"]
    assert [point.value for point in points] == pytest.approx([40, 47])
    assert [point.digest for point in points] == [first.digest, second.digest]
    assert [point.changed for point in points] == [(), ("made again, with another result",)]
    shutil.rmtree(store.object_path(first.digest))
    assert [point.value for point in read_history(store, "tiny")["evaluate[pesc/quiz]"]] == pytest.approx([47]), "gone, not replaced"


def test_a_record_of_an_earlier_version_has_no_digests(score, store):
    score(40)
    shutil.rmtree(store.root / "runs" / "tiny" / "objects")
    assert [point.value for point in read_history(store, "tiny")["evaluate[pesc/quiz]"]] == pytest.approx([40])


def test_a_removed_object_or_a_torn_record_costs_its_points_only(score, store):
    first, _ = score(40), score(60)
    shutil.rmtree(store.object_path(first["evaluate[qlora/quiz]"].ref.digest))
    (store.root / "runs" / "tiny" / "20260101T000000000000.json").write_text('{"evaluate[pes')
    (store.root / "runs" / "tiny" / "notes.json").write_text("{}")
    history = read_history(store, "tiny")
    assert [point.value for point in history["evaluate[qlora/quiz]"]] == pytest.approx([60])
    assert read_history(store, "another") == {}


def test_the_page_has_a_line_a_benchmark_and_says_what_changed(score, store):
    for seed in (40, 40, 55):
        score(seed)
    history = read_history(store, "tiny")
    text = history_markdown("tiny", history)
    [picture] = re.findall(r"!\[quiz over the runs\]\(data:image/svg\+xml;base64,([^)]+)\)", text)
    assert ElementTree.fromstring(base64.b64decode(picture)).tag.endswith("svg")
    lines = [line for line in text.splitlines() if line.startswith("| 20")]
    assert ["55.0" in line for line in lines[:3]] == [True, False, False]
    assert "config.seed 40 → 55" in lines[0]
    assert "same result" in lines[1]
    assert "first run" in lines[2]
    rows = history_rows(history)
    assert [row["score"] for row in rows if row["benchmark"] == "pesc/quiz"] == [
        "55.0 [45.2, 64.4]",
        "40.0 [30.9, 49.8]",
        "40.0 [30.9, 49.8]",
    ]
    assert max(len(" ".join(map(str, row.values()))) for row in rows) < 90, "a row fits the UI's column"
    alone = benchmark_markdown("evaluate[pesc/quiz]", "tiny", history["evaluate[pesc/quiz]"])
    assert alone.startswith("# evaluate[pesc/quiz] of tiny\n\n**55.0 [45.2, 64.4]** acc")
    assert f"`pesc reproduce {history['evaluate[pesc/quiz]'][-1].digest[:12]}`" in alone
