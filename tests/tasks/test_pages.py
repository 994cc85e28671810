"""Pages of the Prefect UI as text: what they say, and that they fit."""

from __future__ import annotations

import json
import re
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client

from pesc.build import Outcome
from pesc.evaluate.training_page import live_markdown
from pesc.run import run_recipe
from pesc.stage import Progress
from tasks.reporting import artifacts, fit, lineage_markdown, progress, publish_fit, publish_note, runs
from tasks.reporting.tables import bytes_text, value_text


@pytest.fixture
def shown(monkeypatch):
    """Key -> text of the pages that were written."""
    pages = {}
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, key, **_: pages.update({key: text}) or uuid4())
    return pages


def test_the_lineage_is_that_of_the_manifests(fakes, store, tiny_recipe):
    outcomes = run_recipe(tiny_recipe(), store)
    manifests = {address: store.manifest(outcome.ref.stage, outcome.ref.fingerprint) for address, outcome in outcomes.items()}
    text = lineage_markdown("tiny", manifests)
    for address, outcome in outcomes.items():
        assert f"| `{address}` | `{outcome.ref.digest[:8]}` |" in text
    labels = dict(re.findall(r'(n\d+)\["([^"]+)"\]', text))
    arrows = {(labels[a], labels[b]) for a, b in re.findall(r"(n\d+) --> (n\d+)", text)}
    assert (f"mix<br/>{outcomes['mix'].ref.digest[:8]}", f"tokenize<br/>{outcomes['tokenize'].ref.digest[:8]}") in arrows
    assert not any(line for line in text.splitlines() if line.startswith("|") and len(line) > 120)


def test_the_fit_is_shown_by_group_for_the_arms_that_are_about_to_run(store, tiny_recipe, tmp_path, shown, monkeypatch):
    llama = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
    }  # fmt: skip
    recipe = tiny_recipe()
    (tmp_path / "sources" / "base" / "config.json").write_text(json.dumps(llama))
    publish_fit(store, recipe, ["train[pesc]"])
    text = shown["fit-tiny"]
    assert "## pesc" in text
    assert "## qlora" not in text
    for group in ("frozen base", "LoRA weights", "bank weights", "optimizer states", "activations", "in all, a GPU"):
        assert f"| {group} |" in text
    assert "has no GPU of a known kind: h200:1 is assumed" in text
    monkeypatch.setattr(fit, "hardware", lambda: {"gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB, 550.1"] * 8})
    publish_fit(store, recipe)
    assert "on 8 x h100" in shown["fit-tiny"]
    assert "## qlora" in shown["fit-tiny"]


def test_a_model_of_an_unknown_shape_has_no_fit_and_no_warning(store, tiny_recipe, shown, caplog):
    publish_fit(store, tiny_recipe())
    assert shown == {}
    assert "WARNING" not in {record.levelname for record in caplog.records}


@pytest.mark.parametrize(("base", "link"), [(None, False), ("https://files.example.org/store/", True)])
def test_the_report_is_a_link_only_where_a_browser_can_follow_it(store, monkeypatch, base, link):
    monkeypatch.delenv("PESC_STORE_URL", raising=False)
    if base:
        monkeypatch.setenv("PESC_STORE_URL", base)
    text = runs.page_markdown(store, "d" * 64)
    assert f"{store.root}/objects/{'d' * 64}/report.html" in text
    assert ("[Open the report with its plots](https://files.example.org/store/objects/" in text) == link
    assert "file:" not in text


def test_values_are_for_reading():
    assert value_text("peak_memory_bytes", 3_478_331_392) == "3.48 GB"
    assert value_text("rows", 312_000) == "312,000"
    assert value_text("seconds", {"index": 0.5, "write": 1}) == "index 0.5, write 1"
    assert value_text("dispatch", []) == "–"
    assert value_text("resumed", False) == "no"
    assert value_text("arms", ["pesc", "qlora"]) == "pesc, qlora"
    assert len(value_text("log", "x" * 9999)) == 300
    assert [bytes_text(n) for n in (999, 1200, 90_900_000, 1.2e12)] == ["999 bytes", "1.2 kB", "90.9 MB", "1,200 GB"]


def test_a_note_of_long_lines_keeps_to_its_column(shown):
    publish_note("store-gc", "Would free 3 MB", [f"actions/mix/{'f' * 64}", "```"])
    assert shown["store-gc"].count("```") == 2
    publish_note("store-gc", "Nothing", [])
    assert "Nothing to list." in shown["store-gc"]


def events(path, steps):
    lines = [{"event": "start"}]
    for step in range(steps):
        lines.append({"event": "evaluation", "step": step, "domains": {"code": {"loss": 2.0 - step / steps, "tokens": 3}}})
        lines.append({"event": "step", "step": step + 1, "loss": 3.0, "tokens_per_second": 10.0, "experts": {"max": [0.5], "min": [0.1]}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')


def test_a_training_that_is_under_way_has_its_curves(tmp_path):
    path = tmp_path / "events.jsonl"
    assert live_markdown("Training", path, "0/9 steps") is None
    events(path, 9)
    text = live_markdown("Training", path, "9/200 steps  loss 3")
    assert "Under way: 9/200 steps  loss 3" in text
    assert "| steps | 9 |" in text
    assert "| code | 2.0000 | 1.1111 |" in text
    assert text.count("data:image/svg+xml") == 2
    events(path, 5000)
    long = live_markdown("Training", path, "")
    assert "| steps | 5,000 |" in long
    assert len(long) < 8 * len(text), "a long training is drawn as coarsely as a short one"


def test_the_curves_are_drawn_now_and_then_on_one_page_and_finished_there(fakes, store, tiny_recipe, monkeypatch):
    """The page of a run is rewritten, so that it is one version of its key."""
    from pesc.build import make_job
    from pesc.pipeline import build_graph

    recipe = tiny_recipe()
    refs = {address: outcome.ref for address, outcome in run_recipe(recipe, store).items()}
    job = make_job(build_graph(recipe).by_address["train[pesc]"], recipe, refs)
    written, clock = [], [0.0]
    monkeypatch.setattr(progress, "write_progress", lambda *_: UUID(int=1))
    monkeypatch.setattr(progress, "move_progress", lambda *_: None)
    monkeypatch.setattr(progress, "write_markdown", lambda key, text, said: written.append(("new", key, said)) or UUID(int=2))
    monkeypatch.setattr(progress, "rewrite_markdown", lambda page, text, said: written.append(("again", page, said)))
    work = store.workspace_path("train", job.fingerprint)
    work.mkdir(parents=True)
    events(work / "events.jsonl", 3)
    import logging

    report = progress.ProgressReport(job, logging.getLogger("x"), lambda: clock[0], store)
    for second in range(0, 100, 5):
        clock[0] = float(second)
        report(Progress(second, 100))
    assert [entry[0] for entry in written] == ["new", "again", "again"]
    assert written[0][1:] == ("training-train-pesc-tiny", "Training: train[pesc] of tiny, under way: 30 of 100 steps")
    report = progress.ProgressReport(replace_stage(job), logging.getLogger("x"), lambda: clock[0], store)
    clock[0] = 1000.0
    report(Progress(1, 100))
    assert len(written) == 3, "other stages have no curves"


def replace_stage(job):
    return job.model_copy(update={"key": job.key.model_copy(update={"stage": "merge"})})


@pytest.mark.usefixtures("prefect_server")
def test_the_last_words_are_written_on_the_page_that_the_run_has_begun():
    from tests.flows import observe

    @flow
    def train():
        page = artifacts.write_markdown("training-x", "half", "under way")
        artifacts.rewrite_markdown(page, "more", "under way")
        artifacts.finish_markdown("training-x", "all of it", "done")
        artifacts.finish_markdown("training-y", "at once", "done")
        artifacts.tag_run("recipe:x")
        from prefect.runtime import flow_run

        return flow_run.get_id()

    run = train()
    assert observe.artifacts(UUID(run)) == {"training-x": "all of it", "training-y": "at once"}
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(UUID(run)).tags == ["recipe:x"]
        events_of = client.request("POST", "/events/filter", json={"limit": 50}).json()["events"]
    assert not any(event["event"] == "prefect.artifact.updated" for event in events_of), "an event would hold the page once more"


def test_what_an_outcome_says_of_an_object_that_is_gone_is_a_warning(store, caplog):
    from pesc.store import ArtifactRef
    from tasks.reporting import publish_result

    ref = ArtifactRef(stage="mix", fingerprint="f" * 64, digest="d" * 64, size_bytes=1)
    publish_result(store, Outcome("mix", ref, "built", 1.0))
    assert "mix has no manifest" in caplog.text
