from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from pesc.errors import DataError
from pesc.stage import Execution
from pesc.train.job import Job, Status, read_errors, read_job, read_status, record_error, write_status
from tests.train.tiny import settings


def test_a_job_survives_its_file(tmp_path):
    (tmp_path / "model").mkdir()
    job = Job(
        "train[pesc]", settings(), Execution(num_processes=2), tmp_path / "model", tmp_path / "blocks", tmp_path, "cpu", 12, logging.INFO
    )
    assert read_job(job.write()) == job


def test_a_status_survives_its_file(tmp_path):
    assert read_status(tmp_path) is None
    status = Status("interrupted", 5, "signal", {"loss": 1.5})
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status


def test_the_error_that_matters_comes_first(tmp_path):
    """The ranks that lost their peer fail too, maybe earlier."""
    errors = {
        0: RuntimeError("gloo: Connection closed by peer [127.0.0.1]"),
        1: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        2: DataError("block 3 is broken."),
        3: ZeroDivisionError("a defect"),
    }
    for rank, error in errors.items():
        record_error(tmp_path, rank, error)
        os.utime(tmp_path / f"rank_{rank}.json", (100 + rank, 100 + rank))
    first, second, third, last = read_errors(tmp_path)
    assert (first.kind, first.message, first.rank) == ("DataError", "block 3 is broken.", 2)
    assert (second.kind, second.rank) == ("out of memory", 1)
    assert (third.kind, third.rank) == ("", 3)
    assert "ZeroDivisionError: a defect" in third.trace
    assert (last.kind, last.rank) == ("lost peer", 0)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_running_out_of_memory_is_recognised(tmp_path, error):
    record_error(tmp_path, 0, error)
    assert read_errors(tmp_path)[0].kind == "out of memory"


def test_a_run_is_named_by_what_it_trains(tmp_path):
    """Two models trained with equal settings are two runs, wherever the workspaces are."""

    def named(model, blocks, work):
        return Job("train[pesc]", settings(), Execution(), Path("objects") / model, Path("objects") / blocks, work, "cpu", 9, 20).run_id

    assert named("a", "b", tmp_path / "x") == named("a", "b", tmp_path / "y")
    assert len({named("a", "b", tmp_path), named("c", "b", tmp_path), named("a", "d", tmp_path)}) == 3
