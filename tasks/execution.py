"""The body that all stage tasks share.

outcome = run_job(train, job, store)        # in a flow, in the main thread
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Task, get_run_logger
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run

from pesc.errors import PescError, StoreError
from pesc.pipeline import stage_named
from pesc.run import Job, Outcome, build_or_open
from pesc.store import ArtifactRef, Store
from tasks.cluster import open_shards
from tasks.policy import StagePolicy
from tasks.reporting import ProgressReport, publish_result, publish_routing, publish_training

StageTask = Task[[Job, str], ArtifactRef]


def stage_task(name: str, **options: Any) -> StageTask:
    """The task of one stage.  `options` are Prefect's own: retries and their condition."""
    stage = stage_named(name)

    def execute(job: Job, store: str) -> ArtifactRef:
        return _execute(job, Store(store))

    execute.__name__ = execute.__qualname__ = name  # else all stages share one task key
    return Task(
        execute,
        name=name,
        description=stage.summary,
        task_run_name="{job.label}",
        cache_policy=StagePolicy(),
        persist_result=True,
        result_serializer="json",
        cache_result_in_memory=False,
        **options,
    )


def run_job(stage: StageTask, job: Job, store: Store) -> Outcome:
    """Call a stage's task on a job and say what became of it.  Raises the PescError of a stage that failed."""
    known = None if job.refresh else store.find(job.key.stage, job.fingerprint)
    run_id = flow_run.get_id()
    job = job.model_copy(update={"prefect_run": run_id})
    started = time.monotonic()
    placed = stage.with_options(result_storage=store.root)
    if job.refresh:
        placed = placed.with_options(refresh_cache=True)
    placed(job, str(store.root))
    manifest = store.find(job.key.stage, job.fingerprint)
    if manifest is None:
        raise StoreError(f"{job.label} ended, but its result is not in {store.root}. `pesc fsck` says what is missing; then run again.")
    built = known is None and (job.refresh or manifest.prefect_run == run_id)
    return Outcome(job.address, manifest.ref, "built" if built else "hit", time.monotonic() - started)


def _execute(job: Job, store: Store) -> ArtifactRef:
    outcome = build_or_open(store, job, ProgressReport(job, get_run_logger()), open_shards)
    if outcome.how == "built":
        publish_result(store, outcome)
        if outcome.ref.stage == "train":
            publish_training(store, outcome)
        elif outcome.ref.stage == "routing":
            publish_routing(store, outcome)
    return outcome.ref


def retry_on(*kinds: type[PescError]) -> Callable[[Any, TaskRun, State], bool]:
    """A retry condition: the task failed with one of these errors.  Prefect asks it only while tries are left."""

    def condition(_task: Any, task_run: TaskRun, state: State) -> bool:
        error = state.result(raise_on_failure=False)
        if isinstance(error, kinds):
            get_run_logger().warning("%s: %s It will be tried again.", task_run.name, error)
            return True
        return False

    return condition


@contextmanager
def library_records(level: int = logging.INFO) -> Iterator[None]:
    """Send the library's log records to the Prefect UI while a flow runs.

    The same as the setting PREFECT_LOGGING_EXTRA_LOGGERS=pesc, which is found from the working directory and sets no level, so that
    INFO would be lost.
    """
    logger = logging.getLogger("pesc")
    added = [handler for handler in logging.getLogger("prefect.extra").handlers if handler not in logger.handlers]
    before = logger.level
    for handler in added:
        logger.addHandler(handler)
    if logger.getEffectiveLevel() > level:
        logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in added:
            logger.removeHandler(handler)
