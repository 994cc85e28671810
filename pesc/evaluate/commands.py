"""`pesc compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pesc.settings import store_root
from pesc.store import Store


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("compare")(compare)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="RECIPE, RECIPE@TIME (an earlier run), the digest of an evaluation or a report, or a directory with an evaluation.",
            metavar="RUN...",
        ),
    ],
    control: Annotated[
        str | None,
        typer.Option("--control", help="RUN:ARM to compare with. Default: the first run's arm of the same name.", metavar="RUN:ARM"),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="A column of published figures, e.g. gpt-3.5.", metavar="SYSTEM")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write compare.md and results.json here.", file_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the tables.")] = False,
    store: Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")] = None,
) -> None:
    """Compare finished evaluations of several runs, item by item: differences with intervals, tests, verdicts.  Builds nothing."""
    from pesc.evaluate.runs import compare_runs, find_run, runs_markdown, write_comparison

    place = Store(store or store_root())
    results = compare_runs([find_run(run, place) for run in runs], control, tuple(against or ()))
    print(
        json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False) if as_json else runs_markdown(results),
        end="\n" if as_json else "",
    )
    for path in write_comparison(results, out) if out else ():
        typer.echo(path, err=as_json)
