"""What a terminal shows of `python -m flows.pipeline`: this project's own lines, the results, and failures as one sentence.

Prefect's own records (state changes, tracebacks) go to its API and stay out of the terminal.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from prefect.exceptions import TerminationSignal
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL

from flows.chain import open_store
from flows.server import server_sentence, server_settings
from pesc.build import Outcome
from pesc.cli import From, Only, Overrides, RecipeArgument, Refresh, StoreOption, Until
from pesc.console import render_report
from pesc.errors import HolesError, PescError, RecipeError
from pesc.recipe import load_recipe
from pesc.redaction import redact_error
from pesc.store import Store
from tasks.reporting import seconds_text

_HOME = [Path(next(iter(find_spec(name).submodule_search_locations))) for name in ("pesc", "tasks", "flows")]  # type: ignore[union-attr,arg-type]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    only: Only = None,
    start: From = None,
    until: Until = None,
    refresh: Refresh = None,
    dispatch: Annotated[bool, typer.Option("--dispatch", help="Build each action on a worker, by its stage's deployment.")] = False,
    store: StoreOption = None,
) -> None:
    """Run a recipe as a Prefect flow, and print the results table and the report's path."""
    from flows.pipeline import pipeline

    load_recipe(recipe, overrides or ())  # a wrong one is told at once, before any server starts
    place = open_store(str(store) if store else None)
    if dispatch and not PREFECT_API_URL.value():
        raise RecipeError("--dispatch needs the Prefect server that the workers know: set PREFECT_API_URL to its API.")
    with server_settings():
        try:
            outcomes = pipeline(
                recipe=recipe, overrides=overrides, only=only, start=start, until=until, refresh=refresh, dispatch=dispatch,
                store=str(place.root) if store or not dispatch else None,
            )  # fmt: skip
        except HolesError as error:
            print(render_outcomes(place, error.finished))
            raise
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
        sentence = server_sentence(error)
        if sentence is None:
            redact_error(error)
            raise
        _fail(sentence, 1)
    except Exception as error:  # a defect of this package: its traceback is shown, without secrets
        redact_error(error)
        raise


def _fail(message: str, code: int) -> None:
    print(f"pesc: {message}", file=sys.stderr)
    sys.exit(code)
