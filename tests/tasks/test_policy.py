"""Prefect's cache key and record, tied to the store."""

import json
from types import SimpleNamespace

import pytest
from prefect.results import ResultRecord

from pesc.build import build_or_open, make_job
from pesc.pipeline import build_graph
from pesc.store import ArtifactRef
from tasks.policy import StagePolicy, record_key
from tasks.table import TASKS


@pytest.fixture
def job(fakes, tiny_recipe):
    recipe = tiny_recipe()
    return make_job(build_graph(recipe).by_address["download[rows]"], recipe, {})


def key_of(job, store, storage=None):
    context = SimpleNamespace(task=TASKS["download"].with_options(result_storage=storage or store.root))
    return StagePolicy().compute_key(context, {"job": job, "store": str(store.root)}, {})


def test_the_key_is_the_record_s_place_inside_the_action(job, store):
    assert key_of(job, store) == record_key(job) == f"actions/download/{job.fingerprint}/prefect.json"


def test_the_same_intent_has_the_same_key_whatever_the_run(job, store):
    other = job.model_copy(update={"prefect_run": "x", "refresh": True, "recipe": "y"})
    assert key_of(other, store) == key_of(job, store)


def test_a_result_without_a_record_gets_one_that_prefect_reads(job, store):
    outcome = build_or_open(store, job)
    path = store.root / key_of(job, store)
    assert ResultRecord.deserialize(path.read_bytes()).result == outcome.ref
    assert path.stat().st_size < 1024


def test_a_record_without_a_result_is_removed(job, store):
    path = store.root / record_key(job)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert key_of(job, store) == record_key(job)
    assert not path.exists()


def test_a_damaged_manifest_counts_as_nothing_and_raises_nothing(job, store):
    build_or_open(store, job)
    path = store.root / key_of(job, store)
    (path.parent / "manifest.json").write_text("{")
    assert key_of(job, store) == record_key(job)
    assert not path.exists()


def test_a_task_without_its_store_caches_nothing(job, store, tmp_path):
    build_or_open(store, job)
    assert key_of(job, store, storage=tmp_path / "elsewhere") is None
    assert not (tmp_path / "elsewhere").exists()


def test_a_store_that_cannot_be_written_costs_no_result(job, store, monkeypatch):
    build_or_open(store, job)
    monkeypatch.setattr("prefect.results.ResultStore.write", lambda *_a, **_k: (_ for _ in ()).throw(OSError("read-only")))
    assert key_of(job, store) == record_key(job)


def test_a_reference_survives_json(job, store):
    ref = build_or_open(store, job).ref
    assert ArtifactRef.model_validate(json.loads(ref.model_dump_json())) == ref
