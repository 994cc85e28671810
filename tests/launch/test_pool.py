"""Shards on worker processes: order, errors, and that nothing stays behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pesc.errors import DataError, PreemptedError, RecipeError, StageFailedError
from pesc.launch import pool
from pesc.launch.isolated import build_isolated
from pesc.launch.pool import ShardError, count_workers, worker_pool
from pesc.launch.supervise import child_environment
from pesc.pipeline import Stage
from pesc.run import run_recipe
from pesc.stage import Execution, StageContext
from tests.launch import shards
from tests.launch.programs import ToyConfig
from tests.launch.test_supervise import alive, read_pid, wait_for


@pytest.fixture(scope="module")
def two():
    """`map_shards` of a pool of two, which all tests that do not harm it share."""
    with worker_pool(Execution(num_workers=2), "dedup") as map_shards:
        yield map_shards


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_any_number_of_workers_gives_the_results_in_the_order_of_the_items(workers, count):
    with worker_pool(Execution(num_workers=workers), "dedup") as map_shards:
        assert list(map_shards(shards.square, range(count))) == [number**2 for number in range(count)]


def test_a_shard_that_ends_late_does_not_change_the_order(two):
    assert list(two(shards.slow_first, range(20))) == list(range(20))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40_000), st.text(), st.integers())))
def test_items_arrive_as_they_are(two, items):
    assert list(two(str, items)) == [str(item) for item in items]


def test_shards_and_results_larger_than_the_socket_s_buffer_do_not_block(two):
    payload = os.urandom(1 << 20)
    assert list(two(partial(shards.big, payload=payload), range(12))) == [payload[:1] * (1 << 21)] * 12


def test_two_workers_share_the_shards_each_with_one_thread_and_without_torch(caplog):
    caplog.set_level(logging.INFO, "pesc")
    with worker_pool(Execution(num_workers=2), "dedup") as map_shards:
        seen = list(map_shards(shards.describe, range(12)))
    assert len({one["pid"] for one in seen} - {os.getpid()}) == 2
    assert {tuple(one["threads"]) for one in seen} == {("1", "1", "false")}
    assert not any(one["torch"] for one in seen)
    assert {one["victim"] for one in seen} <= {500, False}  # short of memory, the kernel ends a worker, not the one that can say so
    assert sorted(r.getMessage() for r in caplog.records if r.name == "pesc.toy") == sorted(f"shard {n} of the toy" for n in range(12))


def test_one_worker_is_this_process():
    with worker_pool(Execution(num_workers=1), "dedup") as map_shards:
        assert {one["pid"] for one in map_shards(shards.describe, range(3))} == {os.getpid()}


def test_the_workers_of_one_call_serve_the_next_and_end_with_the_pool():
    with worker_pool(Execution(num_workers=2), "dedup") as map_shards:
        first = {one["pid"] for one in map_shards(shards.describe, range(12))}
        second = {one["pid"] for one in map_shards(shards.describe, range(12))}
        assert first == second
        assert all(map(alive, first))
    assert not any(map(alive, first))


def test_a_call_inside_another_has_workers_of_its_own(two):
    pairs = [(number, list(two(shards.square, [number, 2]))) for number in two(shards.square, range(6))]
    assert pairs == [(n**2, [n**4, 4]) for n in range(6)]


def test_work_is_bounded_by_what_is_asked_for(tmp_path):
    with worker_pool(Execution(num_workers=2), "dedup") as map_shards:
        results = iter(map_shards(partial(shards.touch, folder=tmp_path), range(1000)))
        assert next(results) == 0
        time.sleep(0.3)
        assert len(list(tmp_path.iterdir())) <= 2 * 4
        results.close()  # type: ignore[attr-defined]
        assert list(map_shards(shards.square, range(4))) == [0, 1, 4, 9]


def test_no_worker_starts_before_there_is_work(monkeypatch):
    monkeypatch.setattr(pool, "_Worker", lambda: pytest.fail("a worker was started"))
    with worker_pool(Execution(num_workers=2), "dedup") as map_shards:
        map_shards(shards.square, range(4))
        assert list(map_shards(shards.square, [3])) == [9]


# --- errors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_first_bad_shard_in_order_is_the_error_whichever_failed_first(workers):
    with worker_pool(Execution(num_workers=workers), "dedup") as map_shards:
        results = iter(map_shards(partial(shards.fail, at=(4, 5)), range(40)))
        got = [next(results) for _ in range(4)]
        with pytest.raises(DataError) as caught:
            next(results)
        assert str(caught.value) == "rows.jsonl, row 4: no answer; give it one."
        assert type(caught.value) is DataError
        assert got == [0, 1, 2, 3]
        assert list(map_shards(shards.square, range(3))) == [0, 1, 4]


def test_a_defect_comes_with_the_worker_s_traceback(two):
    with pytest.raises(ZeroDivisionError) as caught:
        list(two(shards.defect, range(8)))
    assert isinstance(caught.value.__cause__, ShardError)
    assert "in defect" in str(caught.value.__cause__)


def test_a_full_disk_is_still_a_full_disk(two):
    with pytest.raises(OSError, match="No space left") as caught:
        list(two(shards.disk_full, range(8)))
    assert (caught.value.errno, caught.value.filename) == (28, "/store/out")


def test_an_exception_or_a_result_that_cannot_travel_is_told(two):
    with pytest.raises(RuntimeError, match="Stubborn: first"):
        list(two(shards.raise_stubborn, range(8)))
    with pytest.raises(Exception, match="pickle"):
        list(two(shards.unpicklable, range(8)))


@pytest.mark.parametrize("function", [shards.killed, shards.killed_with_a_child])
def test_a_killed_worker_is_a_sentence_that_names_the_shard_and_what_to_do(function):
    with worker_pool(Execution(num_workers=2), "dedup") as map_shards:
        with pytest.raises(StageFailedError) as caught:
            list(map_shards(function, range(20)))
        assert str(caught.value) == (
            "Shard 4 of 20 of dedup (3) was killed (SIGKILL), most often because the machine ran out of memory: run again with fewer workers "
            "(execution.num_workers=1), or free some memory."
        )
        assert list(map_shards(shards.square, range(4))) == [0, 1, 4, 9]


def test_a_worker_that_leaves_or_is_stopped_is_told(tmp_path):
    with worker_pool(Execution(num_workers=2), "dedup") as map_shards:
        with pytest.raises(StageFailedError, match=r"Shard 1 of 4 of dedup \(0\) ended its process with exit code 7"):
            list(map_shards(shards.leave, range(4)))
        with pytest.raises(PreemptedError, match="stopped from outside"):
            list(map_shards(shards.stopped, range(4)))


def test_a_worker_that_was_killed_while_it_had_nothing_to_do_is_replaced():
    with worker_pool(Execution(num_workers=2), "dedup") as map_shards:
        for pid in {one["pid"] for one in map_shards(shards.describe, range(12))}:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: not alive(pid))
        assert list(map_shards(shards.square, range(4))) == [0, 1, 4, 9]


def test_a_cluster_is_refused_with_the_way_to_get_one():
    with pytest.raises(RecipeError, match=r"only the Prefect flow can use a cluster: run `python -m flows.pipeline RECIPE`"):
        worker_pool(Execution(task_runner="dask"), "dedup").__enter__()


def test_pesc_run_refuses_a_cluster_before_it_builds_and_hits_need_none(fakes, store, tiny_recipe):
    elsewhere = tiny_recipe(execution={"task_runner": "ray"})
    with pytest.raises(RecipeError, match=r"^execution.task_runner is 'ray', but only the Prefect flow"):
        run_recipe(elsewhere, store)
    assert fakes.CALLS == []
    built = run_recipe(tiny_recipe(), store)
    assert {outcome.how for outcome in run_recipe(elsewhere, store).values()} == {"hit"}  # the execution block is in no key
    assert len(built) == 14


def test_an_address_without_a_task_runner_is_an_error():
    with pytest.raises(ValidationError, match="set task_runner to dask or ray"):
        Execution(cluster="tcp://node:8786")
    assert Execution(task_runner="dask", cluster="tcp://node:8786").cluster == "tcp://node:8786"


def test_workers_are_counted_by_the_cores_that_may_be_used():
    assert count_workers(Execution()) == len(os.sched_getaffinity(0))
    assert count_workers(Execution(num_workers=5)) == 5


def test_a_worker_loads_neither_tensors_nor_prefect():
    code = "import sys, pesc.launch.pool; sys.exit(bool({'torch', 'numpy', 'prefect'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=child_environment(), check=False).returncode == 0


# --- nothing stays behind ------------------------------------------------------------------------------------------------------


def start_caller(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A program with two workers in the middle of their shards, and their pids; a process group of its own, as in a terminal."""
    caller = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.shards", str(folder)],
        env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    return caller, [read_pid(folder / f"{number}.pid") for number in (0, 1)]


def test_workers_die_with_a_parent_that_was_killed(tmp_path):
    caller, pids = start_caller(tmp_path)
    assert all(map(alive, pids))
    caller.kill()
    caller.wait()
    wait_for(lambda: not any(map(alive, pids)), 5, "the end of the workers")


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, True)])
def test_an_interrupted_program_ends_at_once_and_the_workers_say_nothing(tmp_path, number, whole_group):
    caller, pids = start_caller(tmp_path)
    os.killpg(caller.pid, number) if whole_group else caller.send_signal(number)
    started = time.monotonic()
    output, _ = caller.communicate(timeout=10)
    wait_for(lambda: not any(map(alive, pids)), 5, "the end of the workers")
    assert time.monotonic() - started < 5
    assert output.count(b"Traceback") == (1 if number == signal.SIGINT else 0)  # the program's own; its workers have none
    assert b"KeyboardInterrupt" in output or number == signal.SIGTERM


# --- isolated stages -----------------------------------------------------------------------------------------------------------


def context(tmp_path: Path, execution: Execution, **options) -> StageContext:
    for name in ("in", "out", "work"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(7):
        (tmp_path / "in" / f"{number}.txt").write_text("x" * number)
    return StageContext("toy", ToyConfig(), {"text": tmp_path / "in"}, tmp_path / "out", tmp_path / "work", execution, **options)


def toy(builder: str) -> Stage:
    return Stage("toy", ToyConfig, 1, f"tests.launch.shards:{builder}", ())


CLUSTER = Execution(task_runner="dask")  # who does the shards is the caller's affair: here, functions of the test


def test_an_isolated_stage_has_workers_of_its_own(tmp_path):
    made = []
    for workers in (1, 2):
        ctx = context(tmp_path / str(workers), Execution(num_workers=workers), map_shards=lambda *_: pytest.fail("not the caller's affair"))
        assert build_isolated(toy("build_sizes"), ctx).metrics["shards"] == 21
        made.append((ctx.out / "data.json").read_bytes())
    assert made[0] == made[1]
    assert b'["6.txt", 12]' in made[0]


def test_an_isolated_stage_s_shards_are_done_by_the_caller_s_cluster(tmp_path):
    calls, progress = [], []

    def map_shards(function, items):
        calls.append(len(items))
        for item in items:
            time.sleep(0.02)
            yield function(item)

    ctx = context(tmp_path / "a", CLUSTER, map_shards=map_shards, on_progress=progress.append)
    result = build_isolated(toy("build_sizes"), ctx)
    assert result.metrics["pid"] != os.getpid()
    assert calls == [21, 21]
    assert progress[-1].done == 21
    assert len(progress) > 1
    plain = context(tmp_path / "b", Execution(num_workers=1))
    shards.build_sizes(plain)
    assert (ctx.out / "data.json").read_bytes() == (plain.out / "data.json").read_bytes()
    assert [path.name for path in ctx.work.iterdir() if path.name.startswith("shards-")] == []


@pytest.mark.parametrize("execution", [Execution(num_workers=2), CLUSTER])
def test_a_bad_shard_of_an_isolated_stage_is_the_same_error(tmp_path, execution):
    ctx = context(tmp_path, execution)
    with pytest.raises(DataError, match=r"^rows.jsonl, row 5: no answer; give it one.$"):
        build_isolated(toy("build_failing"), ctx)


def test_an_isolated_stage_that_is_stopped_leaves_no_workers(tmp_path):
    def stop(_progress):
        raise KeyboardInterrupt

    ctx = context(tmp_path, Execution(num_workers=2), on_progress=stop)
    with pytest.raises(KeyboardInterrupt):
        build_isolated(toy("build_napping_with_progress"), ctx)
    pids = [int(path.read_text()) for path in ctx.work.glob("*.pid")]
    assert len(pids) == 2
    wait_for(lambda: not any(map(alive, pids)), 5, "the end of the workers")
