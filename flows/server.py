"""Prefect's server as `python -m flows.pipeline` finds it: the one at PREFECT_API_URL, else a temporary one of this process.

    python -m flows.server PORT        (what the child runs; `server_settings` starts it)

Prefect starts a temporary server by itself. This one dies with its parent whatever kills it, says at once when it cannot start, and
outlives a Ctrl-C long enough to hear how the run ended. It keeps runs where Prefect keeps them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import prefect
from packaging.version import InvalidVersion, Version
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    get_current_settings,
    temporary_settings,
)

from pesc.errors import PescError
from pesc.launch.guard import PARENT_VARIABLE
from pesc.launch.supervise import child_environment
from pesc.redaction import redact

logger = logging.getLogger(__name__)
STARTUP_SECONDS = 180.0
"""How long the temporary server may take on a busy machine."""
_STOP_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parent.parent


class ServerError(PescError):
    """A Prefect server that does not start or does not answer."""


@contextlib.contextmanager
def server_settings() -> Iterator[None]:
    """Settings under which flows find their server; starts a temporary one, which ends with this process, if there is none.

    What the user has set wins. Raises ServerError: no server, no access, a server of another time.
    """
    updates: dict[Any, Any] = {PREFECT_SERVER_ANALYTICS_ENABLED: False}
    if url := PREFECT_API_URL.value():
        with temporary_settings(updates):
            check_server(url)
            yield
        return
    if (password := PREFECT_SERVER_API_AUTH_STRING.value()) and not PREFECT_API_AUTH_STRING.value():
        updates[PREFECT_API_AUTH_STRING] = password  # the temporary server will ask for it
    if path := readable_database(Path(PREFECT_HOME.value())):
        updates[PREFECT_SERVER_DATABASE_CONNECTION_URL] = f"sqlite+aiosqlite:///{path}"
    with temporary_settings(updates):
        url = start_server()
        with temporary_settings({PREFECT_API_URL: url}):
            yield


def start_server() -> str:
    """Start a temporary server and wait until it answers; returns the URL of its API.  Raises ServerError with its last words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **child_environment(), **get_current_settings().to_environment_variables(exclude_unset=True), PARENT_VARIABLE: str(os.getpid())
    }  # fmt: skip
    log = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the server)
    command = [sys.executable, "-m", "pesc.launch.guard", "--", sys.executable, "-m", "flows.server", str(port)]
    server = subprocess.Popen(
        command, env=environment, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    atexit.register(_stop, server)
    url = f"http://127.0.0.1:{port}/api"
    end = time.monotonic() + STARTUP_SECONDS
    while server.poll() is None and time.monotonic() < end:
        if answers(url):
            return url
        time.sleep(0.1)
    log.seek(0)
    text = log.read().decode(errors="replace")
    if "Can't locate revision" in text:
        raise ServerError(
            f"Prefect's database {_database_name()} was written by a newer Prefect than {prefect.__version__}, which cannot read it. Upgrade Prefect, "
            "or give another database with PREFECT_API_DATABASE_CONNECTION_URL, or another PREFECT_HOME=DIR; `pesc run` does the same work without "
            "any server."
        )
    cause = _last_words(text)
    raise ServerError(
        f"Prefect's temporary server did not start ({cause}). Give it a home of its own with PREFECT_HOME=DIR; `pesc run` does the same "
        "work without any server."
    )


def _last_words(text: str) -> str:
    """The last line of a server's log that says something about the cause."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "Application startup failed" not in line]
    return lines[-1].rstrip(".") if lines else "it said nothing"


def answers(url: str) -> bool:
    """Whether a server's API is healthy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def readable_database(home: Path) -> Path | None:
    """Another file to keep runs in, when Prefect's own in `home` was written by a newer Prefect; None when it can be used.

    Prefect would refuse to start.
    """
    default = home / "prefect.db"
    if default.resolve() != _configured_database():
        return None
    if _is_readable(default):
        if not _is_current(default):
            logger.warning(
                "%s is of an older Prefect and is brought up to %s now; the older one cannot read it afterwards.",
                default,
                prefect.__version__,
            )
        return None
    own = home / f"prefect-{prefect.__version__}.db"
    logger.warning("%s was written by a newer Prefect than %s; runs are kept in %s instead.", default, prefect.__version__, own)
    return own


def _configured_database() -> Path | None:
    scheme, _, path = PREFECT_SERVER_DATABASE_CONNECTION_URL.value().partition(":///")
    return Path(path).resolve() if scheme.startswith("sqlite") else None


def _database_name() -> str:
    """The configured database as a user may see it."""
    return redact(str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value()))


_MIGRATIONS = Path(prefect.__file__).parent / "server" / "database" / "_migrations" / "versions" / "sqlite"


def _revisions(path: Path) -> list[str]:
    """The database's revision; nothing for one that cannot be asked, which is left to Prefect."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as connection:
            return [row[0] for row in connection.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.Error:
        return []


def _is_readable(path: Path) -> bool:
    """Whether this Prefect knows the database's revision."""
    return all(any(_MIGRATIONS.glob(f"*_{revision}_*.py")) for revision in _revisions(path))


def _is_current(path: Path) -> bool:
    """Whether the database needs no migration: its revision is the newest by date."""
    newest = max(_MIGRATIONS.glob("2*.py"), key=lambda file: file.name, default=None)
    return newest is None or all(f"_{revision}_" in newest.name for revision in _revisions(path))


def check_server(url: str) -> None:
    """Ask a server who it is.  Raises ServerError: it does not answer, it wants another password, its Prefect is of another major version.

    A server that is older than this Prefect is a warning, as Prefect itself gives one; a newer one is as it should be.
    """
    shown = redact(url)
    try:
        with get_client(sync_client=True) as client:
            answer = client.request("GET", "/admin/version").json()
    except RuntimeError as error:
        raise ServerError(server_sentence(error) or f"The Prefect server at {shown} cannot be used: {error}") from None
    except httpx.HTTPStatusError as error:
        raise ServerError(_refusal(error.response.status_code, shown)) from None
    except (httpx.HTTPError, OSError):
        raise ServerError(_no_answer(shown)) from None
    except ValueError:
        raise ServerError(f"What answers at {shown} is no Prefect server. Set PREFECT_API_URL to its API: http://HOST:4200/api.") from None
    _compare_versions(str(answer), shown)


def _refusal(status: int, shown: str) -> str:
    if status in (401, 403):
        given = "the user and password of PREFECT_API_AUTH_STRING" if PREFECT_API_AUTH_STRING.value() else "who gives no password"
        return (
            f"The Prefect server at {shown} refuses {given} (HTTP {status}). Set PREFECT_API_AUTH_STRING to USER:PASSWORD as the server has them in "
            "PREFECT_SERVER_API_AUTH_STRING."
        )
    if status == 404:
        return f"What answers at {shown} is no Prefect server (HTTP 404). Set PREFECT_API_URL to its API: http://HOST:4200/api."
    return f"The Prefect server at {shown} answers with HTTP {status}. Its own log says why."


def _compare_versions(answer: str, shown: str) -> None:
    try:
        theirs, ours = Version(answer), Version(prefect.__version__)
    except InvalidVersion:
        raise ServerError(f"What answers at {shown} is no Prefect server. Set PREFECT_API_URL to its API: http://HOST:4200/api.") from None
    if theirs.major != ours.major:
        older = "this program" if ours < theirs else "the server"
        raise ServerError(f"The Prefect server at {shown} is {theirs}, and this program has {ours}: they cannot talk. Upgrade {older}.")
    if theirs.release[:2] < ours.release[:2]:
        logger.warning(
            "The Prefect server at %s is %s, older than this program's %s: what it does not know it refuses or leaves out. Upgrade it first, then "
            "workers and clients.",
            *(shown, theirs, ours),
        )


def _no_answer(shown: str) -> str:
    return f"No Prefect server answers at {shown}. Start it (`prefect server start`), or unset PREFECT_API_URL for a temporary one."


def server_sentence(error: RuntimeError) -> str | None:
    """Prefect's complaint about a server that does not answer, as a sentence; None for any other error."""
    if "Failed to reach API at" not in str(error):
        return None
    return _no_answer(redact(str(PREFECT_API_URL.value())))


def main(port: int) -> None:
    """Serve until told to stop."""
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", lifespan="on", timeout_graceful_shutdown=3)


if __name__ == "__main__":
    main(int(sys.argv[1]))
