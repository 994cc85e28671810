"""The body that all stage tasks share.

outcome = run_job(train, job, store, runner)        # in a flow, in the main thread
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect import Task, get_run_logger
from prefect.futures import PrefectConcurrentFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from pesc.build import Job, Outcome
from pesc.errors import PescError, StoreError
from pesc.pipeline import stage_named
from pesc.stage import Progress
from pesc.store import ArtifactRef, Store
from tasks.cluster import open_shards
from tasks.patience import impatient
from tasks.policy import StagePolicy
from tasks.reporting import ProgressReport, publish_result, publish_routing, publish_training
from tasks.retries import DELAYS_SECONDS, TRIED_AGAIN, WITHOUT_DELAY, retry_on, retry_options, waiting_by
from tasks.runner import Build, Inline, Runner
from tasks.secrets import clean_errors, run_secrets
from tasks.states import note_state, upstream_states

StageTask = Task[[Job, str], ArtifactRef]
_BUILD: ContextVar[Build] = ContextVar("pesc_build")
"""What a task does with its job."""


def stage_task(name: str, delays_seconds: tuple[float, ...] = DELAYS_SECONDS, **options: Any) -> StageTask:
    """The task of one stage; tried again after `delays_seconds` when its error is worth it (`tasks.retries`)."""
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
        **{**retry_options(*TRIED_AGAIN, delays_seconds=delays_seconds), **options},
    )


def run_job(stage: StageTask, job: Job, store: Store, runner: Runner = Inline()) -> Outcome:
    """Call a stage's task on a job and say what became of it.  Raises the PescError of a stage that failed."""
    call = _Call(stage, job, store, runner)
    token = _BUILD.set(runner.build)
    try:
        state = call.task(quote(call.job), str(store.root), wait_for=upstream_states(job), return_state=True)
    finally:
        _BUILD.reset(token)
    note_state(job, state, store)
    state.result()
    return call.outcome()


class _Call:
    """A job about to be given to its stage's task."""

    def __init__(self, stage: StageTask, job: Job, store: Store, runner: Runner) -> None:
        self.store, self._runner = store, runner
        self._known = None if job.refresh else store.find(job.key.stage, job.fingerprint)
        self._started = time.monotonic()
        self.job = job.model_copy(update={"prefect_run": flow_run.get_id()})
        self.task = stage.with_options(result_storage=store.root, retry_condition_fn=retry_on(*runner.tried_again))
        if job.refresh:
            self.task = self.task.with_options(refresh_cache=True)

    def outcome(self) -> Outcome:
        """What the store has after the task has ended well."""
        job, manifest = self.job, self.store.find(self.job.key.stage, self.job.fingerprint)
        if manifest is None:
            raise StoreError(
                f"{job.label} ended, but its result is not in {self.store.root}. `pesc fsck` says what is missing; then run again."
            )
        built = self._known is None and (job.refresh or self._runner.made(manifest))
        return Outcome(job.address, manifest.ref, "built" if built else "hit", time.monotonic() - self._started)


def run_jobs_at_once(
    calls: Sequence[tuple[StageTask, Job]], slots: int, store: Store, runner: Runner = Inline()
) -> Iterator[tuple[Job, Outcome | PescError]]:
    """Call stages' tasks on independent jobs, at most `slots` at a time, in the main thread of a flow; each job with what became of it.

    The tasks run in threads, for Prefect's sake; what builds for them is told to stop when the flow is cancelled.
    """
    with ThreadPoolTaskRunner(max_workers=slots) as threads, runner.crew(store, slots) as crew:
        token = _BUILD.set(crew.build)
        try:
            with waiting_by(crew.wait):
                waiting = {call.job.address: (call, _submit(threads, call, store)) for call in (_Call(*c, store, runner) for c in calls)}
        finally:
            _BUILD.reset(token)
        while waiting:
            crew.turn()
            for address, (call, future) in list(waiting.items()):
                if future.wrapped_future.done():
                    del waiting[address]
                    yield call.job, _result(call, future)


def _submit(threads: ThreadPoolTaskRunner[Any], call: _Call, store: Store) -> PrefectConcurrentFuture[ArtifactRef]:
    given, before = {"job": quote(call.job), "store": str(store.root)}, upstream_states(call.job)
    return threads.submit(call.task.with_options(**WITHOUT_DELAY), given, before)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _result(call: _Call, future: PrefectConcurrentFuture[ArtifactRef]) -> Outcome | PescError:
    try:
        note_state(call.job, future.state, call.store)
        future.result()
        return call.outcome()
    except PescError as error:
        return error


def _execute(job: Job, store: Store) -> ArtifactRef:
    report = ProgressReport(job, get_run_logger(), store=store)

    def on_progress(progress: Progress) -> None:
        with impatient():
            report(progress)

    with clean_errors():
        outcome = _BUILD.get()(store, job, on_progress, open_shards)
    if outcome.how == "built":
        with impatient():
            _show(store, outcome)
    return outcome.ref


def _show(store: Store, outcome: Outcome) -> None:
    publish_result(store, outcome)
    if outcome.ref.stage == "train":
        publish_training(store, outcome)
    elif outcome.ref.stage == "routing":
        publish_routing(store, outcome)


@contextmanager
def library_records(level: int = logging.INFO) -> Iterator[None]:
    """Send the library's log records to the Prefect UI while a flow runs, with the secrets that it needs and without showing them.

    The same as the setting PREFECT_LOGGING_EXTRA_LOGGERS=pesc, which is found from the working directory and sets no level, so that
    INFO would be lost.
    """
    with run_secrets():
        yield from _records(level)


def _records(level: int) -> Iterator[None]:
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
