"""`pesc suites`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pesc.errors import RecipeError
from pesc.evaluate.suites import expand, read_suites


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("suites")(suites)


def suites(
    suite: Annotated[str | None, typer.Argument(help="Show this one alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for machines.")] = False,
) -> None:
    """List the suites of benchmarks that a recipe's `evaluate.suites` may name: task, examples, metric and filter of each."""
    try:
        chosen = {suite: expand({"suites": [suite]})["benchmarks"]} if suite else read_suites()
    except ValueError as error:
        raise RecipeError(f"{str(error).capitalize()}.") from None
    if as_json:
        print(json.dumps(chosen, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    for name, rows in chosen.items():
        table = Table(
            "benchmark", "lm-eval task", "examples", "metric", "filter", "notes", title=name, title_justify="left", box=box.SIMPLE
        )
        for benchmark, row in rows.items():
            notes = [f"first {row['limit']} items" if "limit" in row else "", "chat template" if row.get("apply_chat_template") else ""]
            notes += [f"items from {row['source']}" if "source" in row else ""]
            shots = row.get("num_fewshot")
            table.add_row(
                benchmark,
                row["task"],
                "–" if shots is None else str(shots),
                row["metric"],
                row.get("filter", ""),
                ", ".join(filter(None, notes)),
            )
        Console().print(table)
