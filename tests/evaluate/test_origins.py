"""Every number of the report can be followed to an object, its manifest, and the command that makes it again."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from pesc import pipeline
from pesc.errors import EvaluationError, HolesError, StoreError
from pesc.evaluate.origins import evaluation, find_holes, find_origins, origin_id
from pesc.evaluate.records import parse_address
from pesc.evaluate.results import ModelFacts, write_results
from pesc.reproduce import find_manifest, reproduce, verdict
from pesc.run import run_recipe
from pesc.stage import BuildResult, StageContext
from tests.evaluate.builders import make_result, make_samples

ANSWERS = {
    "pesc/quiz": [1] * 31 + [0] * 9, "qlora/quiz": [1] * 20 + [0] * 20, "pesc/exam": [0, 1] * 15, "qlora/exam": [1, 1, 0] * 10,
}  # fmt: skip
DIES: set[str] = set()


def build_evaluation(ctx: StageContext) -> BuildResult:
    """Real results and samples with the answers above."""
    instance = parse_address(ctx.address)[1]
    if instance in DIES:
        raise EvaluationError(f"{ctx.address}: the model's logits of item 7 are not finite. Set dtype=float32.")
    sparse = instance.startswith("pesc")
    block = {"num_experts": 4, "top_k": 2, "adapter_dim": 8} if sparse else None
    model = ModelFacts(kind="pesc" if sparse else "dense", model_type="llama", parameters=1000, pesc=block)
    correct = ANSWERS[instance]
    result = make_result(correct, task=ctx.config.task, model=model, settings=ctx.config)
    write_results(ctx.out, result, make_samples(correct, ctx.config.task))
    return BuildResult(metrics={"seconds": 1.5})


def build_training(ctx: StageContext) -> BuildResult:
    """The record of a training."""
    record = {"config": {"method": "qlora"}, "trainable": [], "facts": {"steps": 3, "tokens": 3000, "loss_first": 2.0, "loss_last": 1.5}}
    (ctx.out / "training.json").write_text(json.dumps(record))
    (ctx.out / "data.json").write_text('"trained"')
    return BuildResult()


@pytest.fixture
def recipe(tiny_recipe, fakes, monkeypatch):
    """A recipe of two arms and two benchmarks: real evaluate objects, a real report, fakes for the rest."""
    DIES.clear()
    original = {stage.name: stage for stage in pipeline.STAGES}
    for name, builder in (("evaluate", build_evaluation), ("train", build_training)):
        stage = replace(original[name], builder=f"{__name__}:{builder.__name__}", isolated=False, preflight="")
        monkeypatch.setitem(pipeline._BY_NAME, name, stage)
    monkeypatch.setitem(pipeline._BY_NAME, "report", original["report"])
    benchmarks = {"quiz": {"task": "arc_easy", "metric": "acc"}, "exam": {"task": "arc_challenge", "metric": "acc"}}
    return tiny_recipe(evaluate={"benchmarks": benchmarks}, report={"control_arm": "qlora"})


class _Page(HTMLParser):
    """Text of each table cell, card and note with the addresses that it says it comes from; anchors and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[tuple[str, str, str]] = []
        self.rows: dict[str, str] = {}
        self.links: list[tuple[str, str]] = []
        self._open: list[tuple[str, str, str]] = []
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "h2":
            self._section = found.get("id", "")
        if "data-object" in found:
            self.rows[found["id"]] = found["data-object"]
        if tag == "a" and found.get("class") == "from":
            self.links.append((found["href"], ""))
        if tag not in {"meta", "link", "br", "img", "hr"}:
            self._open.append((tag, found.get("data-from", ""), found.get("class", "")))

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        tags = [tag for tag, _, _ in self._open]
        if self.links and "a" in tags and self._open[-1][2] == "from":
            self.links[-1] = (self.links[-1][0], data)
        shown = "td" in tags or any(kind in {"card", "hole"} for _, _, kind in self._open)
        if shown and re.search(r"\d", data) and "svg" not in tags:
            self.cells.append((self._section, data.strip(), next((origin for _, origin, _ in reversed(self._open) if origin), "")))


def wilson(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson 1927, as the root of (p - x)^2 = z^2 x (1 - x) / n."""
    p, a = correct / total, 1 + z * z / total
    b, c = 2 * p + z * z / total, p * p
    root = math.sqrt(b * b - 4 * a * c)
    return 100 * (b - root) / (2 * a), 100 * (b + root) / (2 * a)


def test_every_number_traces_to_an_object_in_a_manifest_and_is_what_its_samples_say(recipe, store):
    outcomes = run_recipe(recipe, store)
    place = store.open(outcomes["report"].ref)
    results = json.loads((place / "results.json").read_text())
    origins = {entry["address"]: entry for entry in results["origins"]}
    manifests = {m.output.digest: m for m in store.manifests()}
    for address, entry in origins.items():
        assert manifests[entry["object"]].key.stage == parse_address(address)[0]
        assert entry["object"] == outcomes[address].ref.digest

    def scores(arm, benchmark):
        folder = store.object_path(origins[f"evaluate[{arm}/{benchmark}]"]["object"])
        return [json.loads(line)["score"] for line in (folder / "samples.jsonl").read_text().splitlines()]

    for cell in results["comparison"]["cells"]:
        found = scores(cell["arm"], cell["benchmark"])
        assert cell["value"] == pytest.approx(100 * sum(found) / len(found), abs=1e-4)
        assert (cell["low"], cell["high"]) == pytest.approx(wilson(sum(found), len(found)), abs=1e-3)
        assert cell["num_items"] == len(found)
    assert len(results["comparison"]["cells"]) == 4
    for pair in results["comparison"]["paired"]:
        ours, theirs = (scores(arm, pair["benchmark"]) for arm in (pair["arm"], pair["control"]))
        assert pair["difference"] == pytest.approx(100 * (sum(ours) - sum(theirs)) / len(ours), abs=1e-4)
        assert pair["only_arm"] == sum(a > b for a, b in zip(ours, theirs, strict=True))
    assert len(results["comparison"]["paired"]) == 2

    page = _Page((place / "report.html").read_text())
    assert page.rows == {entry["id"]: entry["object"] for entry in results["origins"]}
    untraced = [cell for cell in page.cells if cell[0] != "origins" and not (cell[2] and set(cell[2].split()) <= set(origins))]
    assert untraced == []
    assert {section for section, _, _ in page.cells} >= {"results", "paired", "published", "training", "settings", "origins"}
    shown = {(href, text) for href, text in page.links}
    cells = results["comparison"]["cells"]
    assert shown == {("#" + origin_id(evaluation(cell["arm"], cell["benchmark"])), f"{cell['value']:.1f}") for cell in cells}
    markdown = (place / "report.md").read_text()
    assert f"| evaluate[pesc/quiz] | {origins['evaluate[pesc/quiz]']['object'][:12]} |" in markdown


def test_the_command_beside_a_number_builds_the_same_bytes_again_and_leaves_the_store_as_it_was(recipe, store, monkeypatch):
    outcomes = run_recipe(recipe, store)
    results = json.loads((store.open(outcomes["report"].ref) / "results.json").read_text())
    before = sorted(path for path in store.root.rglob("*") if path.name != "manifest.json")
    for entry in results["origins"]:
        name = entry["command"].removeprefix("pesc reproduce ")
        found = reproduce(store, find_manifest(store, name))
        assert found.is_same, entry["address"]
        assert "the same" in verdict(found)
    found = reproduce(store, find_manifest(store, outcomes["report"].ref.fingerprint))
    assert found.is_same
    assert sorted(path for path in store.root.rglob("*") if path.name != "manifest.json") == before
    monkeypatch.setitem(ANSWERS, "pesc/quiz", [1] * 40)
    found = reproduce(store, find_manifest(store, outcomes["evaluate[pesc/quiz]"].ref.digest[:12]))
    assert not found.is_same
    assert found.differing == ("results.json", "samples.jsonl")
    assert "2 of its files differ (results.json, samples.jsonl)" in verdict(found)


def test_a_name_that_no_result_has_or_a_lost_input_is_a_sentence(recipe, store):
    import shutil

    outcomes = run_recipe(recipe, store)
    with pytest.raises(StoreError, match="at least 6 digits"):
        find_manifest(store, "3f2a")
    with pytest.raises(StoreError, match=r"No result in .* starts with 'zzzzzzzz'"):
        find_manifest(store, "zzzzzzzz")
    manifest = find_manifest(store, outcomes["evaluate[pesc/quiz]"].ref.fingerprint)
    shutil.rmtree(store.object_path(outcomes["merge[pesc]"].ref.digest))
    with pytest.raises(StoreError, match=r"was made from model, whose object is no longer"):
        reproduce(store, manifest)


def test_a_hole_is_shown_as_a_hole_in_every_view_and_filled_by_the_next_run(recipe, store):
    DIES.update({"pesc/quiz"})
    with pytest.raises(HolesError, match=r"evaluate\[pesc/quiz\]: .* logits of item 7 are not finite") as caught:
        run_recipe(recipe, store)
    place = store.open(caught.value.finished["report"].ref)
    results = json.loads((place / "results.json").read_text())
    assert results["holes"] == [{"address": "evaluate[pesc/quiz]", "arm": "pesc", "benchmark": "quiz"}]
    sentence = "1 of 4 measurements have no result, because the benchmark did not finish: pesc on ARC-Easy."
    page, markdown = (place / "report.html").read_text(), (place / "report.md").read_text()
    assert sentence in page
    assert markdown.split("\n\n")[1].startswith(f"**{sentence}")
    assert page.count('<span class="missing">no result</span>') == 1
    assert "31 of 40" not in page
    DIES.clear()
    filled = store.open(run_recipe(recipe, store)["report"].ref)
    assert "no result" not in (filled / "report.html").read_text()
    assert json.loads((filled / "results.json").read_text())["holes"] == []


def test_a_benchmark_that_no_arm_finished_still_has_its_row(recipe, store):
    DIES.update({"pesc/exam", "qlora/exam"})
    with pytest.raises(HolesError) as caught:
        run_recipe(recipe, store)
    page = (store.open(caught.value.finished["report"].ref) / "report.html").read_text()
    assert page.count('<span class="missing">no result</span>') == 2
    assert "not finished for any arm" in page


def test_origins_are_in_reading_order_with_ids_of_their_own():
    digests = {"dedup": "d" * 64, "train[a]": "c" * 64, "evaluate[a/x.y]": "b" * 64, "evaluate[a/b_c]": "a" * 64}
    found = find_origins(digests, {"b_c": "BC"})
    assert [entry["address"] for entry in found] == ["evaluate[a/b_c]", "evaluate[a/x.y]", "train[a]", "dedup"]
    assert found[0]["gives"].startswith("scores, intervals, pairs and verdicts of a on BC")
    assert found[0]["command"] == "pesc reproduce " + "a" * 12
    assert all(first["id"] != second["id"] for first, second in pairwise(found))
    assert find_holes(["evaluate[a/x]", "evaluate[b/x]"], [("b", "x")]) == [{"address": "evaluate[a/x]", "arm": "a", "benchmark": "x"}]
