"""Worker processes for the shards of a stage.

    with worker_pool(execution, "dedup") as map_shards:         # one a stage run; nothing starts before there is work for it
        for result in map_shards(function, items): ...          # in the order of the items

    python -m pesc.launch.pool FD PARENT LEVEL                  (what a worker runs)

The stage's process hands out shards and takes results over one socket a worker, from the thread that iterates: there is no other
thread, so a worker is waited for only while its result is wanted, and a stopped stage leaves nothing running.

Contract
- Results come in the order of the items. When shards fail, the error is that of the first of them in this order, raised after the results
  before it, whatever the number of workers and whichever failed first.
- A worker has one shard in hand and at most one small one waiting; a bounded number of finished results waits for its turn.
- One worker, or one shard, is done in the stage's own process.

Pitfalls
- Workers are fresh interpreters (no fork: threads and torch may be there already). They do not import the caller's `__main__`, so the
  function must come from a module.
- They ignore Ctrl-C: the stage's process gets it too, and ends them at once.
- Each is told to use one thread (OpenMP, Arrow, tokenizers), so that N workers use N cores.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from pesc.errors import PescError, PreemptedError, RecipeError, StageFailedError
from pesc.launch.guard import die_with_parent
from pesc.launch.supervise import child_environment

if TYPE_CHECKING:
    from pesc.stage import Execution, MapShards

logger = logging.getLogger(__name__)
_AHEAD = 4
"""Finished results that may wait for an earlier one, for each worker."""
_WAITING_BYTES = 16384
"""A shard this small is sent ahead: it fits the socket's buffer, so neither end can wait for the other for ever."""
_LIKELIER_VICTIM = "500"
_POLL_SECONDS = 1.0
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",  # Arrow's pool counts its threads by this one too
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of a process that is one of many."""


def count_workers(execution: Execution) -> int:
    """`execution.num_workers`, or the cores that this process may use."""
    return execution.num_workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextlib.contextmanager
def worker_pool(execution: Execution, address: str) -> Iterator[MapShards]:
    """The `StageContext.map_shards` of a stage whose shards are done on this machine; `address` is named in errors.

    Raises RecipeError when the execution block asks for a cluster: whoever runs the stage must offer that.  The function's own
    exceptions arrive as they are, with the worker's traceback as their cause; StageFailedError says that a worker was killed.
    """
    if execution.task_runner != "local":
        raise RecipeError(
            f"execution.task_runner is {execution.task_runner!r}, but only the Prefect flow can use a cluster: run "
            "`python -m flows.pipeline RECIPE` or a deployment, or set execution.task_runner=local."
        )
    pool = _Pool(count_workers(execution), address)
    try:
        yield pool.map_shards
    finally:
        pool.close()


class ShardError(Exception):
    """The traceback of a worker; the cause of the exception that it raised."""


class _Pool:
    """Workers that wait for work, and those that have some."""

    def __init__(self, size: int, address: str) -> None:
        self._size, self._address = size, address
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    def map_shards(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """function(item) of each item, in order; the work is done while the results are asked for."""
        if min(self._size, len(items)) <= 1:
            return map(function, items)
        return self._map(function, items)

    def close(self) -> None:
        """End every worker."""
        self._end(list(self._all))

    def _map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        self._end([worker for worker in self._idle if worker.process.poll() is not None])
        crew = [self._idle.pop() if self._idle else self._start() for _ in range(min(self._size, len(items)))]
        call = _Call(function, items, crew, self._address)
        try:
            yield from call.results()
        finally:
            busy = [worker for worker in crew if worker.shards or worker.lost]
            self._idle += [worker for worker in crew if worker not in busy]
            self._end(busy)

    def _start(self) -> _Worker:
        worker = _Worker()
        self._all.add(worker)
        return worker

    def _end(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.wait()
            worker.connection.close()
            self._all.discard(worker)
        self._idle = [worker for worker in self._idle if worker in self._all]


class _Call:
    """One `map_shards`: which shards are where, and which results wait for their turn."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], crew: Sequence[_Worker], address: str) -> None:
        self._function, self._items, self._crew, self._address = function, items, crew, address
        self._sent, self._last = 0, len(items)
        self._done: dict[int, tuple[bool, Any]] = {}

    def results(self) -> Iterator[Any]:
        for index in range(len(self._items)):
            self._hand_out(index)
            while index not in self._done:
                self._take()
                self._hand_out(index)
            succeeded, value = self._done.pop(index)
            if not succeeded:
                raise value
            yield value

    def _hand_out(self, next_wanted: int) -> None:
        """Give every worker a shard, then a second one to the workers that can be given it ahead."""
        limit = min(self._last, next_wanted + _AHEAD * len(self._crew))
        for depth in (0, 1):
            for worker in self._crew:
                if len(worker.shards) == depth and self._sent < limit and not worker.lost:
                    self._send(worker, ahead=depth > 0)

    def _send(self, worker: _Worker, ahead: bool) -> None:
        message = pickle.dumps((self._function, self._items[self._sent]), pickle.HIGHEST_PROTOCOL)
        if ahead and len(message) > _WAITING_BYTES:
            return
        worker.shards.append(self._sent)
        self._sent += 1
        try:
            worker.connection.send_bytes(message)
        except OSError:
            self._lose(worker)

    def _take(self) -> None:
        """Wait for messages of workers and note what they say."""
        working = {worker.connection: worker for worker in self._crew if worker.shards and not worker.lost}
        ready = wait(list(working), _POLL_SECONDS)
        for worker in [worker for connection, worker in working.items() if connection in ready] or working.values():
            if not ready:  # a program that the shard started may hold the socket of a worker that is gone
                if worker.process.poll() is not None:
                    self._lose(worker)
                continue
            try:
                kind, value = pickle.loads(worker.connection.recv_bytes())
            except (EOFError, OSError):
                self._lose(worker)
                continue
            if kind == "log":
                logging.getLogger(value[0]).log(value[1], "%s", value[2])
            else:
                self._note(worker.shards.pop(0), kind == "result", value)

    def _note(self, index: int, succeeded: bool, value: Any) -> None:
        self._done[index] = succeeded, value
        if not succeeded:
            self._last = min(self._last, index)  # later shards are not begun; earlier ones are under way already

    def _lose(self, worker: _Worker) -> None:
        """A worker is gone: its shard failed."""
        worker.lost = True
        code = worker.process.wait()
        for position, index in enumerate(worker.shards):
            self._note(index, False, self._sentence(index if position == 0 else worker.shards[0], code))
        worker.shards.clear()

    def _sentence(self, index: int, code: int) -> StageFailedError:
        shard = f"Shard {index + 1} of {len(self._items)} of {self._address} ({self._items[index]!r:.200})"
        if code == -signal.SIGKILL:
            return StageFailedError(
                f"{shard} was killed (SIGKILL), most often because the machine ran out of memory: run again with fewer workers "
                f"(execution.num_workers={max(1, len(self._crew) // 2)}), or free some memory."
            )
        if code in (-signal.SIGTERM, -signal.SIGINT):
            return PreemptedError(f"{shard} was stopped from outside ({signal.Signals(-code).name}); run it again.")
        how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended its process with exit code {code}"
        return StageFailedError(f"{shard} {how}; what it printed before says why.")


class _Worker:
    """A process and the shards it was given, the one in hand first."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        level = logging.getLogger("pesc").getEffectiveLevel()
        with theirs, _interrupts_blocked():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pesc.launch.pool", str(theirs.fileno()), str(os.getpid()), str(level)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(ours.detach())
        self.shards: list[int] = []
        self.lost = False


def _environment() -> dict[str, str]:
    return {"TQDM_DISABLE": "1", **child_environment(), **ONE_THREAD}


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started meanwhile never sees Ctrl-C, not even before its first line; this one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the worker -------------------------------------------------------------------------------------------------------------


class _LogRelay(logging.Handler):
    """Sends the records of `pesc` to the stage's process, which knows where they go."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._connection.send_bytes(pickle.dumps(("log", (record.name, record.levelno, self.format(record)))))
        except OSError:
            self.handleError(record)


def _work(connection: Connection) -> None:
    """Do shards until the other end is closed."""
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        connection.send_bytes(_answer(message))


def _answer(message: bytes) -> bytes:
    try:
        function, item = pickle.loads(message)
        return pickle.dumps(("result", function(item)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> bytes:
    if isinstance(error, PescError):
        cause, stand_in = None, StageFailedError(str(error))
    else:
        text = "".join(traceback.format_exception(error))
        cause, stand_in = ShardError(text), RuntimeError(text)
    try:
        message = pickle.dumps(("error", _Raised(error, cause)))
        pickle.loads(message)
        return message
    except Exception:  # an exception that does not survive the journey
        return pickle.dumps(("error", stand_in))


class _Raised:
    """Pickles an exception together with a cause, which `pickle` alone would leave behind."""

    def __init__(self, error: Exception, cause: Exception | None) -> None:
        self._parts = error, cause

    def __reduce__(self) -> tuple[Any, ...]:
        return _with_cause, self._parts


def _with_cause(error: Exception, cause: BaseException | None) -> Exception:
    error.__cause__ = cause
    return error


def main(arguments: Sequence[str]) -> int:
    """Be a worker of the process PARENT on the socket FD."""
    descriptor, parent, level = map(int, arguments)
    try:
        die_with_parent(parent, signal.SIGKILL)  # elsewhere than on Linux the closed socket ends the worker after its shard
    except ProcessLookupError:
        return 0
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write(_LIKELIER_VICTIM)  # the kernel takes a worker rather than the process that can say so in a sentence
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    package = logging.getLogger("pesc")
    package.setLevel(level)
    package.addHandler(_LogRelay(connection))
    package.propagate = False
    with contextlib.suppress(BrokenPipeError):
        _work(connection)
    return 0


if __name__ == "__main__":
    from pesc.launch import pool  # under its importable name: what it pickles must be found by the other end

    sys.exit(pool.main(sys.argv[1:]))
