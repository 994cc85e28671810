"""Who builds what the tasks of a flow run are for.

A task of a stage is the same thing wherever its action is built: a key, a record, a name in the UI. What it does with its job is
its `Runner`'s business: `Inline` builds in processes of this machine; `flows.dispatch.Dispatched` has other flow runs build.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from types import TracebackType
from typing import Protocol

from prefect.runtime import flow_run

from pesc.build import Job, OpenShards, Outcome, build_or_open
from pesc.errors import InterruptedStageError, PescError
from pesc.launch.side_by_side import SideBySide
from pesc.plan import Plan
from pesc.stage import Progress
from pesc.store import Manifest, Store
from tasks.retries import TRIED_AGAIN

Build = Callable[[Store, Job, Callable[[Progress], None], OpenShards], Outcome]
"""Build one action, or open it: store, job, where its progress goes, who does its shards.  Raises PescError."""


_IDLE_SECONDS = 0.05


class Crew(AbstractContextManager["Crew"], Protocol):
    """Builds several jobs at once.  Entered in the flow's main thread; whatever leaves it ends what is still being built."""

    def build(self, store: Store, job: Job, on_progress: Callable[[Progress], None], open_shards: OpenShards, /) -> Outcome:
        """For the thread of a task: have its job built, and wait for it."""
        ...

    def turn(self) -> None:
        """For the main thread, again and again: what only it can do, for a fraction of a second."""
        ...

    def wait(self, seconds: float, /) -> bool:
        """For the thread of a task that will be tried again: wait; False when the crew has been told to stop."""
        ...


class Runner(Protocol):
    """Who builds the jobs of a flow run's tasks."""

    @property
    def tried_again(self) -> tuple[type[PescError], ...]:
        """Failures of `build` that are worth another try."""
        ...

    def prepare(self, plan: Plan, /) -> None:
        """Before anything is built: refuse a plan that could not be carried out.  Raises PescError."""
        ...

    def build(self, store: Store, job: Job, on_progress: Callable[[Progress], None], open_shards: OpenShards, /) -> Outcome:
        """Build one job, in the flow's main thread."""
        ...

    def crew(self, store: Store, slots: int, /) -> Crew:
        """Whoever builds several jobs at once, at most so many at a time."""
        ...

    def made(self, manifest: Manifest, /) -> bool:
        """Whether this flow run has built that result."""
        ...


class Inline:
    """Builds here: in this process, or in processes that its main thread starts and, when the flow is cancelled, ends."""

    tried_again = TRIED_AGAIN

    def prepare(self, plan: Plan) -> None:
        """Nothing is needed but this machine."""

    def build(self, store: Store, job: Job, on_progress: Callable[[Progress], None], open_shards: OpenShards) -> Outcome:
        """Build one job."""
        return build_or_open(store, job, on_progress, open_shards)

    def crew(self, store: Store, slots: int) -> Crew:
        """Processes side by side."""
        return _Desk(store, slots)

    def made(self, manifest: Manifest) -> bool:
        """Whether the manifest names this flow run."""
        return manifest.prefect_run is not None and manifest.prefect_run == flow_run.get_id()


class _Desk:
    """Where tasks in threads leave their jobs for the main thread, and wait.  Leaving the `with` block sends all who wait home."""

    def __init__(self, store: Store, slots: int) -> None:
        self._side = SideBySide(store, slots)
        self._stack, self._lock, self._closed = ExitStack(), threading.Lock(), threading.Event()
        self._new: list[tuple[Job, Callable[[Progress], None], Future[Outcome]]] = []
        self._taken: dict[str, Future[Outcome]] = {}

    def __enter__(self) -> _Desk:
        self._stack.enter_context(self._side)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            with self._lock:
                self._closed.set()
                waiting = [*self._taken.values(), *(answer for _, _, answer in self._new)]
            for answer in waiting:
                answer.set_exception(
                    InterruptedStageError("The run was stopped while this benchmark was under way; run it again to go on.")
                )

    def build(self, _store: Store, job: Job, on_progress: Callable[[Progress], None], _shards: OpenShards) -> Outcome:
        """Have a job built by the main thread, and wait for it."""
        context, answer = copy_context(), Future[Outcome]()
        with self._lock:
            if self._closed.is_set():
                raise InterruptedStageError(f"The run was stopped before {job.address} was begun; run it again to go on.")
            self._new.append((job, lambda progress: context.run(on_progress, progress), answer))
        return answer.result()

    def turn(self) -> None:
        """Start what has been left, read what the processes say, and tell the threads that wait."""
        with self._lock:
            new, self._new = self._new, []
            self._taken |= {job.fingerprint: answer for job, _, answer in new}
        for job, on_progress, _ in new:
            self._side.add(job, on_progress)
        if not self._side.is_busy:
            self._closed.wait(_IDLE_SECONDS)
        for job, result in self._side.step():
            with self._lock:
                answer = self._taken.pop(job.fingerprint)
            answer.set_exception(result) if isinstance(result, PescError) else answer.set_result(result)

    def wait(self, seconds: float) -> bool:
        """Wait, unless the run is stopped."""
        return not self._closed.wait(seconds)
