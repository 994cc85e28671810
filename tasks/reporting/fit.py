"""What training will need of each GPU, by group, before it starts."""

from __future__ import annotations

import logging
from collections.abc import Collection

from pesc.devices import Device, device_of, parse_gpus
from pesc.errors import PescError
from pesc.provenance import hardware
from pesc.recipe import Recipe
from pesc.store import Store
from tasks.reporting.artifacts import artifact_key, best_effort, write_markdown

logger = logging.getLogger(__name__)
ASSUMED = "h200:1"
"""What is planned with where the machine that asks has no GPU of a known kind."""


@best_effort
def publish_fit(store: Store, recipe: Recipe, addresses: Collection[str] = ()) -> None:
    """The table of `pesc fit` for the arms whose training is about to run (addresses; none: all that are trained).

    Nothing is shown for a model whose shape, or a mixture whose size, is not known yet.
    """
    from pesc.fit.planner import Question, base_shape, count_blocks, fit_recipe
    from pesc.fit.table import fits_markdown

    arms = [name for name, arm in recipe.arms.items() if arm.method != "dense" and (not addresses or f"train[{name}]" in addresses)]
    if not arms:
        return
    device, count, where = own_gpus()
    try:
        question = Question(device, count, *count_blocks(recipe, store, None))
        fits = fit_recipe(recipe, base_shape(recipe, store, None, None), question, arms)
    except PescError as error:
        logger.info("No table of what training needs: %s", error)
        return
    verdicts = "; ".join(f"{fit.arm} {'fits' if fit.fits else 'does not fit'}" for fit in fits)
    text = f"{fits_markdown(recipe.name, fits, question)}\n\n{where}\n"
    write_markdown(artifact_key("fit", recipe.name), text, f"Training of {recipe.name} on {count} × {device.name}: {verdicts}")


def own_gpus() -> tuple[Device, int, str]:
    """This machine's GPUs, how many, and a sentence about where the choice is from."""
    names = hardware()["gpus"]
    if names and (device := device_of(names[0].partition(",")[0])):
        return device, len(names), "The GPUs are those of the machine that wrote this."
    device, count = parse_gpus(ASSUMED)
    return (
        device,
        count,
        f"The machine that wrote this has no GPU of a known kind: {ASSUMED} is assumed. `pesc fit RECIPE --gpu NAME:COUNT` asks for others.",
    )
