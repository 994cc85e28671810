"""Independent benchmarks at the same time: as many as the recipe says, with the bytes of one after another."""

from __future__ import annotations

import os
import sys
import time

import pytest

from pesc.errors import HolesError
from pesc.launch import side_by_side
from pesc.launch.side_by_side import SideBySide, gpu_of_slot
from pesc.plan import Selection
from pesc.run import run_recipe
from pesc.stage import Execution
from pesc.store import Store

NAMES = ("quiz", "exam", "test", "oral")


@pytest.fixture
def trace(tmp_path, monkeypatch, fakes):
    folder = tmp_path / "trace"
    folder.mkdir()
    monkeypatch.setenv("PESC_TEST_TRACE", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(side_by_side, "PROGRAM", (sys.executable, "-m", "tests.launch.fake_job"))
    return folder


@pytest.fixture
def recipe(tiny_recipe, store, fakes):
    """Four benchmarks of one dense model that the store has."""
    benchmarks = {name: {"task": f"arc_{name}", "metric": "acc"} for name in NAMES}

    def make(slots: int):
        made = tiny_recipe(evaluate={"benchmarks": benchmarks}, execution={"parallel_benchmarks": slots})
        return made

    run_recipe(make(1), store, Selection(until=("merge",)))
    fakes.CALLS.clear()
    return make


def test_two_at_a_time_overlap_and_give_what_one_after_another_gives(recipe, store, trace, fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("PESC_TEST_MEET", "pesc-quiz,pesc-exam")
    seen = []
    chosen = Selection(until=("evaluate[pesc]",))
    outcomes = run_recipe(recipe(2), store, chosen, on_progress=lambda progress: seen.append(progress.message))
    met = {path.stem: int(path.read_text()) for path in trace.glob("*.met")}
    assert set(met) == {f"pesc-{name}" for name in NAMES}
    assert max(met.values()) == 2
    assert fakes.CALLS == [], "nothing was built in this process"
    assert list(outcomes)[-4:] == [f"evaluate[pesc/{name}]" for name in NAMES]
    assert {outcome.how for address, outcome in outcomes.items() if address.startswith("evaluate")} == {"built"}
    assert {f"evaluate[pesc/{name}]" for name in NAMES} <= {message.partition(" ")[0] for message in seen}
    serial = run_recipe(recipe(1), Store(tmp_path / "serial"), chosen)
    assert {address: outcome.ref for address, outcome in serial.items()} == {address: outcome.ref for address, outcome in outcomes.items()}


def test_one_that_fails_or_is_killed_leaves_the_others(recipe, store, trace, monkeypatch):
    monkeypatch.setenv("PESC_TEST_FAIL", "pesc-exam")
    monkeypatch.setenv("PESC_TEST_DIE", "pesc-quiz")
    with pytest.raises(HolesError) as caught:
        run_recipe(recipe(3), store, Selection(until=("evaluate[pesc]",)))
    assert {address for address in caught.value.finished if address.startswith("evaluate")} == {
        "evaluate[pesc/test]",
        "evaluate[pesc/oral]",
    }
    sentence = str(caught.value)
    assert "evaluate[pesc/exam]: evaluate[pesc/exam] failed as asked: row 3 of data.json has no answer." in sentence
    assert "evaluate[pesc/quiz]: evaluate[pesc/quiz] was killed (SIGKILL), most often because the machine ran out of memory" in sentence


def test_whatever_ends_the_loop_ends_the_processes(recipe, store, trace, monkeypatch):
    monkeypatch.setenv("PESC_TEST_MEET", "pesc-quiz,nobody")
    started = time.monotonic()

    def interrupt(progress):
        if "waiting" in progress.message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(2), store, Selection(until=("evaluate[pesc]",)), on_progress=interrupt)
    pid = int((trace / "pesc-quiz.running").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert time.monotonic() - started < 55, "it did not wait for the builder"


def test_each_slot_has_a_gpu_of_its_own_as_far_as_there_are_some(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert [gpu_of_slot(slot, Execution())["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3", "7", "3"]
    assert gpu_of_slot(0, Execution(device="cpu")) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_of_slot(0, Execution()) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("pesc.provenance.hardware", lambda: {"gpus": ["NVIDIA H100 80GB", "NVIDIA H100 80GB"]})
    assert gpu_of_slot(1, Execution())["CUDA_VISIBLE_DEVICES"] == "1"


def test_it_refuses_a_thread(store):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(SideBySide, store, 2).result()
