"""The final states of task runs: which of them a job waits for, and what a failed one leaves behind.

Prefect finds what a task reads by the identity of Python objects that other tasks have returned. An object that is gone leaves its number to
another, and equal texts may be one object, so it draws arrows between actions that know nothing of each other. A job is therefore handed over as
a quotation, which Prefect does not look into, what Prefect has noted of objects is forgotten before each call, and what a job waits for is said.

Prefect writes the exception of a failed task that has results into the results' storage, which is the store, under a name of chance that nobody
asks for again. It is removed; the state has its sentence.
"""

from __future__ import annotations

import contextlib
from typing import Any

from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.results import ResultRecord  # pyright: ignore[reportPrivateImportUsage]
from prefect.runtime import flow_run

from pesc.build import Job
from pesc.store import Store

_STATES: dict[tuple[str | None, str], State[Any]] = {}
"""By flow run and fingerprint of the action."""


def note_state(job: Job, state: State[Any], store: Store) -> None:
    """Remember how the task run of a job has ended well; clean up after one that has not."""
    if state.is_completed():
        _STATES[flow_run.get_id(), job.fingerprint] = state
    elif isinstance(state.data, ResultRecord) and (key := state.data.metadata.storage_key):
        path = store.root / key  # an absolute one stays as it is
        if path.parent == store.root:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def upstream_states(job: Job) -> list[State[Any]]:
    """The final states of the task runs, of this flow run, whose results the job reads."""
    if (context := FlowRunContext.get()) is not None:
        context.run_results.clear()  # what Prefect has noted of objects; see above
    run = flow_run.get_id()
    found = (_STATES.get((run, ref.fingerprint)) for ref in job.inputs.values())
    return list({id(state): state for state in found if state}.values())
