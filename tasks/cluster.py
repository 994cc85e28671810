"""The shards of a stage on a Dask or Ray cluster, by Prefect's own task runners.

    with open_shards(job.execution, job.address) as map_shards: ...       # in a flow

Key contracts
- A chunk of consecutive shards is one task run, `dedup shard 3/57` or `dedup shards 9-12/228`, shown under the stage's.
- There are at most MAX_TASK_RUNS of them for each `map_shards` (two a worker on a larger cluster). A task run costs about 0.17 s of two cores
  (60 empty shards on a Dask cluster of 2, with Prefect's server on the same machine: 10 s; 0.3 s without task runs), so thousands of
  shards must not be thousands of task runs.
- Results are the same, in the same order, as those of `pesc.launch.pool`, and so is the error: the first one in the order of the shards.
- The cluster is started, or connected to, when the first shard needs it, and left at the end of the stage.

Pitfalls
- Workers report to Prefect's server themselves, so a cluster of other machines needs a PREFECT_API_URL that it can reach.
- The store must be at the same path everywhere: shards carry paths.
- Prefect looks through every parameter of a task for futures and states; shards are given to it pickled, so there is nothing to find.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL
from prefect.states import Failed
from prefect.task_runners import TaskRunner

from pesc.errors import PescError, RecipeError, StageFailedError
from pesc.launch.pool import ONE_THREAD, count_workers, worker_pool
from pesc.stage import Execution, MapShards
from tasks.secrets import clean_errors, hide_secrets

MAX_TASK_RUNS = 32
_LOCAL_HOSTS = ("", "localhost", "127.0.0.1", "::1")
_PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}


@contextmanager
def open_shards(execution: Execution, address: str) -> Iterator[MapShards]:
    """The `StageContext.map_shards` of a stage of a flow: worker processes here, or the cluster of the execution block.

    Raises RecipeError: the task runner is not installed, its cluster does not answer, or cannot reach Prefect's server.
    """
    if execution.task_runner == "local":
        with worker_pool(execution, address) as map_shards:
            yield map_shards
        return
    _check(execution)
    with ExitStack() as stack:
        cluster = _Cluster(execution, address, stack)
        yield cluster.map_shards


def _check(execution: Execution) -> None:
    package, kind = _PACKAGES[execution.task_runner], execution.task_runner
    if find_spec(package) is None:
        raise RecipeError(
            f"execution.task_runner is {kind!r}, but {package} is not installed: pip install -e '.[{kind}]' in this project, or set "
            "execution.task_runner=local."
        )
    url = PREFECT_API_URL.value()
    elsewhere = execution.cluster not in (None, "auto") and _host(execution.cluster or "") not in _LOCAL_HOSTS
    if elsewhere and _host(url or "") in _LOCAL_HOSTS:
        raise RecipeError(
            f"The workers of execution.cluster {execution.cluster} report to Prefect's server, which is {url or 'a temporary one'}: they cannot "
            "reach that. Set PREFECT_API_URL to a server that they can reach."
        )


def _host(address: str) -> str:
    return urlsplit(address if "//" in address else f"//{address}").hostname or ""


class _Cluster:
    """A task runner that is started when a shard needs it, and what is known of its size."""

    def __init__(self, execution: Execution, address: str, stack: ExitStack) -> None:
        self._execution, self._address, self._stack = execution, address, stack
        self._started: tuple[TaskRunner[Any], int] | None = None

    def map_shards(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """function(item) of each item, in order."""
        if not items:
            return
        runner, workers = self._start()
        chunks = cut(len(items), max(MAX_TASK_RUNS, 2 * workers))
        futures = [self._submit(runner, function, items, chunk) for chunk in chunks]
        futures.reverse()
        for chunk in chunks:
            yield from self._result(futures.pop(), chunk, len(items))

    def _start(self) -> tuple[TaskRunner[Any], int]:
        if self._started is None:
            start = {"dask": _start_dask, "ray": _start_ray}[self._execution.task_runner]
            try:
                self._started = start(self._execution, self._stack)
            except (OSError, ValueError) as error:
                if self._execution.cluster is None:
                    raise
                raise RecipeError(
                    f"No {self._execution.task_runner.capitalize()} cluster answers at execution.cluster {self._execution.cluster} ({error}). "
                    "Start it, correct the address, or remove it for a cluster on this machine."
                ) from error
        return self._started

    def _submit(self, runner: TaskRunner[Any], function: Callable[[Any], Any], items: Sequence[Any], chunk: range) -> PrefectFuture[bytes]:
        shards = pickle.dumps((function, [items[index] for index in chunk]), pickle.HIGHEST_PROTOCOL)
        return runner.submit(SHARDS_TASK, {"shards": shards, "label": f"{self._address} {_title(chunk, len(items))}"})

    def _result(self, future: PrefectFuture[bytes], chunk: range, total: int) -> list[Any]:
        try:
            return pickle.loads(future.result())
        except Exception as error:
            if not type(error).__module__.startswith(("distributed.", "ray.")):
                raise
            raise StageFailedError(
                f"{_title(chunk, total).capitalize()} of {self._address} was lost with the worker that did it ({error}). Most often the worker's "
                "machine ran out of memory: use fewer workers a machine, or workers with more memory, and run again."
            ) from error


def cut(count: int, chunks: int) -> list[range]:
    """At most `chunks` consecutive ranges that cover range(count), as equal as they can be.  Their number matters to no result."""
    chunks = min(count, chunks)
    bounds = [count * index // chunks for index in range(chunks + 1)] if count else [0]
    return [range(start, end) for start, end in pairwise(bounds)]


def _title(chunk: range, total: int) -> str:
    return f"shard {chunk.start + 1}/{total}" if len(chunk) == 1 else f"shards {chunk.start + 1}-{chunk.stop}/{total}"


def do_shards(shards: bytes, label: str) -> bytes | State[bytes]:
    """What a worker runs: a function and its items, pickled, become the results, pickled.

    An error that the user can mend makes the task run Failed with its sentence; raised, it would be logged with a traceback.
    """
    hide_secrets()
    function, items = pickle.loads(shards)
    try:
        with clean_errors():
            return pickle.dumps([function(item) for item in items], pickle.HIGHEST_PROTOCOL)
    except PescError as error:
        return Failed(message=str(error), data=error)


SHARDS_TASK = Task(
    do_shards,
    name="shards",
    task_run_name="{label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
"""One chunk of a stage's shards."""


def _start_dask(execution: Execution, stack: ExitStack) -> tuple[TaskRunner[Any], int]:
    from prefect_dask.task_runners import DaskTaskRunner

    if execution.cluster is not None:
        runner = DaskTaskRunner(address=execution.cluster)
    else:
        own = {
            "n_workers": count_workers(execution), "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "memory_limit": 0,
            "env": {**ONE_THREAD, **_QUIET},
        }  # fmt: skip
        runner = DaskTaskRunner(cluster_kwargs=own)
    stack.enter_context(runner)
    threads: Any = runner.client.nthreads()  # by worker; typed for the asynchronous client too
    return runner, sum(threads.values())


def _start_ray(execution: Execution, stack: ExitStack) -> tuple[TaskRunner[Any], int]:
    import ray  # pyright: ignore[reportMissingImports]  (an extra that the checks do without)
    from prefect_ray.task_runners import RayTaskRunner  # pyright: ignore[reportMissingImports]

    if execution.cluster is not None:
        runner = RayTaskRunner(address=execution.cluster)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use
        runner = RayTaskRunner(
            init_kwargs={
                "num_cpus": count_workers(execution), "include_dashboard": False, "log_to_driver": False,
                "runtime_env": {"env_vars": {**ONE_THREAD, **_QUIET}},
            }
        )  # fmt: skip
    stack.enter_context(runner)
    return runner, int(ray.cluster_resources().get("CPU", 1))


_QUIET = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
"""Workers on this machine share its terminal; what Prefect says of their task runs is in its UI."""
