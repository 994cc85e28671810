"""The Prefect UI as somebody sees it: the form, the graph, every kind of artifact, the history; a run started and another cancelled by clicks.

PESC_TEST_PICTURES=/tmp/pictures pytest -m long tests/ui       # and then look at the pictures
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deployments.servers import wait_for
from tests.ui.browser import Browser
from tests.ui.conftest import Stage

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]
KINDS = {
    "plan-small": "What", "lineage-small": "What came from what", "fit-small": "does it fit", "run-small": "built", "cost-small": "together",
    "data-card-small": "From rows read to rows kept", "dedup-small": "Measured", "train-pesc-small": "Measured", "training-train-pesc-small": "Held-out loss",
    "routing-pesc-experts-small": "busiest", "benchmarks-small": "Against the control", "page-small": "report.html", "history-small": "over its runs",
    "history-table-small": "pesc/quiz", "benchmark-pesc-quiz-small": "40.0",
}  # fmt: skip
"""Key of an artifact -> words on its page."""


def test_the_form_has_our_words_and_starts_a_run(stage: Stage, browser: Browser):
    page = browser.open(f"/deployments/deployment/{stage.deployment('pipeline')}/run", "Parameters")
    page.get_by_text("A shipped recipe's name, or the path of a YAML file on the worker.").wait_for()
    browser.picture("form")
    page.get_by_role("tab", name="RecipeSettings").click()
    page.get_by_text("Settings of the recipe to change; what is left out stays as it is.").wait_for()
    page.get_by_role("tab", name="TrainSettings").click()
    page.get_by_text("A longer gradient is cut to this length. Where a recipe says nothing: 0.3.").wait_for()
    assert page.get_by_text("Field (Optional)").count() == 0, "every setting has its name"
    browser.picture("form-settings")
    page.get_by_role("tab", name="None").nth(page.get_by_role("tab", name="None").count() - 1).wait_for()
    browser.open(f"/deployments/deployment/{stage.deployment('evaluate')}/run", "Parameters")
    before = runs(stage)
    page.get_by_role("tab", name="str").first.click()
    page.locator("textarea").nth(1).fill("base/quiz")
    page.get_by_role("switch").nth(1).click()  # build_missing
    submit(page)
    [started] = wait_for(lambda: runs(stage) - before, 60, "a run of the form")
    run = stage.end(started)
    assert run["parameters"]["instance"] == "base/quiz"
    assert run["parameters"]["build_missing"] is True
    assert run["name"].startswith("evaluate[base/quiz] small")
    assert {"pesc", "recipe:small"} <= set(run["tags"])


def submit(page) -> None:
    """Press Submit; again, as a user would, where Prefect's SQLite was locked by its own services at that moment (status 503, a notice in the UI)."""
    for _ in range(5):
        with page.expect_response(lambda response: response.url.endswith("/create_flow_run")) as answer:
            page.get_by_role("button", name="Submit").click()
        if answer.value.status != 503:
            return
        page.wait_for_timeout(1000)
    raise AssertionError("the server said five times that it is busy")


def runs(stage: Stage) -> set[str]:
    return {run["id"] for run in stage.server.post("flow_runs/filter", {})}


def test_every_kind_of_artifact_is_legible(stage: Stage, browser: Browser, first_run: str):
    found, faults = stage.artifacts(first_run), {}
    assert set(KINDS) <= set(found)
    for key, words in KINDS.items():
        faults[key] = browser.artifact(found[key]["id"], words)
        browser.picture(f"artifact-{key}")
    assert {key: said for key, said in faults.items() if said} == {}


@pytest.mark.parametrize(("key", "boxes"), [("plan-small", 15), ("lineage-small", 15)])
def test_the_graphs_are_drawn_large_enough_to_be_read(stage: Stage, browser: Browser, first_run: str, key: str, boxes: int):
    browser.artifact(stage.artifacts(first_run)[key]["id"])
    nodes = browser.page.locator(".prose svg .node")
    nodes.nth(boxes - 1).wait_for()
    assert nodes.count() == boxes
    size = browser.page.evaluate(
        "() => { const n = document.querySelector('.prose svg .node').getBoundingClientRect(); return [n.width, n.height]; }"
    )
    assert min(size[0] / 60, size[1] / 20) > 1, size


def test_the_graph_of_a_run_shows_its_tasks(stage: Stage, browser: Browser, first_run: str):
    from PIL import Image

    page = browser.open(f"/runs/flow-run/{first_run}", "Task Runs")
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(3000)
    path = browser.picture("flow-graph")
    box = page.locator("canvas").first.bounding_box()
    picture = (
        Image.open(path).convert("RGB").crop((int(box["x"]), int(box["y"]), int(box["x"] + box["width"]), int(box["y"] + box["height"])))
    )
    green = sum(count for count, (red, g, blue) in picture.getcolors(1 << 24) if g > red + 40 and g > blue + 40)
    assert green > 300, "the bars of finished tasks"


@pytest.mark.timeout(1800)
def test_one_scheduled_run_after_another_is_a_history(stage: Stage, browser: Browser, first_run: str):
    stage.scores.write_text("[44, 44, 52, 52, 47, 47]")
    deployment = stage.deployment("pipeline")
    schedule = {"schedule": {"interval": 20}, "active": True, "slug": "soon", "parameters": {"refresh": ["evaluate[pesc]"]}}
    one_at_a_time = {"concurrency_limit": 1, "concurrency_options": {"collision_strategy": "CANCEL_NEW"}}
    stage.server.patch(f"deployments/{deployment}", one_at_a_time)
    [made] = stage.server.post(f"deployments/{deployment}/schedules", [schedule])
    wanted = {"flow_runs": {"tags": {"all_": ["auto-scheduled"]}, "state": {"type": {"any_": ["COMPLETED"]}}}}
    done = wait_for(lambda: len(found := stage.server.post("flow_runs/filter", wanted)) >= 3 and found, 1500, "three scheduled runs")
    stage.server.patch(f"deployments/{deployment}/schedules/{made['id']}", {"active": False})
    stage.server.patch(f"deployments/{deployment}", {"concurrency_limit": None})
    newest = max(done, key=lambda run: run["start_time"])
    found = stage.artifacts(newest["id"])
    assert browser.artifact(found["history-small"]["id"], "over its runs") == []
    table = next(text for text in browser.page.locator(".prose table").all_inner_texts() if "run of pesc" in text)
    for score in ("44.0", "52.0", "47.0", "40.0"):
        assert score in table, "one that a later refresh has replaced is there too"
    assert "made again, with another result" in table
    browser.picture("history-of-scheduled-runs")
    browser.open("/artifacts/key/benchmark-pesc-quiz-small", "benchmark-pesc-quiz-small")
    versions = stage.server.post("artifacts/filter", {"artifacts": {"key": {"any_": ["benchmark-pesc-quiz-small"]}}})
    assert len(versions) >= 4, "a version a run"
    browser.settle()
    browser.picture("history-of-one-benchmark")


def test_a_training_is_seen_while_it_runs_and_cancelled_by_clicks(stage: Stage, browser: Browser, first_run: str):
    run = stage.submit("train", {"PESC_TEST_STEP_SECONDS": "8"}, instance="qlora", refresh=True)
    keys = {"progress-train-qlora-small", "training-train-qlora-small"}
    found = wait_for(lambda: keys <= set(there := stage.artifacts(run)) and there, 180, "its bar and its curves")
    assert "under way" in found["training-train-qlora-small"]["description"]
    assert browser.artifact(found["training-train-qlora-small"]["id"], "Under way") == []
    browser.picture("live-training")
    browser.open(f"/artifacts/artifact/{found['progress-train-qlora-small']['id']}", "steps")
    browser.picture("live-progress")
    page = browser.open(f"/runs/flow-run/{run}", "Task Runs")
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name="Cancel").click()
    page.get_by_role("alertdialog").get_by_role("button", name="Cancel Flow Run").click()
    stage.end(run, "CANCELLED", 120)
    page.get_by_text("Cancelled", exact=True).first.wait_for()
    browser.picture("cancelled-run")
    mine = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_DESC"}
    wait_for(
        lambda: any("run it again to go on" in line["message"] for line in stage.server.post("logs/filter", mine)), 120, "its last line"
    )
    again = stage.submit("train", instance="qlora")
    stage.end(again)


def test_a_failed_run_says_what_to_do(stage: Stage, browser: Browser, first_run: str):
    stage.fail.write_text("")
    try:
        run = stage.end(stage.submit("pipeline", refresh=["upcycle[pesc]"]), "FAILED")
    finally:
        stage.fail.unlink()
    assert (
        "model-00002.safetensors ends after 3 of 9 MB. Download it again: pesc run RECIPE --refresh download[base]."
        in run["state"]["message"]
    )
    page = browser.open(f"/runs/flow-run/{run['id']}?tab=Details", "Task Runs")
    page.get_by_text("Download it again").first.wait_for()
    browser.picture("failed-run")


@pytest.mark.parametrize("flow", ["gc", "fsck"])
def test_the_care_of_the_store_has_a_page(stage: Stage, browser: Browser, first_run: str, flow: str):
    run = stage.submit(flow)
    stage.end(run)
    found = stage.artifacts(run)[f"store-{flow}"]
    assert browser.artifact(found["id"]) == []
    browser.picture(f"store-{flow}")


def test_the_report_is_a_link_where_the_store_is_served(stage: Stage, browser: Browser, first_run: str):
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(stage.store))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        run = stage.submit("pipeline", {"PESC_STORE_URL": f"http://127.0.0.1:{files.server_port}"})
        stage.end(run)
        assert browser.artifact(stage.artifacts(run)["page-small"]["id"], "Open the report") == []
        browser.page.get_by_role("link", name="Open the report with its plots").click()
        page = wait_for(lambda: next((p for p in browser.page.context.pages if p.url.endswith("report.html")), None), 60, "the report")
        page.get_by_text("pesc").first.wait_for()
        assert page.locator("svg").count() > 2
        page.screenshot(path=browser.pictures / "report-behind-the-link.png")
        files.shutdown()


def test_a_broken_page_is_found(stage: Stage, browser: Browser, first_run: str):
    """The looks can fail: a wide table, raw markdown, a picture that is none."""
    table = f"| a | b |\n|---|---|\n| {'w' * 200} | 2 |"
    parts = ["# x", table, "<p>**raw**</p>", "![gone](data:image/svg+xml;base64,AAAA)", '```mermaid\ngraph TB\n n0["\n```']
    text = "\n\n".join(parts)
    made = stage.server.post("artifacts/", {"key": "broken", "type": "markdown", "data": text})
    faults = browser.artifact(made["id"])
    assert [any(word in fault for fault in faults) for word in ("too wide", "raw markdown", "broken picture", "not drawn")] == [True] * 4, (
        faults
    )


def test_the_pictures_lie_where_they_were_asked_for(browser: Browser, tmp_path: Path):
    assert not any(path.is_relative_to(Path(__file__).resolve().parents[2]) for path in browser.pictures.glob("*.png"))
