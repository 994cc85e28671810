"""What the Prefect UI is shown."""

import logging
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.build import make_job
from pesc.pipeline import build_graph
from pesc.plan import Selection, make_plan
from pesc.recipe import recipe_from_dict
from pesc.run import run_recipe
from pesc.stage import Progress
from tasks import reporting
from tasks.reporting import artifacts
from tests.data.card_recipe import small_recipe


@given(st.lists(st.text(), min_size=1))
def test_keys_are_what_prefect_accepts(parts):
    key = reporting.artifact_key("plan", *parts)
    assert key.startswith("plan")
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert "--" not in key
    assert not key.endswith("-")


def test_a_key_names_its_action():
    assert reporting.artifact_key("evaluate[pesc/mmlu]", "camelidae-8x7b") == "evaluate-pesc-mmlu-camelidae-8x7b"


@given(st.lists(st.lists(st.text(alphabet="a|\n `"), min_size=2, max_size=2), max_size=4))
def test_a_table_has_one_line_a_row_whatever_the_cells_hold(rows):
    lines = reporting.markdown_table(["a", "b"], rows).split("\n")
    assert len(lines) == 2 + len(rows)
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)


def test_the_plan_shows_the_reason_and_marks_what_runs(fakes, store, tiny_recipe):
    run_recipe(tiny_recipe(), store)
    recipe = tiny_recipe(dedup={"near_duplicate_threshold": 0.7})
    text = reporting.plan_markdown(make_plan(recipe, store, Selection(until=("mix",))), build_graph(recipe))
    assert "| **RUN** | `dedup` | config.near_duplicate_threshold 0.8 → 0.7 |" in text
    assert '["dedup"]:::run' in text
    assert '["download[rows]"]\n' in text
    assert "train[pesc]" not in text


def test_a_result_shows_its_settings_and_measurements(fakes, store, tiny_recipe):
    outcome = run_recipe(tiny_recipe(), store)["train[pesc]"]
    text = reporting.result_markdown(store, store.manifest("train", outcome.ref.fingerprint))
    assert text.startswith("# train[pesc] of tiny")
    assert "learning_rate: 0.0002" in text
    assert "| rows | 2 |" in text
    assert outcome.ref.fingerprint in text


@pytest.fixture
def progress(fakes, tiny_recipe, monkeypatch, caplog):
    """A progress report on a clock of its own; `shown` collects what the UI gets."""
    recipe, clock, shown = tiny_recipe(), [0.0], []
    job = make_job(build_graph(recipe).by_address["download[base]"], recipe, {})
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda percent, **_: shown.append(percent) or uuid4())
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _id, percent, **_: shown.append(percent))
    caplog.set_level(logging.INFO)
    return reporting.ProgressReport(job, logging.getLogger("progress"), lambda: clock[0]), clock, shown


def test_progress_is_shown_now_and_then_and_at_the_end(progress, caplog):
    report, clock, shown = progress
    for second in range(41):
        clock[0] = float(second)
        report(Progress(second, 40, "steps", fields={"loss": 1.93}))
    assert shown == [25.0, 50.0, 75.0, 100.0]
    assert [record.getMessage() for record in caplog.records] == ["30/40 steps  loss 1.93"]


def test_a_short_stage_has_no_progress_artifact(progress):
    report, _, shown = progress
    for done in range(100):
        report(Progress(done + 1, 100))
    assert shown == []


def test_a_server_that_is_away_costs_a_view_and_no_run(progress, monkeypatch, caplog):
    report, clock, _ = progress

    def away(*_args, **_kwargs):
        raise ConnectionError("no server")

    monkeypatch.setattr(artifacts, "create_progress_artifact", away)
    clock[0] = 11.0
    report(Progress(1, 2))
    assert "no server" in caplog.text


def test_a_cancellation_passes_through_a_view(progress, monkeypatch):
    from prefect.exceptions import TerminationSignal

    report, clock, _ = progress

    def cancelled(*_args, **_kwargs):
        raise TerminationSignal(signal=15)

    monkeypatch.setattr(artifacts, "create_progress_artifact", cancelled)
    clock[0] = 11.0
    with pytest.raises(TerminationSignal):
        report(Progress(1, 2))


def test_the_data_card_is_published_as_markdown(store, tmp_path, monkeypatch):
    recipe = recipe_from_dict(small_recipe(tmp_path / "sources", ["Why is the sky blue?", "Name a moon of Jupiter."]))
    run_recipe(recipe, store, Selection(until=("mix",)))
    shown = {}
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, key, **_: shown.update({key: text}) or uuid4())
    reporting.publish_card(store, recipe)
    assert list(shown) == ["data-card-small"]
    assert "## The mixture" in shown["data-card-small"]
    assert "| tokenize | never built" in shown["data-card-small"]


def test_a_data_card_that_cannot_be_made_is_a_warning(store, tiny_recipe, caplog):
    reporting.publish_card(store, tiny_recipe())
    assert "Nothing is built of the data of recipe 'tiny'" in caplog.text
