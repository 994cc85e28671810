"""Real servers for tests: Debian's PostgreSQL and `prefect server start`, each with a folder, a port and a password of its own.

    from tests.deployments.servers import postgres, postgres_prefect, prefect     # fixtures: import them into a test module

    postgres            a running PostgreSQL cluster; `postgres.database()` is the URL of a new, empty database (session)
    postgres_prefect    a `prefect server` on it, with its scheduler, triggers and other services (module)
    prefect             the same on SQLite (module)

`PrefectServer` is also used directly, as a context manager: with a password (`auth`), with the UI, killed and started again on its port.
Nothing outlives the test process: servers die with it whatever kills it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from pesc.launch.guard import PARENT_VARIABLE
from pesc.launch.supervise import child_environment
from tests.fake_stages import tiny_recipe_dict

ROOT = Path(__file__).resolve().parents[2]
PREFECT = [sys.executable, "-m", "prefect"]
T = TypeVar("T")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], T], seconds: float, what: str = "the condition") -> T:
    """What the condition returns, once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if value := condition():
                return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:g} s in vain for {what}")


def postgres_programs() -> Path | None:
    """The folder with the newest `initdb` and `postgres` of this machine: of Debian's package, or of the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parents[1].name))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return Path(on_path).resolve().parent if on_path else None


class Postgres:
    """A cluster on 127.0.0.1 in a temporary folder, without fsync.  As root it runs as another user, for PostgreSQL refuses root."""

    def __init__(self, programs: Path) -> None:
        self.port, self._programs, self._password, self._made = free_port(), programs, secrets.token_urlsafe(12), 0
        self._folder = Path(tempfile.mkdtemp(prefix="pesc-postgres-"))
        self._as_other = _as_other_user(self._folder) if os.getuid() == 0 else []
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make the cluster and wait until it answers."""
        password = self._folder / "password"
        password.write_text(self._password)
        password.chmod(0o644)  # the folder is closed to others
        data = str(self._folder / "data")
        self._run("initdb", "--no-sync", "--auth=scram-sha-256", "--username=pesc", f"--pwfile={password}", f"--pgdata={data}")
        settings = {
            "port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self._folder, "fsync": "off", "max_connections": 200
        }  # fmt: skip
        command = [
            str(self._programs / "postgres"),
            "-D",
            data,
            *(word for key, value in settings.items() for word in ("-c", f"{key}={value}")),
        ]
        guarded = [*self._as_other, *command] if self._as_other else [sys.executable, "-m", "pesc.launch.guard", "--", *command]
        with (self._folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                guarded, env=_guard_environment(), cwd="/", stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_for(self._answers, 60, f"PostgreSQL; its log: {(self._folder / 'log.txt').read_text()[-2000:]}")

    def database(self) -> str:
        """The URL, for PREFECT_API_DATABASE_CONNECTION_URL, of a new and empty database."""
        self._made += 1
        name = f"prefect_{self._made}"
        self._run("createdb", "--host=127.0.0.1", f"--port={self.port}", "--username=pesc", name, PGPASSWORD=self._password)
        return f"postgresql+asyncpg://pesc:{self._password}@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        """End it at once and remove its files."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, (self._folder / "log.txt").read_text()
        command = [str(self._programs / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        return subprocess.run(command, check=False).returncode == 0

    def _run(self, program: str, *arguments: str, **environment: str) -> None:
        command = [*self._as_other, str(self._programs / program), *arguments]
        done = subprocess.run(command, env={**os.environ, **environment}, cwd="/", capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"


def _as_other_user(folder: Path) -> list[str]:
    """The words before a command that run it as `postgres` (or `nobody`), who then owns the folder; it dies with its parent."""
    names = [entry.pw_name for entry in pwd.getpwall()]
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--pdeathsig=QUIT", "--"]


def _guard_environment() -> dict[str, str]:
    return {**child_environment(), PARENT_VARIABLE: str(os.getpid())}


class PrefectServer:
    """`prefect server start` with a home, a database and a port of its own, and the programs that talk to it.

    `environment` is what a client, a worker or `python -m deployments.bootstrap` needs to reach it; tests add PESC_STORE and the like.
    """

    def __init__(
        self,
        folder: Path,
        *,
        database: str | None = None,
        auth: str | None = None,
        ui: bool = False,
        settings: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.port, self.ui = folder, free_port(), ui
        folder.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            **{name: value for name, value in child_environment().items() if not name.startswith("PREFECT_")},
            "PREFECT_HOME": str(folder / "home"), "PREFECT_API_URL": self.url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1", "NO_COLOR": "1", "COLUMNS": "200", "PESC_HOME": str(ROOT),
        }  # fmt: skip
        if auth:
            self.environment["PREFECT_API_AUTH_STRING"] = auth
        self._own = {**(settings or {})}
        if database:
            self._own["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        if auth:
            self._own["PREFECT_SERVER_API_AUTH_STRING"] = auth
        self._started: list[subprocess.Popen[bytes]] = []
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrefectServer:
        try:
            self.serve()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def serve(self) -> None:
        """Start the server, or start it again on its old port, and wait until it answers."""
        command = [*PREFECT, "server", "start", "--port", str(self.port), *(() if self.ui else ("--no-ui",))]
        log = self._new_log()
        self._server = self.start(*command, extra=self._own)
        wait_for(lambda: self._server_lives(log) and self.get("health"), 180, f"the server; its log: {log}")

    def kill(self) -> None:
        """SIGKILL to the server and all its processes; workers and the database stay."""
        assert self._server
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def start(self, *command: str, cwd: Path | None = None, extra: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own that ends with the tests; its output is in FOLDER/N.log."""
        environment = {**self.environment, **(extra or {}), PARENT_VARIABLE: str(os.getpid())}
        with self._new_log().open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pesc.launch.guard", "--", *command],
                env=environment, cwd=cwd or ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def run(self, *command: str, check: bool = True, seconds: float = 240, extra: dict[str, str] | None = None) -> str:
        """Run a program to its end; returns what it said."""
        done = subprocess.run(
            command, env={**self.environment, **(extra or {})}, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def prefect(self, *arguments: str, check: bool = True) -> str:
        """Run `prefect ...` to its end; returns what it said."""
        return self.run(*PREFECT, *arguments, check=check)

    def get(self, path: str) -> Any:
        """Ask the server's API: `server.get("flow_runs/ID")`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Post to the server's API: `server.post("work_pools/filter", {})`."""
        return self._ask("POST", path, body or {})

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """Change an object: `server.patch("work_pools/gpu", {"concurrency_limit": 3})`."""
        return self._ask("PATCH", path, body)

    def delete(self, path: str) -> None:
        """Delete an object: `server.delete("automations/ID")`."""
        self._ask("DELETE", path, None)

    def wait_for_state(self, flow_run: str, *types: str, seconds: float = 120) -> dict[str, Any]:
        """The flow run, once its state is of one of the types (COMPLETED, FAILED ...)."""

        def reached() -> dict[str, Any] | None:
            run = self.get(f"flow_runs/{flow_run}")
            return run if run["state_type"] in types else None

        return wait_for(reached, seconds, f"{flow_run} to be {' or '.join(types)}")

    def stop(self) -> None:
        """End every program that was started, and its group."""
        for process in reversed(self._started):
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"}, method=method)
        if auth := self.environment.get("PREFECT_API_AUTH_STRING"):
            request.add_header("Authorization", f"Basic {b64encode(auth.encode()).decode()}")
        for tries_left in reversed(range(10)):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    text = answer.read()
                break
            except urllib.error.HTTPError as error:
                if error.code != 503 or not tries_left:  # 503: SQLite was busy; Prefect's own client tries again as well
                    raise AssertionError(f"{method} {path}: {error.code} {error.read().decode()}") from error
                time.sleep(0.5)
        return json.loads(text) if text else None

    def _server_lives(self, log: Path) -> bool:
        assert self._server
        assert self._server.poll() is None, log.read_text()
        return True

    def _new_log(self) -> Path:
        return self.folder / f"{len(self._started)}.log"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL cluster; skips where the programs are missing."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    cluster = Postgres(programs)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def postgres_prefect(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server on PostgreSQL."""
    with PrefectServer(tmp_path_factory.mktemp("prefect"), database=postgres.database()) as server:
        yield server


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server on SQLite."""
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as server:
        yield server


def bootstrap_with_saving(server: PrefectServer, fleet: dict[str, Any]) -> None:
    """Bootstrap with a fleet file, and the flow `saving` in the pool `cpu`; `server.recipe` is a tiny recipe."""
    path, steps, server.recipe = (server.folder / name for name in ("fleet.yaml", "prefect.yaml", "tiny.yaml"))
    path.write_text(yaml.safe_dump(fleet))
    server.run(sys.executable, "-m", "deployments.bootstrap", "--fleet", str(path))
    server.recipe.write_text(yaml.safe_dump(tiny_recipe_dict(server.folder / "sources")))
    steps.write_text(yaml.safe_dump({"pull": [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]}))
    server.prefect(
        "--no-prompt", "deploy", "tests/deployments/programs.py:saving", "--name", "cpu", "--pool", "cpu", "--prefect-file", str(steps)
    )
