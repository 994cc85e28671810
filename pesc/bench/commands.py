"""The commands under `pesc bench`; each is a thin call into a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine.")


@bench.callback()
def _group() -> None:
    """Keep this a group while it has one command."""


@bench.command()
def convert(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to write, on the disk to measure. Default: the temporary directory.", metavar="DIR")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: seconds instead of minutes.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each shape; the median is shown.")] = 3,
) -> None:
    """Conversion of 0.5B, 2B and 7B shapes: time against a plain write of the same bytes, and peak memory."""
    from pesc.bench.convert import QUICK_SHAPES, SHAPES, measure, render
    from pesc.console import progress_bar

    with progress_bar("bench convert") as progress:
        rows = measure(QUICK_SHAPES if quick else SHAPES, directory, repeats, progress)
    print(render(rows))
