"""Who finds an action being built waits for it, is told by whom, and may be stopped."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pesc.build import build_or_open, make_job
from pesc.errors import StoreBusyError
from pesc.pipeline import build_graph
from pesc.stage import Execution
from pesc.store import Store
from pesc.store.workspace import locked_workspace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(fakes, tiny_recipe):
    recipe = tiny_recipe()
    return make_job(build_graph(recipe).by_address["download[rows]"], recipe, {})


def patient(job, seconds):
    return job.model_copy(update={"execution": Execution(wait_seconds=seconds)})


def test_the_limit_is_a_sentence_with_the_holder(store, job):
    with store.workspace("download", job.fingerprint, job.label):
        started = time.monotonic()
        with pytest.raises(StoreBusyError, match=rf"process {os.getpid()} on .* since .*; waited 1 s.*execution\.wait_seconds"):
            build_or_open(store, patient(job, 1))
        assert 1 <= time.monotonic() - started < 5


def test_the_waiting_one_takes_the_result_and_builds_nothing(store, job, fakes, caplog):
    heard, results = [], []
    with caplog.at_level(logging.WARNING):
        with store.workspace("download", job.fingerprint, job.label) as workspace:
            thread = threading.Thread(target=lambda: results.append(build_or_open(store, job, heard.append)))
            thread.start()
            time.sleep(0.6)
            assert thread.is_alive()
            from pesc.build import _build
            from pesc.pipeline import stage_named

            workspace.clear_output()
            from pesc.launch.pool import worker_pool

            manifest = _build(store, stage_named("download"), job, workspace, lambda _p: None, worker_pool)
            store.commit(manifest)
            workspace.discard()
        thread.join(30)
    (outcome,) = results
    assert outcome.how == "hit"
    assert outcome.ref == manifest.ref
    assert fakes.CALLS == ["download[rows]"]
    assert f"{job.label} is being done by process {os.getpid()} on" in caplog.text
    assert any(f"waits for process {os.getpid()}" in progress.message for progress in heard)


def test_the_waiting_one_builds_when_the_holder_gives_up(store, job, fakes):
    results = []
    with store.workspace("download", job.fingerprint, job.label):
        thread = threading.Thread(target=lambda: results.append(build_or_open(store, job)))
        thread.start()
        time.sleep(0.4)
    thread.join(30)
    assert results[0].how == "built"
    assert fakes.CALLS == ["download[rows]"]


def test_ctrl_c_ends_the_waiting(store, job, tmp_path):
    code = (
        "import sys; from pathlib import Path; from pesc.build import Job, build_or_open; from pesc.store import Store\n"
        "print('waiting', flush=True); build_or_open(Store(sys.argv[1]), Job.model_validate_json(Path(sys.argv[2]).read_text()))"
    )
    (tmp_path / "job.json").write_text(job.model_dump_json())
    with store.workspace("download", job.fingerprint, job.label):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(store.root), str(tmp_path / "job.json")], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout
        assert process.stdout.readline() == b"waiting\n"
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0
        process.stdout.close()


def test_machines_that_train_together_do_not_wait_for_one_another(store, fakes, tiny_recipe):
    recipe = tiny_recipe(execution={"num_nodes": 2, "master": "node0:29500"})
    node = build_graph(recipe).by_address["train[pesc]"]
    from pesc.plan import Selection
    from pesc.run import run_recipe

    outcomes = run_recipe(recipe, store, Selection(until=("upcycle", "tokenize")))
    job = make_job(node, recipe, {address: outcome.ref for address, outcome in outcomes.items()})
    with store.workspace("train", job.fingerprint, job.label), pytest.raises(StoreBusyError, match="is being built by process"):
        build_or_open(Store(store.root), job)


def test_a_workspace_that_goes_while_it_is_being_made_is_made_again(tmp_path, monkeypatch):
    """`mkdir(exist_ok=True)` fails where the holder removes the directory between its two questions."""
    root, calls, make = tmp_path / "work" / "merge" / "ab", [], os.mkdir

    def mkdir(path, *args, **kwargs):
        if Path(path) == root and not calls:
            calls.append(path)
            raise FileExistsError(17, "File exists", str(path))
        return make(path, *args, **kwargs)

    (tmp_path / "work" / "merge").mkdir(parents=True)
    monkeypatch.setattr(os, "mkdir", mkdir)
    with locked_workspace(root, "merge[pesc]") as workspace:
        assert calls
        assert workspace.root.is_dir()


def test_a_file_where_a_workspace_would_be_is_said(tmp_path):
    (tmp_path / "ab").write_text("")
    with pytest.raises(FileExistsError), locked_workspace(tmp_path / "ab", "merge[pesc]"):
        pass
