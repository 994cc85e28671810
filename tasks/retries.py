"""Which failures of a stage are tried again, and when: decided by the class of the error alone.

    TransientError    a network, a hub, a remote store          tried again in the same place
    PreemptedError    the machine was taken away                tried again; the stage resumes from what it has left in the store

Everything else would fail in the same way again: a wrong recipe, bad rows, a missing right, no memory, a loss that is not a number,
a defect of the code. It fails at once, with its sentence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State, TaskRun

from pesc.errors import PescError, PreemptedError, TransientError

TRIED_AGAIN: tuple[type[PescError], ...] = (TransientError, PreemptedError)
DELAYS_SECONDS = (10, 60, 300)
"""Before the second, the third and the fourth try; each is varied, so that many who failed together do not come back together."""
JITTER = 0.5
_WAIT: ContextVar[Callable[[float], bool] | None] = ContextVar("pesc_wait", default=None)


def retry_options(*kinds: type[PescError], delays_seconds: tuple[float, ...] = DELAYS_SECONDS) -> dict[str, Any]:
    """Options of a Prefect task that is tried again after these errors, and after no other."""
    return {
        "retries": len(delays_seconds),
        "retry_delay_seconds": list(delays_seconds),
        "retry_jitter_factor": JITTER,
        "retry_condition_fn": retry_on(*kinds),
    }


def retry_on(*kinds: type[PescError]) -> Callable[[Any, TaskRun, State], bool]:
    """A retry condition: the task failed with one of these errors.  Prefect asks it only while tries are left.

    A function, for Prefect 3.8 takes any other callable for "never"; and one that says little itself, for a task goes to a cluster's workers
    with it by value, where a context variable cannot follow.
    """

    def condition(_task: Any, task_run: TaskRun, state: State) -> bool:
        return _is_tried_again(kinds, task_run, state)

    return condition


def _is_tried_again(kinds: tuple[type[PescError], ...], task_run: TaskRun, state: State) -> bool:
    error = state.result(raise_on_failure=False)
    if not isinstance(error, kinds):
        return False
    get_run_logger().warning("%s: %s It will be tried again.", task_run.name, error)
    wait = _WAIT.get()
    delay = DELAYS_SECONDS[min(max(task_run.run_count, 1), len(DELAYS_SECONDS)) - 1]
    return wait is None or wait(delay * random.uniform(1 - JITTER, 1 + JITTER))


@contextmanager
def waiting_by(wait: Callable[[float], bool]) -> Iterator[None]:
    """Let tasks that are submitted meanwhile wait for their next try by `wait(seconds)`, which says whether there is to be one.

    For tasks in threads: Prefect's own delay there cannot be ended by a cancellation. Give such tasks `WITHOUT_DELAY` as well.
    """
    token = _WAIT.set(wait)
    try:
        yield
    finally:
        _WAIT.reset(token)


WITHOUT_DELAY: dict[str, Any] = {"retry_delay_seconds": 0}
