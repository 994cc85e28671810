"""The flow runs that a flow run has started: asked after, ended, and understood when they have failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType, WorkPoolStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling

from pesc import errors
from pesc.errors import InterruptedStageError, PescError, StageFailedError, WorkerLostError

UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
FAILURE = "Flow run encountered an exception: "
"""What Prefect writes before the class and the sentence of an error."""
WITH_PARENT = "The run that started it has ended."
_TAKEN_AWAY = ("termination signal", "interrupt signal", "status code: 143", "status code: -15", "no sign of life")
_KILLED = ("status code: 137", "status code: -9", "status code: 247")


def children_of(client: SyncPrefectClient, parent: UUID, states: Iterable[StateType] | None = None) -> list[FlowRun]:
    """The flow runs that were started by a flow run or its task runs; in some states, or all of them."""
    in_state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))) if states is not None else None
    wanted = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent]), state=in_state)
    found: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=200, offset=len(found)):
        found += page
    return found


def cancel_children(client: SyncPrefectClient, parent: UUID) -> list[FlowRun]:
    """Cancel every child that has not ended; returns those."""
    children = [child for child in children_of(client, parent, UNFINISHED) if not (child.state and child.state.is_cancelling())]
    for child in children:
        cancel(client, child.id)
    return children


def cancel(client: SyncPrefectClient, flow_run: UUID) -> None:
    """Cancel a flow run: its worker ends its processes; one that no process has begun is Cancelled at once."""
    try:
        run = client.read_flow_run(flow_run)
        if run.state is None or run.state.is_final():
            return
        client.set_flow_run_state(flow_run, Cancelling(message=WITH_PARENT))  # this makes a scheduled one Cancelled
        run = client.read_flow_run(flow_run)
        if run.state and run.state.is_cancelling() and run.start_time is None:  # it has not begun, and now it cannot any more
            client.set_flow_run_state(flow_run, Cancelled(message=WITH_PARENT), force=True)
    except ObjectNotFound:
        return


def error_of(address: str, run: FlowRun) -> PescError:
    """How a child that did not end well failed: its own class and sentence where it had one."""
    state, where = run.state, f"(flow run {run.name!r})"
    assert state is not None
    message = (state.message or "").strip()
    if state.is_failed():
        return _own_error(message) or StageFailedError(f"{address} failed: {message or 'it gave no reason'} {where}")
    if state.is_cancelled():
        return InterruptedStageError(f"{address} was cancelled {where}. What it has done is kept: run it again to go on.")
    if any(sign in message.lower() for sign in _TAKEN_AWAY):
        return WorkerLostError(f"The worker of {address} has gone {where}: {message} What it has left in the store is kept.")
    if any(sign in message for sign in _KILLED):
        return StageFailedError(
            f"The flow process of {address} was killed {where}, most often because the machine ran out of memory: {message} Run it again to go on."
        )
    return StageFailedError(f"{address} crashed {where}: {message or 'it gave no reason'}")


def _own_error(message: str) -> PescError | None:
    name, colon, sentence = message.removeprefix(FAILURE).partition(": ")
    kind = getattr(errors, name, None)
    return kind(sentence) if colon and isinstance(kind, type) and issubclass(kind, PescError) else None


class Pickup:
    """Says, after a while and then less and less often, that nobody has taken a child up, and what may be the cause."""

    FIRST_SECONDS, LONGEST_SECONDS = 60.0, 1800.0

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._address, self._clock, self._started, self._wait = address, clock, clock(), self.FIRST_SECONDS
        self._next = self._started + self._wait

    def complaint(self, run: FlowRun, client: SyncPrefectClient) -> str | None:
        """A sentence when it is time for one and the run waits for a worker, else None."""
        if run.state is None or not (run.state.is_scheduled() or run.state.is_pending()) or self._clock() < self._next:
            return None
        seconds = self._clock() - self._started
        self._wait = min(2 * self._wait, self.LONGEST_SECONDS)
        self._next = self._clock() + self._wait
        pool, queue = run.work_pool_name, run.work_queue_name
        start = f"Start one: python -m deployments.worker --pool {pool}"
        if pool is None:
            cause = "its deployment has no work pool. `python -m deployments.bootstrap` gives it one"
        elif (status := client.read_work_pool(pool).status) == WorkPoolStatus.PAUSED:
            cause = f"the work pool {pool!r} is paused. Let it go on: prefect work-pool resume {pool}"
        elif status == WorkPoolStatus.NOT_READY:
            cause = f"no worker of the work pool {pool!r} is alive. {start}"
        else:
            cause = f"the workers of {pool!r} are busy, or none of them serves the queue {queue!r}, or it is at its limit. {start}"
        return f"{self._address} (flow run {run.name!r}) has waited {seconds:.0f} s for a worker: {cause}."
