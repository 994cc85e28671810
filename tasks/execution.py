"""The body that all stage tasks share.

outcome = run_job(train, job, store)        # in a flow, in the main thread
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

from prefect import Task, get_run_logger
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectConcurrentFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from pesc.build import Job, OpenShards, Outcome, build_or_open
from pesc.errors import InterruptedStageError, PescError, StoreError
from pesc.launch.side_by_side import SideBySide
from pesc.pipeline import stage_named
from pesc.stage import Progress
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
    call = _Call(stage, job, store)
    call.task(call.job, str(store.root))
    return call.outcome()


class _Call:
    """A job about to be given to its stage's task."""

    def __init__(self, stage: StageTask, job: Job, store: Store) -> None:
        self._store, self._known = store, None if job.refresh else store.find(job.key.stage, job.fingerprint)
        self._started = time.monotonic()
        self.job = job.model_copy(update={"prefect_run": flow_run.get_id()})
        self.task = stage.with_options(result_storage=store.root)
        if job.refresh:
            self.task = self.task.with_options(refresh_cache=True)

    def outcome(self) -> Outcome:
        """What the store has after the task has ended well."""
        job, manifest = self.job, self._store.find(self.job.key.stage, self.job.fingerprint)
        if manifest is None:
            raise StoreError(
                f"{job.label} ended, but its result is not in {self._store.root}. `pesc fsck` says what is missing; then run again."
            )
        built = self._known is None and (job.refresh or manifest.prefect_run == job.prefect_run)
        return Outcome(job.address, manifest.ref, "built" if built else "hit", time.monotonic() - self._started)


def run_jobs_at_once(calls: Sequence[tuple[StageTask, Job]], slots: int, store: Store) -> Iterator[tuple[Job, Outcome | PescError]]:
    """Call stages' tasks on independent jobs, at most `slots` at a time, in the main thread of a flow; each job with what became of it.

    The tasks run in threads, for Prefect's sake; what they build is built by processes that this thread starts and, when the flow is
    cancelled, ends.
    """
    desk = _Desk()
    with ThreadPoolTaskRunner(max_workers=slots) as runner, desk, SideBySide(store, slots) as side:
        token = _BUILD.set(desk.build)
        try:
            waiting = {
                call.job.address: (call, runner.submit(call.task, {"job": call.job, "store": str(store.root)}))
                for call in (_Call(stage, job, store) for stage, job in calls)
            }
        finally:
            _BUILD.reset(token)
        while waiting:
            desk.hand_over(side)
            for job, result in side.step():
                desk.answer(job, result)
            for address, (call, future) in list(waiting.items()):
                if future.wrapped_future.done():
                    del waiting[address]
                    yield call.job, _result(call, future)


def _result(call: _Call, future: PrefectConcurrentFuture[ArtifactRef]) -> Outcome | PescError:
    try:
        future.result()
        return call.outcome()
    except PescError as error:
        return error


class _Desk:
    """Where tasks in threads leave their jobs for the main thread, and wait.  Leaving the `with` block sends all who wait home."""

    def __init__(self) -> None:
        self._lock, self._closed = threading.Lock(), False
        self._new: list[tuple[Job, Callable[[Progress], None], Future[Outcome]]] = []
        self._taken: dict[str, Future[Outcome]] = {}

    def __enter__(self) -> _Desk:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            waiting = [*self._taken.values(), *(answer for _, _, answer in self._new)]
        for answer in waiting:
            answer.set_exception(InterruptedStageError("The run was stopped while this benchmark was under way; run it again to go on."))

    def build(self, _store: Store, job: Job, on_progress: Callable[[Progress], None], _shards: OpenShards) -> Outcome:
        """For a task's thread: have a job built, and wait for it."""
        context, answer = copy_context(), Future[Outcome]()
        with self._lock:
            if self._closed:
                raise InterruptedStageError(f"The run was stopped before {job.address} was begun; run it again to go on.")
            self._new.append((job, lambda progress: context.run(on_progress, progress), answer))
        return answer.result()

    def hand_over(self, side: SideBySide) -> None:
        """For the main thread: start what has been left."""
        with self._lock:
            new, self._new = self._new, []
            self._taken |= {job.fingerprint: answer for job, _, answer in new}
        for job, on_progress, _ in new:
            side.add(job, on_progress)

    def answer(self, job: Job, result: Outcome | PescError) -> None:
        """For the main thread: tell the thread that waits."""
        with self._lock:
            answer = self._taken.pop(job.fingerprint)
        if isinstance(result, PescError):
            answer.set_exception(result)
        else:
            answer.set_result(result)


Build = Callable[[Store, Job, Callable[[Progress], None], OpenShards], Outcome]
_BUILD: ContextVar[Build] = ContextVar("pesc_build", default=build_or_open)
"""What a task does with its job: build it here, or have the main thread do it."""


def _execute(job: Job, store: Store) -> ArtifactRef:
    outcome = _BUILD.get()(store, job, ProgressReport(job, get_run_logger()), open_shards)
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
