"""What `gc` keeps, whoever asks: results that recipes hit, and what the last run of each recipe used."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from pesc.errors import RecipeError
from pesc.plan import make_plan
from pesc.recipe import Recipe, load_recipe, recipe_names
from pesc.store import Store
from pesc.store.maintenance import GcReport, gc, last_used


def collect(store: Store, keep_recipes: Sequence[str] | None, keep_days: float, delete: bool) -> GcReport:
    """Find, or remove, what nothing needs.  `keep_recipes`: a name or a path, with its overrides (`demo train.seed=3`); None: every recipe that ships.

    What the last run of a recipe used is kept as well, so that recipes of one's own need not be named. Raises RecipeError for an empty list with
    `delete`: it would keep what is recent, and nothing else.
    """
    if keep_recipes is not None and not keep_recipes and delete:
        raise RecipeError(
            "gc would delete without keeping the results of any recipe. Name some (keep_recipes), or leave them out: then all count."
        )
    plans = [make_plan(_recipe(text), store) for text in (recipe_names() if keep_recipes is None else keep_recipes)]
    kept = {(a.node.stage.name, a.fingerprint) for plan in plans for a in plan if a.status == "HIT" and a.fingerprint}
    return gc(store, kept | (last_used(store) if keep_recipes is None else set()), keep_days, delete)


def _recipe(text: str) -> Recipe:
    if Path(text).exists():
        return load_recipe(text)
    try:
        name, *overrides = shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"{text!r} is no recipe with overrides ({error}): write it as on a command line, demo train.seed=3.") from None
    return load_recipe(name, overrides)
