"""Prefect's temporary server, on a user's machine as it is."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import prefect
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

from flows.server import ServerError, answers, readable_database, server_sentence, start_server

ROOT = Path(__file__).resolve().parents[2]


def write_revision(home, revision):
    home.mkdir(exist_ok=True)
    with sqlite3.connect(home / "prefect.db") as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES (?)", [revision])


@pytest.fixture
def home(tmp_path):
    """A Prefect home that the settings point to, without a server."""
    path = tmp_path / "home"
    updates = {PREFECT_HOME: path, PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{path}/prefect.db", PREFECT_API_URL: None}
    with temporary_settings(updates):
        yield path


def test_a_fresh_home_and_a_known_database_are_used_as_they_are(home):
    assert readable_database(home) is None
    migrations = Path(prefect.__file__).parent / "server/database/_migrations/versions/sqlite"
    write_revision(home, sorted(migrations.glob("*.py"))[-1].name.split("_")[4])
    assert readable_database(home) is None


def test_a_database_of_a_newer_prefect_is_left_alone(home):
    write_revision(home, "27d8f4e1a6c9")
    assert readable_database(home) == home / f"prefect-{prefect.__version__}.db"


def test_a_database_that_the_user_chose_is_not_replaced(home):
    write_revision(home, "27d8f4e1a6c9")
    with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: "sqlite+aiosqlite:////elsewhere/mine.db"}):
        assert readable_database(home) is None


def test_only_complaints_about_the_server_become_sentences():
    assert server_sentence(RuntimeError("a defect")) is None
    assert "prefect server start" in server_sentence(RuntimeError("Failed to reach API at http://127.0.0.1:9/api/."))


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_at_once(home):
    write_revision(home, "27d8f4e1a6c9")
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"did not start \(.*27d8f4e1a6c9.*PREFECT_HOME=DIR"):
        start_server()
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_run_works_beside_a_database_of_a_newer_prefect(recipe_file, tmp_path):
    write_revision(tmp_path / "home", "27d8f4e1a6c9")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment["PREFECT_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-m", "flows.pipeline", recipe_file, "--only", "download", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 built, 0 cached." in done.stdout
    assert "was written by a newer Prefect" in done.stderr
    with sqlite3.connect(tmp_path / "home" / f"prefect-{prefect.__version__}.db") as connection:
        states = connection.execute("SELECT state_type FROM task_run").fetchall()
        messages = connection.execute("SELECT message FROM log").fetchall()
    assert states == [("COMPLETED",)] * 2, "everything reached the server before it stopped"
    assert any("Finished in state Completed" in message for (message,) in messages)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert "0 built, 2 cached." in again.stdout


KEPT = """
import os, sys, time
from flows.server import server_settings
from prefect.settings import PREFECT_API_URL
with server_settings():
    print(PREFECT_API_URL.value(), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_temporary_server_dies_with_its_parent(tmp_path, number):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment["PREFECT_HOME"] = str(tmp_path / "home")
    with subprocess.Popen([sys.executable, "-c", KEPT], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        url = parent.stdout.readline().strip()
        assert answers(url)
        parent.send_signal(number)
        parent.wait(30)
        end = time.monotonic() + 30
        while answers(url) and time.monotonic() < end:
            time.sleep(0.2)
        assert not answers(url)
