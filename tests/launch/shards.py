"""Shard functions and a stage that maps them, run by real worker processes in the tests of the pool and the clusters."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

from pesc.errors import DataError
from pesc.launch.pool import worker_pool
from pesc.stage import BuildResult, Execution, StageContext


def square(number: int) -> int:
    return number * number


def slow_first(number: int) -> int:
    """The first shards take longest, so they end last."""
    time.sleep(0.2 if number < 2 else 0)
    return number


def describe(number: int) -> dict:
    """What a worker is."""
    logging.getLogger("pesc.toy").warning("shard %d of the toy", number)
    print(f"printed by {number}")
    threads = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")]
    victim = Path("/proc/self/oom_score_adj")
    return {
        "pid": os.getpid(), "threads": threads, "torch": "torch" in sys.modules, "victim": victim.exists() and int(victim.read_text())
    }  # fmt: skip


def fail(number: int, at: tuple[int, ...]) -> int:
    """The later of two failing shards fails first."""
    if number in at:
        time.sleep(0.3 if number == min(at) else 0)
        raise DataError(f"rows.jsonl, row {number}: no answer; give it one.")
    return number


def defect(number: int) -> float:
    return 1 / (number - 3)


class Stubborn(Exception):
    """Does not survive pickling."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def raise_stubborn(_number: int) -> None:
    raise Stubborn("first", "second")


def unpicklable(_number: int) -> object:
    return lambda: None


def disk_full(number: int) -> int:
    raise OSError(28, "No space left on device", "/store/out")


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def killed_with_a_child(number: int) -> int:
    """The child holds everything that its parent had open."""
    if number == 3:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"], close_fds=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave(number: int) -> int:
    os._exit(7)


def touch(number: int, folder: Path) -> int:
    (folder / str(number)).touch()
    return number


def stopped(number: int) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    return number


def nap(number: int, folder: str) -> int:
    """Leaves its pid and stays."""
    (Path(folder) / f"{number}.pid").write_text(str(os.getpid()))
    time.sleep(60)
    return number


def big(number: int, payload: bytes) -> bytes:
    """Results and shards that are larger than any buffer between two processes."""
    return payload[:1] * (1 << 21)


def measure(path: Path, times: int) -> tuple[str, int]:
    """Name and size of a file: a shard that carries a path."""
    return path.name, path.stat().st_size * times


def build_sizes(ctx: StageContext) -> BuildResult:
    """A toy stage: maps twice over the files of its inputs and writes what came back."""
    files = sorted(path for root in ctx.inputs.values() for path in Path(root).rglob("*") if path.is_file()) * 3
    sizes = list(ctx.map_shards(partial(measure, times=2), files))
    for done, _ in enumerate(ctx.map_shards(square, list(range(len(sizes)))), 1):
        ctx.progress(done, len(sizes), "shards")
    (ctx.out / "data.json").write_text(json.dumps({"config": ctx.config.model_dump(mode="json"), "sizes": sizes}, sort_keys=True))
    return BuildResult({"shards": len(sizes), "pid": os.getpid()})


def build_failing(ctx: StageContext) -> BuildResult:
    """A toy stage with a bad row in two of its shards."""
    list(ctx.map_shards(partial(fail, at=(5, 9)), list(range(40))))
    return BuildResult()


def build_napping_with_progress(ctx: StageContext) -> BuildResult:
    """A toy stage whose caller hears of it when both of its workers are busy."""
    threading.Thread(target=_tell_when_busy, args=(ctx,), daemon=True).start()
    list(ctx.map_shards(partial(nap, folder=str(ctx.work)), [0, 1]))
    return BuildResult()


def _tell_when_busy(ctx: StageContext) -> None:
    while len([path for path in ctx.work.glob("*.pid") if path.read_text()]) < 2:
        time.sleep(0.02)
    ctx.progress(0, 1, message="both at work")


def caller(folder: Path) -> None:
    """A program that maps naps over two workers."""
    with worker_pool(Execution(num_workers=2), "toy") as map_shards:
        list(map_shards(partial(nap, folder=str(folder)), [0, 1]))


if __name__ == "__main__":
    from tests.launch import shards  # workers find the functions in a module, not in __main__

    shards.caller(Path(sys.argv[1]))
