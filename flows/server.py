"""Prefect's server as `python -m flows.pipeline` finds it: the one at PREFECT_API_URL, else a temporary one of this process.

Settings here hold from any working directory; what the user has set wins.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prefect
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

logger = logging.getLogger(__name__)
STARTUP_SECONDS = 180
"""How long the temporary server may take on a busy machine; Prefect's own default is 20."""
_SIGNS = ("ephemeral Prefect API server", "Failed to reach API at", "find an available port")


@contextlib.contextmanager
def server_settings() -> Iterator[None]:
    """Settings of the temporary server: patience, no telemetry, a database that this version of Prefect can read."""
    patience = max(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value(), STARTUP_SECONDS)
    updates: dict[Any, Any] = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: patience, PREFECT_SERVER_ANALYTICS_ENABLED: False}
    if not PREFECT_API_URL.value() and (path := readable_database(Path(PREFECT_HOME.value()))):
        updates[PREFECT_SERVER_DATABASE_CONNECTION_URL] = f"sqlite+aiosqlite:///{path}"
    with temporary_settings(updates):
        yield


def readable_database(home: Path) -> Path | None:
    """Another file to keep runs in, when Prefect's own in `home` was written by a newer Prefect; None when it can be used.

    Prefect tries such a file again and again until its patience ends.
    """
    default = home / "prefect.db"
    if default.resolve() != _configured_database() or _is_readable(default):
        return None
    own = home / f"prefect-{prefect.__version__}.db"
    logger.warning("%s was written by a newer Prefect than %s; runs are kept in %s instead.", default, prefect.__version__, own)
    return own


def _configured_database() -> Path | None:
    scheme, _, path = PREFECT_SERVER_DATABASE_CONNECTION_URL.value().partition(":///")
    return Path(path).resolve() if scheme.startswith("sqlite") else None


def _is_readable(path: Path) -> bool:
    """Whether this Prefect knows the database's revision (one that cannot be asked is left to Prefect)."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as connection:
            revisions = [row[0] for row in connection.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.Error:
        return True
    known = Path(prefect.__file__).parent / "server" / "database" / "_migrations" / "versions" / "sqlite"
    return all(any(known.glob(f"*_{revision}_*.py")) for revision in revisions)


def server_sentence(error: RuntimeError) -> str | None:
    """Prefect's complaint about its server as a sentence; None for any other error."""
    if not any(sign in str(error) for sign in _SIGNS):
        return None
    if url := PREFECT_API_URL.value():
        return f"No Prefect server answers at {url}. Start it (`prefect server start`), or unset PREFECT_API_URL for a temporary one."
    return (
        f"Prefect's temporary server did not start ({str(error).strip().splitlines()[0]}). Give it a home of its own with PREFECT_HOME=DIR; "
        "`pesc run` does the same work without any server."
    )
