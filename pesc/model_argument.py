"""Which directory MODEL means, and whether a whole model is in it; reads no weights.

MODEL is a directory, or RECIPE:ADDRESS for a model in the store, such as `demo:merge[pesc]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pesc.data.chat import TEMPLATES
from pesc.errors import ModelError
from pesc.models.published import is_published
from pesc.models.training_checkpoint import is_training_checkpoint
from pesc.models.upcycle import read_config
from pesc.plan import PlannedAction, make_plan
from pesc.recipe import Recipe, load_recipe
from pesc.store import Store

_UNMERGED = ("training.json", "adapter_config.json", "adapter/adapter_config.json")
"""Files of what training leaves: changes to a model, not a model."""
_MODEL_STAGES = ("merge", "upcycle", "download")


@dataclass(frozen=True)
class ModelPlace:
    """A model that is there."""

    directory: Path
    name: str
    """As the user named it."""
    fields: dict[str, Any]
    """config.json."""
    template: str | None = None
    """A chat template in place of the tokenizer's own; None: the tokenizer's."""
    recipe: Recipe | None = None
    address: str = ""
    """Of the action in the recipe that made it."""


def find_model(argument: str, store_root: Path, template: str | None = None) -> ModelPlace:
    """The model that MODEL names.  `template` is the option --chat-template: chatml, pesc, or a file.

    Raises ModelError (or RecipeError) for what is not there, not built, or no whole model.
    """
    directory, recipe, address = Path(argument).expanduser(), None, ""
    if not directory.exists() and ":" in argument:
        name, _, address = argument.rpartition(":")
        recipe = load_recipe(name)
        directory = _built(recipe, name, address, Store(store_root))
    fields = _check_whole(directory, argument)
    return ModelPlace(directory, argument, fields, None if template is None else _read_template(template), recipe, address)


def _built(recipe: Recipe, name: str, address: str, store: Store) -> Path:
    """The object of one action.  Raises ModelError when it makes no model, or is not built."""
    actions = {action.address: action for action in make_plan(recipe, store)}
    models = [known for known, action in actions.items() if action.node.stage.name in _MODEL_STAGES]
    if address not in actions:
        raise ModelError(f"Recipe {recipe.name!r} has no action {address!r}. Its models: {', '.join(models)}.")
    action = actions[address]
    if action.node.stage.name == "train":
        merged = address.replace("train", "merge", 1)
        raise ModelError(f"{address} is what training changed, not a whole model: merge it first and use {name}:{merged}.")
    if address not in models:
        raise ModelError(f"{address} makes no model. The models of recipe {recipe.name!r}: {', '.join(models)}.")
    return _object_path(action, name, store)


def _object_path(action: PlannedAction, name: str, store: Store) -> Path:
    if action.manifest is None:
        raise ModelError(
            f"{action.address} is not in the store {store.root} ({action.reason}): run `pesc run {name} --until '{action.address}'` first."
        )
    return store.open(action.manifest.ref)


def _check_whole(directory: Path, argument: str) -> dict[str, Any]:
    """config.json of a directory that holds a whole model.  Raises ModelError with what to do instead."""
    if directory.is_file():
        raise ModelError(f"{argument} is a file: give the directory of a Hugging Face model.")
    if not directory.is_dir():
        raise ModelError(
            f"There is no directory {argument}: give the directory of a Hugging Face model, or RECIPE:ADDRESS for one in the store, such as "
            "'demo:merge[pesc]'."
        )
    if any((directory / name).is_file() for name in _UNMERGED):
        raise ModelError(
            f"{argument} holds what training changed, not a whole model: merge it first (`pesc run RECIPE --until 'merge[ARM]'`) and use the "
            "merged directory, or 'RECIPE:merge[ARM]'."
        )
    if is_training_checkpoint(directory):
        raise ModelError(
            f"{argument} is a training checkpoint of the reference code: read it with `pesc import {argument} --base DENSE_DIR`."
        )
    fields = read_config(directory)
    if is_published(fields):
        raise ModelError(
            f"{argument} is in a published layout, which would load without its experts: read it with `pesc import {argument}`."
        )
    return fields


def _read_template(option: str) -> str:
    if option in TEMPLATES:
        return TEMPLATES[option]
    try:
        return Path(option).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ModelError(f"--chat-template {option} cannot be read ({reason}): give {', '.join(TEMPLATES)}, or a file of Jinja.") from None
