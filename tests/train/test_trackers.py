"""A run's numbers arrive where people look at them: read back with TensorBoard's, W&B's and MLflow's own readers."""

from __future__ import annotations

import json
import logging

import pytest
from accelerate import PartialState

from pesc.errors import RecipeError
from pesc.stage import Execution
from pesc.train import trackers
from pesc.train.job import Job
from pesc.train.watch import RunWatch
from tests.train import tiny

LINES = [
    {"step": step, "lr": 1e-3, "lr_by_part": {"bank": 2e-3, "lora": 1e-3}, "grad_norm": 0.5, "loss": 3.0 - step, "tokens": 100,
     "experts": {"max": [0.5, 0.75], "min": [0.1, 0.0], "entropy": [0.9, 0.7]}}
    for step in (1, 2)
]  # fmt: skip


def make_job(work, *names) -> Job:
    where = Execution(trackers=names, device="cpu")
    return Job("train[tiny]", tiny.settings(), where, work / "model", work / "blocks", work, "cpu", 2, logging.INFO)


def watch(work, *names, lines=LINES, rank=0):
    PartialState(cpu=True)  # every rank has one
    run = RunWatch(rank, make_job(work, *names), lambda *_a, **_k: None)
    run.start(lines[0]["step"] - 1, world_size=1)
    for line in lines:
        run.step(line, 50.0)
    run.evaluated(2, {"loss": 2.5, "domains": {"maths": {"loss": 2.5, "tokens": 9}, "code": {"loss": None, "tokens": 0}}}, 0.1)
    run.end(2, "")


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_every_number(tmp_path):
    watch(tmp_path, "tensorboard")
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 2.0), (2, 1.0)]
    assert found["lr/bank"] == [(1, pytest.approx(2e-3)), (2, pytest.approx(2e-3))]
    assert found["expert_max/layer_01"] == [(1, 0.75), (2, 0.75)]
    assert found["held_out/maths"] == found["held_out/all"] == [(2, 2.5)]
    assert "held_out/code" not in found
    assert found["train/memory_bytes"][0][1] > 1e6


def test_a_continued_run_goes_on_in_the_same_curve(tmp_path):
    watch(tmp_path, "tensorboard", lines=LINES[:1])
    watch(tmp_path, "tensorboard", lines=LINES[1:])
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 2.0), (2, 1.0)]
    assert {path.parent for path in (tmp_path / "tensorboard").rglob("*") if path.is_file()} == {tmp_path / "tensorboard"}


def test_other_ranks_write_nothing(tmp_path):
    watch(tmp_path, "tensorboard", rank=1)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_costs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    watch(tmp_path, "tensorboard")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING and "pesc" in record.name]
    assert "train[tiny]: tensorboard records no more of this run" in warning
    assert [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()][-1] == "end"


def test_a_missing_package_is_said_before_anything_starts(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"execution\.trackers has wandb, but its package is not installed: pip install wandb"):
        trackers.require_trackers(["wandb"])
    trackers.require_trackers([])


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    watch(tmp_path, "wandb")
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = log.read_bytes()
    for name in (b"train/loss", b"expert_entropy/layer_01", b"held_out/maths", b"train.lora.rank"):
        assert name in written


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    watch(tmp_path, "mlflow", lines=LINES[:1])
    watch(tmp_path, "mlflow", lines=LINES[1:])  # continued
    (run,) = mlflow.search_runs(experiment_names=["pesc"], output_format="list")
    assert run.data.params["train.lora.rank"]
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]
