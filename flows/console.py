"""What a terminal shows of `python -m flows.pipeline`: this project's own lines, the results, and failures as one sentence.

Prefect's own records (state changes, tracebacks) go to its API and stay out of the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from prefect.exceptions import TerminationSignal
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from flows.chain import open_store
from pesc.cli import From, Only, Overrides, RecipeArgument, Refresh, StoreOption, Until
from pesc.console import render_report
from pesc.errors import PescError
from pesc.recipe import load_recipe
from pesc.run import Outcome
from pesc.store import Store
from tasks.reporting import seconds_text

STARTUP_SECONDS = 180
"""How long Prefect's temporary server may take on a busy machine; Prefect's own default is 20."""
_HOME = [Path(next(iter(find_spec(name).submodule_search_locations))) for name in ("pesc", "tasks", "flows")]  # type: ignore[union-attr,arg-type]
_SERVER_SIGNS = ("ephemeral Prefect API server", "Failed to reach API at", "find an available port")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    only: Only = None,
    start: From = None,
    until: Until = None,
    refresh: Refresh = None,
    store: StoreOption = None,
) -> None:
    """Run a recipe as a Prefect flow, and print the results table and the report's path."""
    from flows.pipeline import pipeline

    load_recipe(recipe, overrides or ())  # a wrong one is told at once, before any server starts
    place = open_store(str(store) if store else None)
    with _server_settings():
        outcomes = pipeline(
            recipe=recipe, overrides=overrides, only=only, start=start, until=until, refresh=refresh, store=str(place.root)
        )  # fmt: skip
    print(render_outcomes(place, outcomes))


def render_outcomes(store: Store, outcomes: dict[str, Outcome]) -> str:
    """A line an action, then the results table and the path of the page where there is a report."""
    lines = []
    for outcome in outcomes.values():
        how, took = ("built", seconds_text(outcome.seconds)) if outcome.how == "built" else ("cached", "")
        lines.append(f"{how:<7}{took:>10}  {outcome.address}  {outcome.ref.digest[:8]}")
    built = sum(outcome.how == "built" for outcome in outcomes.values())
    lines.append(f"{built} built, {len(outcomes) - built} cached. Store: {store.root}")
    if "report" in outcomes:
        lines.append(render_report(store, outcomes["report"]))
    return "\n".join(lines)


class ProjectRecords(logging.Filter):
    """Lets through what this project logs, and other people's warnings; Prefect's engine is left to Prefect's UI."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        path = Path(record.pathname)
        if any(path.is_relative_to(home) for home in _HOME):
            return path.name != "hooks.py"  # the failure's sentence is printed anyway
        return record.levelno >= logging.WARNING and not record.name.startswith(
            ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")
        )


def quiet_console() -> None:
    """Filter every handler that writes Prefect's records to the terminal, for the rest of this process."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers if isinstance(handler, PrefectConsoleHandler)}:
        handler.addFilter(ProjectRecords())


@contextlib.contextmanager
def _server_settings() -> Iterator[None]:
    """Settings of the temporary server that hold from any working directory; those in the environment win."""
    patient = max(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value(), STARTUP_SECONDS)
    updates: dict[Any, Any] = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: patient, PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with temporary_settings(updates):
        yield


def main() -> None:
    """Entry point: a failure that the user can mend is one sentence on stderr and exit code 1."""
    quiet_console()
    try:
        app()
    except PescError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, TerminationSignal) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 143
        _fail("Interrupted. Finished stages and checkpoints are kept: run the same command again to go on.", code)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SERVER_SIGNS):
            raise
        _fail(_server_sentence(str(error)), 1)


def _server_sentence(message: str) -> str:
    if url := PREFECT_API_URL.value():
        return f"No Prefect server answers at {url}. Start it (`prefect server start`), or unset PREFECT_API_URL for a temporary one."
    return (
        f"Prefect's temporary server did not start ({message.strip().splitlines()[0]}). If another version of Prefect has used the same "
        "home, give this one its own: PREFECT_HOME=DIR. `pesc run` does the same work without any server."
    )


def _fail(message: str, code: int) -> None:
    print(f"pesc: {message}", file=sys.stderr)
    sys.exit(code)
