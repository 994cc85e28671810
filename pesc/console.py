"""What `pesc run` shows: one line an action, a progress bar on a terminal, plain lines elsewhere, the results table at the end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from pesc.build import Outcome
from pesc.errors import HolesError, PescError
from pesc.pipeline import Node
from pesc.plan import Selection, make_plan
from pesc.progress_text import experts_text, fields_text, held_out_text, numbers_text
from pesc.recipe import Recipe
from pesc.redaction import RedactingFilter
from pesc.run import run_recipe
from pesc.stage import Progress as StageProgress
from pesc.store import Store

PLAIN_SECONDS = 15.0
"""Seconds between progress lines where there is no terminal."""


class DetailedBar(Progress):
    """A progress bar with lines below it."""

    details: Text | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, then the details."""
        yield from super().get_renderables()
        if self.details is not None:
            yield self.details


class ConsoleRun:
    """Runs a recipe and shows it.  Use as a context manager."""

    def __init__(self, verbose: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._bar = DetailedBar(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(), console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, note="", visible=False)
        self._count, self._total, self._address = 0, 0, ""
        self._last_line = 0.0
        logger = logging.getLogger("pesc")
        logger.setLevel(logging.INFO if verbose else logging.WARNING)
        self._handler = RichHandler(console=self._console, show_path=False, log_time_format="%H:%M:%S")
        self._handler.addFilter(RedactingFilter())
        logger.addHandler(self._handler)

    def __enter__(self) -> ConsoleRun:
        self._bar.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._bar.stop()
        logging.getLogger("pesc").removeHandler(self._handler)

    def run(self, recipe: Recipe, store: Store, selection: Selection) -> dict[str, Outcome]:
        """Run, show, and print where the report is.  Raises PescError; HolesError after the same lines, when benchmarks failed."""
        self._total = len(make_plan(recipe, store, selection).actions)
        started = time.monotonic()
        try:
            outcomes = run_recipe(recipe, store, selection, self._start, self._finish, self._progress, self._fail)
        except HolesError as error:
            self._end(store, error.finished, started)
            raise
        self._end(store, outcomes, started)
        return outcomes

    def _end(self, store: Store, outcomes: Mapping[str, Outcome], started: float) -> None:
        self._bar.stop()
        built = sum(o.how == "built" for o in outcomes.values())
        self._console.print(f"{built} built, {len(outcomes) - built} cached, in {time.monotonic() - started:.1f} s. Store: {store.root}")
        if "report" in outcomes:
            self._console.print(render_report(store, outcomes["report"]), markup=False)

    def _start(self, node: Node, reason: str) -> None:
        self._address, self._last_line = node.address, time.monotonic()
        self._console.print(f"[bold]RUN[/]    {escape(node.address)}  [dim]{escape(reason)}[/]")
        self._bar.reset(self._task, description=escape(node.address), total=None, note="", visible=True)

    def _finish(self, outcome: Outcome) -> None:
        self._count += 1
        self._bar.update(self._task, visible=False)
        self._bar.details = None
        how = "[green]built[/]" if outcome.how == "built" else "[cyan]cached[/]"
        took = f"{outcome.seconds:8.1f} s" if outcome.how == "built" else " " * 10
        address = escape(outcome.address)
        self._console.print(
            f"{how:<{19 if 'green' in how else 20}} {took}  {address}  [dim]{outcome.ref.digest[:8]}  ({self._count}/{self._total})[/]"
        )

    def _fail(self, node: Node, error: PescError) -> None:
        self._count += 1
        self._bar.update(self._task, visible=False)
        self._bar.details = None
        self._console.print(
            f"[red]failed[/]             {escape(node.address)}  [dim]the run goes on without it  ({self._count}/{self._total})[/]"
        )
        self._console.print(f"       {error}", markup=False)

    def _progress(self, progress: StageProgress) -> None:
        note = "  ".join(filter(None, [progress.message, fields_text(progress.fields)]))
        self._bar.details = live_details(progress)
        shown = progress.message if self._bar.details else note
        self._bar.update(self._task, completed=progress.done, total=progress.total or None, note=shown)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            self._console.print(f"       {self._address}  {progress.done:g}/{progress.total:g} {progress.unit}  {note}", markup=False)


def live_details(progress: StageProgress) -> Text | None:
    """The lines below a training's bar: its numbers, the held-out losses, the experts' load; None for stages with less to say."""
    fields = progress.fields
    if "loss" not in fields and "held_out" not in fields:
        return None
    lines = (numbers_text(fields), held_out_text(fields), experts_text(fields, width=30))
    return Text("\n".join(f"    {line}" for line in lines if line))


@contextlib.contextmanager
def progress_bar(label: str, console: Console | None = None) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, plain lines now and then elsewhere, on stderr; gives `progress(done, total, unit=, message=)`, as stages have it."""
    console = console or Console(stderr=True, soft_wrap=True, highlight=False)
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task, last_line = bar.add_task(escape(label), total=None, note=""), time.monotonic()

    def progress(done: float, total: float, unit: str = "steps", message: str = "") -> None:
        nonlocal last_line
        bar.update(task, completed=done, total=total or None, note=message)
        if not console.is_terminal and time.monotonic() - last_line > PLAIN_SECONDS:
            last_line = time.monotonic()
            console.print(f"{label}  {done:g}/{total:g} {unit}  {message}", markup=False)

    with bar:
        yield progress


def render_report(store: Store, outcome: Outcome) -> str:
    """Of a finished report: the held-out losses and the answer that was asked for, the results table, and where the page is."""
    import json

    from pesc.evaluate.question_tables import summary
    from pesc.evaluate.tables import results_table

    place = store.open(outcome.ref)
    results = json.loads((place / "results.json").read_text(encoding="utf-8"))
    parts = [*summary(results["held_out"]), results_table(results), f"Report: {place / 'report.html'}"]
    return "\n" + "\n\n".join(parts)
