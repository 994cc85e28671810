"""Prefect's temporary server, on a user's machine as it is."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import prefect
import pytest
from packaging.version import Version
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    temporary_settings,
)

from flows.server import ServerError, answers, check_server, readable_database, server_sentence, start_server

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
    with pytest.raises(ServerError, match=r"written by a newer Prefect than .*PREFECT_HOME=DIR"):
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


def older_revision():
    migrations = Path(prefect.__file__).parent / "server/database/_migrations/versions/sqlite"
    return sorted(migrations.glob("2*.py"))[-3].name.split("_")[4]


def test_a_database_of_an_older_prefect_is_used_and_its_user_is_told(home, caplog):
    write_revision(home, older_revision())
    assert readable_database(home) is None
    assert "is of an older Prefect and is brought up to" in caplog.text


class Answers(BaseHTTPRequestHandler):
    """A server that says a version, or refuses."""

    def do_GET(self):
        version, status, password = self.server.version, self.server.status, self.headers.get("Authorization")
        if self.server.password and password != f"Basic {b64encode(self.server.password.encode()).decode()}":
            status, version = 401, '{"exception_message": "Unauthorized"}'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(version.encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def answering():
    """A factory: the URL of a server that gives this answer."""
    servers = []

    def make(version, status=200, password=None):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        server.version, server.status, server.password = version, status, password
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/api"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url, auth=None):
    """What checking a server raises, in a fresh process's settings."""
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: auth}):
        check_server(url)


MINE = ".".join(map(str, Version(prefect.__version__).release[:2]))


@pytest.mark.parametrize("version", [prefect.__version__, f"{MINE}.99", f"{Version(prefect.__version__).major}.99.0"])
def test_a_server_of_the_same_time_or_newer_is_used(answering, caplog, version):
    ask(answering(f'"{version}"'))
    assert "older than this program" not in caplog.text


def test_an_older_server_is_a_warning_that_says_what_to_upgrade(answering, caplog):
    ask(answering(f'"{Version(prefect.__version__).major}.0.0"'))
    assert "older than this program's" in caplog.text
    assert "Upgrade it first, then workers and clients" in caplog.text


@pytest.mark.parametrize(
    ("version", "status", "says"),
    [
        ('"2.20.25"', 200, r"is 2\.20\.25, and this program has .*: they cannot talk\. Upgrade the server\."),
        ('"99.0.0"', 200, r"is 99\.0\.0, .* Upgrade this program\."),
        ('"a web shop"', 200, "is no Prefect server"),
        ("<html>", 200, "is no Prefect server"),
        ("{}", 404, r"is no Prefect server \(HTTP 404\)\. Set PREFECT_API_URL to its API"),
        ("{}", 418, "answers with HTTP 418"),
    ],
)
def test_another_server_is_a_sentence(answering, version, status, says):
    with pytest.raises(ServerError, match=says):
        ask(answering(version, status))


def test_a_server_with_a_password_says_what_to_set_and_shows_none(answering):
    url = answering(f'"{prefect.__version__}"', password="admin:correct-horse")
    with pytest.raises(ServerError, match=r"refuses who gives no password \(HTTP 401\)\. Set PREFECT_API_AUTH_STRING to USER:PASSWORD"):
        ask(url)
    with pytest.raises(ServerError, match="refuses the user and password of PREFECT_API_AUTH_STRING") as error:
        ask(url, "admin:battery-staple")
    assert "battery" not in str(error.value)
    ask(url, "admin:correct-horse")


def test_no_server_is_a_sentence_without_the_password_of_its_url():
    with pytest.raises(ServerError, match=r"No Prefect server answers at http://\*\*\*@127\.0\.0\.1:9/api") as error:
        ask("http://ada:s3cret@127.0.0.1:9/api")
    assert "s3cret" not in str(error.value)


@pytest.mark.slow
def test_a_newer_database_that_the_user_chose_is_a_sentence(tmp_path, home):
    write_revision(tmp_path / "elsewhere", "27d8f4e1a6c9")
    chosen = f"sqlite+aiosqlite:///{tmp_path}/elsewhere/prefect.db"
    with (
        temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: chosen}),
        pytest.raises(
            ServerError, match=r"elsewhere/prefect\.db was written by a newer Prefect than .*PREFECT_API_DATABASE_CONNECTION_URL"
        ),
    ):
        start_server()


@pytest.mark.slow
def test_a_real_database_of_an_older_prefect_is_brought_up_to_date(recipe_file, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(tmp_path / "home")
    }
    downgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y", "-r", older_revision()]
    subprocess.run(downgrade, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=240)
    command = [sys.executable, "-m", "flows.pipeline", recipe_file, "--only", "download", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "is of an older Prefect and is brought up to" in done.stderr


@pytest.mark.slow
def test_a_temporary_server_with_a_password_is_used_by_who_started_it(recipe_file, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_API_AUTH_STRING": "admin:correct-horse"}
    command = [sys.executable, "-m", "flows.pipeline", recipe_file, "--only", "download", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 built, 0 cached." in done.stdout
