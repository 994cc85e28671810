"""The run's numbers for TensorBoard, Weights & Biases and MLflow, through accelerate's trackers.

TensorBoard's files lie in the workspace while the run lasts, and beside the manifest after it.  The other two read their own variables
(WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ...).  A tracker is a view: one that fails costs a warning, and
the run goes on without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from pesc.errors import RecipeError
from pesc.train.job import Job

logger = logging.getLogger(__name__)
FOLDER = "tensorboard"
PROJECT = "pesc"
_TAG = "pesc.run_id"
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


def require_trackers(names: Iterable[str]) -> None:
    """Raises RecipeError for a tracker whose package is not installed; imports none."""
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
            raise RecipeError(
                f"execution.trackers has {name}, but its package is not installed: pip install {_PACKAGES[name][0]}, or take it out."
            )


class Trackers:
    """All trackers of one run.  Only rank 0 has any."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._open: dict[str, Any] = {}

    def start(self) -> None:
        """Open those that the settings name; a continued run goes on in the run that was begun."""
        for name in self._job.execution.trackers:
            self._attempt(name, lambda name=name: self._start(name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one optimizer step."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: tracker.log(dict(values), step=step))

    def finish(self) -> None:
        """Close them."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.finish)
        self._open.clear()

    def _start(self, name: str) -> None:
        tracker = _make(name, self._job)
        tracker.start()
        self._open[name] = tracker
        settings = flatten_settings(self._job)
        if name == "tensorboard":  # its hyper-parameters would be a run of their own at each start
            tracker.writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))
        elif not (name == "mlflow" and tracker.active_run.data.params):  # a continued run has them
            tracker.store_init_configuration(settings)

    def _attempt(self, name: str, act: Any) -> None:
        try:
            act()
        except Exception as error:  # whatever the package raises: the run matters more
            self._open.pop(name, None)
            logger.warning("%s: %s records no more of this run (%s: %s)", self._job.address, name, type(error).__name__, error)


def _make(name: str, job: Job) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        return tracking.TensorBoardTracker(".", logging_dir=str(job.work / FOLDER))
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return tracking.WandBTracker(project, name=job.address, id=job.run_id, resume="allow", dir=str(job.work))
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    return tracking.MLflowTracker(experiment, run_name=job.address, tags={_TAG: job.run_id}, run_id=_begun_mlflow_run(experiment, job))


def _begun_mlflow_run(experiment: str, job: Job) -> str | None:
    """The id of the run that an earlier attempt at this one has begun."""
    mlflow = importlib.import_module("mlflow")
    found = mlflow.search_runs(experiment_names=[experiment], filter_string=f"tags.`{_TAG}` = '{job.run_id}'", output_format="list")
    return found[0].info.run_id if found else None


def flatten_settings(job: Job) -> dict[str, str | int | float | bool]:
    """Settings and facts of a run as one flat map: {"train.lora.rank": 64, "execution.zero_stage": 2, ...}."""
    tree = {"address": job.address, "steps": job.steps, "device": job.device}
    tree |= {"train": job.config.model_dump(mode="json"), "execution": job.execution.model_dump(mode="json")}
    return dict(_leaves("", tree))


def _leaves(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(f"{prefix}.{name}" if prefix else str(name), part)
    elif value is not None:
        yield prefix, value if isinstance(value, bool | int | float | str) else str(value)


def flatten_line(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step's line by name: `lr/bank`, `expert_entropy/layer_03` ...; what is not known is left out."""
    found = {}
    for name, value in line.items():
        if isinstance(value, bool) or name in ("step", "time"):
            continue
        if isinstance(value, int | float):
            found[f"train/{name}"] = float(value)
        elif name == "lr_by_part":
            found |= {f"lr/{part}": rate for part, rate in value.items()}
        elif name == "experts":
            for what, layers in value.items():
                found |= {f"expert_{what}/layer_{number:02d}": float(share) for number, share in enumerate(layers)}
    return found
