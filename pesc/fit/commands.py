"""`pesc fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pesc.errors import RecipeError
from pesc.recipe import load_recipe
from pesc.settings import store_root
from pesc.store import Store


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("fit")(fit)


def fit(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, e.g. upcycle.adapter_dim=64.", metavar="[KEY=VALUE]...")
    ] = None,
    gpu: Annotated[
        str, typer.Option("--gpu", help="Which GPUs and how many: h200:1, a100-80:16, rtx4090:1 ...", metavar="NAME:COUNT")
    ] = "h200:1",
    arm: Annotated[list[str] | None, typer.Option("--arm", help="These arms alone.")] = None,
    shape: Annotated[str | None, typer.Option(help="Take a known base's shape instead: llama-2-7b, yi-34b, llama-3-70b ...")] = None,
    model: Annotated[Path | None, typer.Option(help="Take the shape of this directory's config.json.", metavar="DIR")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens of an epoch. Default: the tokenized mixture's, or rows times a guess.")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="A measured speed of all GPUs together, instead of the assumed.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="US dollars a GPU and hour, instead of typical ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, in bytes, for machines.")] = False,
    store: Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")] = None,
) -> None:
    """Say whether training fits these GPUs, with which settings, how long it takes and what it costs.  Starts nothing, needs no GPU."""
    import json
    import math

    from pesc.devices import parse_gpus
    from pesc.fit import table
    from pesc.fit.planner import Question, base_shape, count_blocks, fit_recipe

    for name, value in (("--tokens", tokens), ("--tokens-per-second", tokens_per_second)):
        if value is not None and not 0 < value < float("inf"):
            raise RecipeError(f"{name} is {value:g}, but must be above 0.")
    device, gpus = parse_gpus(gpu)
    loaded, root = load_recipe(recipe, overrides or ()), store or store_root()
    place = Store(root) if root.is_dir() else None
    dense = base_shape(loaded, place, shape, model)
    count, source = count_blocks(loaded, place, math.ceil(tokens) if tokens else None)
    question = Question(device, gpus, count, source, tokens_per_second, price)
    fits = fit_recipe(loaded, dense, question, tuple(arm or ()))
    if as_json:
        print(json.dumps(table.as_json(loaded.name, fits, question), indent=2))
    else:
        table.print_fits(loaded.name, fits, question)
