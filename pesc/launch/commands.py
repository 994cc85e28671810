"""The command that starts a run on several machines: `pesc launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_SSH = "ssh -o BatchMode=yes -tt"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("launch")(launch)


def launch(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file that each machine has.", metavar="RECIPE")],
    hostfile: Annotated[Path, typer.Option("--hostfile", help="DeepSpeed's format: one machine a line, NAME slots=N.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change, as for `pesc run`.", metavar="[KEY=VALUE]...")] = None,
    until: Annotated[str, typer.Option("--until", help="Where the machines stop; the rest needs only one of them.")] = "train",
    port: Annotated[int, typer.Option(help="Port of the first machine that they meet at.")] = 29500,
    ssh: Annotated[str, typer.Option("--ssh", help="How to reach a machine.")] = DEFAULT_SSH,
    command: Annotated[str, typer.Option("--command", help="`pesc` as the machines know it; each needs a store of its own.")] = "pesc",
) -> None:
    """Run a recipe up to training on every machine of a hostfile, over ssh."""
    import shlex

    from pesc.launch.hostfile import read_hostfile, run_everywhere, settings_for

    machines = read_hostfile(hostfile)
    argv = ["env", "TERM=dumb", *shlex.split(command), "run", recipe, *(overrides or ()), *settings_for(machines, port), "--until", until]
    run_everywhere(machines, argv, ssh, lambda line: print(line, flush=True))
