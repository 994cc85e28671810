"""One scheduled run after another, as the Prefect server keeps it."""

from dataclasses import replace

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey, ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows import stages
from flows.pipeline import pipeline
from pesc import pipeline as table

pytestmark = pytest.mark.usefixtures("prefect_server")


def versions(key: str) -> list[str]:
    """Texts of a key's artifacts, in the order in which they were made."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.UPDATED_DESC)
    return [str(artifact.data) for artifact in sorted(found, key=lambda artifact: str(artifact.created))]


def latest(key: str) -> str:
    """What the UI shows first."""
    with get_client(sync_client=True) as client:
        [found] = client.read_latest_artifacts(artifact_filter=ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[key])))
    return str(found.data)


def test_two_runs_give_two_versions_of_each_benchmark_and_a_line_through_both(recipe_file, store, monkeypatch):
    original = next(stage for stage in table.STAGES if stage.name == "evaluate")
    fake = replace(original, builder="tests.evaluate.test_history:build_evaluation", isolated=False, preflight="")
    monkeypatch.setitem(table._BY_NAME, "evaluate", fake)
    key = "benchmark-pesc-quiz-tiny"
    for seed in (40, 55):
        pipeline(recipe=recipe_file, store=str(store.root), until=["evaluate"], overrides=[f"evaluate.benchmarks.quiz.seed={seed}"])
    first, second = versions(key)
    assert "**40.0 [30.9, 49.8]** acc" in first
    assert "**55.0 [45.2, 64.4]** acc" in second
    assert latest(key) == second
    assert "config.seed 40 → 55" in second
    assert latest("history-tiny").count("data:image/svg+xml") == 1
    assert "40.0" in latest("history-tiny")
    assert '"score": "55.0 [45.2, 64.4]"' in latest("history-table-tiny")
    stages.evaluate(recipe=recipe_file, store=str(store.root), instance="pesc/quiz", overrides=["evaluate.benchmarks.quiz.seed=55"])
    third = versions(key)[2:]
    assert len(third) == 1, "a run that finds its result is a point too"
    assert "same result" in third[0]
    assert len(versions("benchmark-qlora-quiz-tiny")) == 2, "what a run did not ask for gets no point"
