"""The shared body of the tasks."""

import logging
import time

import pytest
from prefect import flow

from pesc.build import make_job
from pesc.errors import StoreError
from pesc.pipeline import STAGE_NAMES, build_graph
from tasks.execution import library_records, run_job
from tasks.table import TASKS


def test_every_stage_has_a_task_of_its_own():
    assert tuple(TASKS) == STAGE_NAMES
    assert [task.name for task in TASKS.values()] == list(STAGE_NAMES)
    assert len({task.task_key for task in TASKS.values()}) == len(STAGE_NAMES)


@pytest.mark.usefixtures("prefect_server")
def test_a_result_that_vanished_is_a_sentence(fakes, store, tiny_recipe, monkeypatch):
    recipe = tiny_recipe()
    job = make_job(build_graph(recipe).by_address["download[base]"], recipe, {})
    monkeypatch.setattr(type(store), "find", lambda *_: None)

    @flow
    def alone():
        return run_job(TASKS["download"], job, store)

    with pytest.raises(StoreError, match="its result is not in"):
        alone()


@pytest.mark.usefixtures("prefect_server")
def test_the_library_s_records_reach_the_server_only_while_a_flow_runs():
    from tests.flows.observe import logs

    logger = logging.getLogger("pesc")
    before = logger.level, list(logger.handlers)

    @flow
    def speaking():
        with library_records():
            logging.getLogger("pesc.data.anything").info("kept 312 rows")
        time.sleep(0.1)

    state = speaking(return_state=True)
    assert "kept 312 rows" in logs(state.state_details.flow_run_id, "kept 312")
    assert (logger.level, logger.handlers) == before


@pytest.mark.usefixtures("prefect_server")
def test_a_flow_that_is_stopped_ends_its_benchmarks_and_their_tasks(fakes, store, tiny_recipe, tmp_path, monkeypatch):
    """What a cancellation does: it is raised in the main thread, which started the processes."""
    import os
    import sys

    from pesc.launch import side_by_side
    from pesc.plan import Selection
    from pesc.run import run_recipe
    from tasks.execution import run_jobs_at_once

    monkeypatch.setenv("PESC_TEST_TRACE", str(tmp_path))
    monkeypatch.setenv("PESC_TEST_MEET", "pesc-quiz,pesc-exam,nobody")
    monkeypatch.setattr(side_by_side, "PROGRAM", (sys.executable, "-m", "tests.launch.fake_job"))
    recipe = tiny_recipe(evaluate={"benchmarks": {name: {"task": f"arc_{name}", "metric": "acc"} for name in ("quiz", "exam", "oral")}})
    refs = {a: outcome.ref for a, outcome in run_recipe(recipe, store, Selection(until=("merge[pesc]",))).items()}
    nodes = [node for node in build_graph(recipe).nodes if node.address.startswith("evaluate[pesc/")]
    started = time.monotonic()

    class Stopped(BaseException):
        pass

    def stop(_self, _progress):
        if len(list(tmp_path.glob("*.running"))) == 2:
            raise Stopped

    monkeypatch.setattr("tasks.execution.ProgressReport.__call__", stop)

    @flow
    def several():
        jobs = [(TASKS["evaluate"], make_job(node, recipe, refs)) for node in nodes]
        try:
            return list(run_jobs_at_once(jobs, 2, store))
        except Stopped:
            return "stopped"

    assert several() == "stopped"
    assert time.monotonic() - started < 50, "it waited for no builder"
    pids = [int(path.read_text()) for path in tmp_path.glob("*.running")]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
