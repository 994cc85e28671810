from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pesc.errors import DataError, PreemptedError, StageFailedError
from pesc.launch.isolated import build_isolated, ended_badly
from pesc.launch.supervise import Outcome, child_environment
from pesc.pipeline import Stage
from pesc.stage import StageContext
from tests.launch.programs import ToyConfig
from tests.launch.test_supervise import alive, wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def context(tmp_path):
    for name in ("in", "out", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "in.txt").write_text("bytes")
    progress = []
    ctx = StageContext(
        "toy", ToyConfig(words=("x", "y")), {"text": tmp_path / "in"}, tmp_path / "out", tmp_path / "work", on_progress=progress.append
    )
    return ctx, progress


def toy(builder: str) -> Stage:
    return Stage("toy", ToyConfig, 1, f"tests.launch.programs:{builder}", ())


def test_result_progress_and_log_come_back(context, caplog):
    ctx, progress = context
    caplog.set_level(logging.INFO, "pesc")
    result = build_isolated(toy("build_words"), ctx)
    assert result.metrics["pid"] != os.getpid()
    assert result.provenance == {"torch": False}
    assert (ctx.out / "y").read_text() == "bytes"
    assert (progress[-1].done, progress[-1].total, progress[-1].unit, progress[-1].message, dict(progress[-1].fields)) == (
        2,
        2,
        "words",
        "y",
        {"loss": 0.5},
    )
    record = next(r for r in caplog.records if r.name == "pesc.toy")
    assert (record.levelname, record.getMessage()) == ("WARNING", "about to write 2 words")
    log = (ctx.work / "log.txt").read_text()
    assert "a library's warning" in log
    assert "a library's print" in log
    assert "about to write" not in log


def test_an_error_of_the_user_keeps_its_class_and_sentence(context):
    with pytest.raises(DataError) as caught:
        build_isolated(toy("build_user_error"), context[0])
    assert type(caught.value) is DataError
    assert str(caught.value) == "rows.parquet, row 3: no messages; remove the row."


def test_a_defect_comes_with_the_tail_of_the_log_and_its_path(context):
    with pytest.raises(StageFailedError) as caught:
        build_isolated(toy("build_defect"), context[0])
    assert "toy failed with exit code 1" in str(caught.value)
    assert "last words of the builder" in str(caught.value)
    assert "ZeroDivisionError: a defect" in str(caught.value)
    assert str(context[0].work / "log.txt") in str(caught.value)


def test_a_killed_child_is_said_in_a_sentence(context):
    with pytest.raises(StageFailedError, match=r"toy was killed \(SIGKILL\), most often because the machine ran out of memory"):
        build_isolated(toy("build_killed"), context[0])


def test_a_result_of_an_earlier_run_is_not_taken_for_this_one(context):
    ctx, _ = context
    build_isolated(toy("build_words"), ctx)
    with pytest.raises(StageFailedError):
        build_isolated(toy("build_killed"), ctx)


def test_a_stop_from_outside_is_a_preemption():
    error = ended_badly("toy", Outcome(-15, "tail"), Path("log.txt"))
    assert isinstance(error, PreemptedError)
    assert "SIGTERM" in str(error)


def test_a_crash_names_its_signal():
    assert "SIGSEGV" in str(ended_badly("toy", Outcome(-11, ""), Path("log.txt")))


def test_an_interrupted_caller_stops_the_child_and_its_children(context):
    ctx, _ = context

    def stop(_progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_isolated(toy("build_forever"), StageContext(ctx.address, ctx.config, ctx.inputs, ctx.out, ctx.work, on_progress=stop))
    pids = [int(text) for text in (ctx.work / "pids").read_text().split()]
    wait_for(lambda: not any(map(alive, pids)), what="the end of the child tree")


def test_the_child_finds_the_package_from_any_directory(context, tmp_path, monkeypatch):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("raise ImportError('shadowed')")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert build_isolated(toy("build_words"), context[0]).metrics["pid"]


def test_importing_it_imports_no_torch():
    code = "import sys, pesc.launch.isolated, pesc.launch.torchrun; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=child_environment(), check=False).returncode == 0
