"""`python -m flows.pipeline`: what a terminal shows."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import console
from pesc.errors import DataError
from pesc.store import ArtifactRef

ROOT = Path(__file__).resolve().parents[2]


def call(monkeypatch, capsys, *arguments):
    """Run the program in this process; returns exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["flows.pipeline", *arguments])
    monkeypatch.setattr(console, "quiet_console", lambda: None)
    code = 0
    try:
        console.main()
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("prefect_server")
def test_a_run_ends_with_a_line_an_action_the_table_and_the_report(recipe_file, store, monkeypatch, capsys):
    monkeypatch.setattr(console, "render_report", lambda place, outcome: f"61.0\n\nReport: {place.open(outcome.ref)}/report.html")
    code, out, _ = call(monkeypatch, capsys, recipe_file, "--store", str(store.root))
    assert code == 0
    assert "14 built, 0 cached." in out
    assert "train[pesc]" in out
    assert "61.0" in out
    page = Path(out.rpartition("Report: ")[2].strip())
    assert page.read_text() == "<p>quiz</p>"
    code, out, _ = call(monkeypatch, capsys, recipe_file, "--store", str(store.root), "--refresh", "report", "--until", "report")
    assert "1 built, 13 cached." in out


@pytest.mark.usefixtures("prefect_server")
def test_a_failure_is_one_sentence_and_exit_code_1(recipe_file, fakes, store, monkeypatch, capsys):
    fakes.FAIL_AT.add("dedup")
    code, _, err = call(monkeypatch, capsys, recipe_file, "--store", str(store.root))
    assert code == 1
    assert err.strip().splitlines()[-1] == "pesc: dedup failed as asked: row 3 of data.json has no answer. Give it one."


def test_a_missing_recipe_never_starts_a_server(tmp_path):
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, "-m", "flows.pipeline", "demmo", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "pesc: There is no recipe 'demmo'. Did you mean 'demo'? Known: " + done.stderr.partition("Known: ")[2]
    assert "Traceback" not in done.stderr


def test_a_server_that_does_not_answer_is_a_sentence(recipe_file, tmp_path):
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, "-m", "flows.pipeline", recipe_file, "--store", str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("pesc: No Prefect server answers at http://127.0.0.1:9/api. Start it")
    assert "Traceback" not in done.stderr


def test_dispatching_needs_the_server_of_the_workers(recipe_file, store, monkeypatch, capsys):
    with temporary_settings({PREFECT_API_URL: None}):
        code, _, err = call(monkeypatch, capsys, recipe_file, "--store", str(store.root), "--dispatch")
    assert code == 1
    assert err == "pesc: --dispatch needs the Prefect server that the workers know: set PREFECT_API_URL to its API.\n"


def test_the_terminal_shows_our_records_and_other_people_s_warnings():
    shown = console.ProjectRecords()

    def record(name, level, path):
        return logging.LogRecord(name, level, str(path), 1, "text", None, None)

    engine = Path(console.__file__).parents[1] / ".venv/lib/python3.11/site-packages/prefect/task_engine.py"
    assert shown.filter(record("prefect.flow_runs", logging.INFO, ROOT / "flows/chain.py"))
    assert shown.filter(record("pesc.data.dedup", logging.INFO, ROOT / "pesc/data/dedup.py"))
    assert shown.filter(record("urllib3", logging.WARNING, "/lib/urllib3.py"))
    assert not shown.filter(record("prefect.task_runs", logging.ERROR, engine))
    assert not shown.filter(record("httpx", logging.INFO, "/lib/httpx.py"))
    assert not shown.filter(record("prefect.flow_runs", logging.ERROR, ROOT / "flows/hooks.py"))


def test_a_cached_action_shows_no_time(store):
    from pesc.build import Outcome

    ref = ArtifactRef(stage="mix", fingerprint="f" * 64, digest="d" * 64, size_bytes=1)
    text = console.render_outcomes(store, {"mix": Outcome("mix", ref, "hit", 0.3), "dedup": Outcome("dedup", ref, "built", 61.25)})
    assert text.splitlines()[:2] == ["cached             mix  dddddddd", "built      61.2 s  dedup  dddddddd"]


def test_an_unknown_error_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(console, "app", lambda: (_ for _ in ()).throw(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        console.main()
    monkeypatch.setattr(console, "app", lambda: (_ for _ in ()).throw(DataError("row 3.")))
    with pytest.raises(SystemExit):
        console.main()
    assert capsys.readouterr().err == "pesc: row 3.\n"
