"""What tells a flow run from another of the same recipe, for its name: `demo 3f2a91bc`, `train[pesc] demo 787df6f1`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flows.parameters import as_overrides, block_of
from pesc.pipeline import build_graph
from pesc.plan import Selection, make_plan
from pesc.recipe import Recipe, load_recipe
from pesc.settings import store_root
from pesc.store import Store
from pesc.store.digest import digest_json

logger = logging.getLogger(__name__)
LENGTH = 8


def run_digest(flow: str, given: Mapping[str, Any]) -> str:
    """Of a stage's flow that is asked for one action: its fingerprint, where its inputs are there. Of the pipeline: of all its settings.

    A name asks no network: an input that only a remote has counts as unknown. "" where neither is known, and for parameters that
    cannot be used: the run itself says what is wrong with them.
    """
    try:
        if flow == "pipeline":
            recipe = load_recipe(given["recipe"], [*as_overrides(given.get("settings")), *(given.get("overrides") or ())])
            return digest_json(recipe.model_dump(mode="json", exclude={"execution"}))[:LENGTH]
        changes = [*as_overrides(given.get("settings"), block_of(flow)), *(given.get("overrides") or ())]
        pattern = f"{flow}[{given['instance']}]" if given.get("instance") else flow
        place = Store(given.get("store") or store_root(), remote=None)
        return _fingerprint(load_recipe(given["recipe"], changes), pattern, place)[:LENGTH]
    except Exception as error:
        logger.debug("The run has no digest in its name: %s", error)
        return ""


def _fingerprint(recipe: Recipe, pattern: str, store: Store) -> str:
    [address] = build_graph(recipe).select([pattern])
    [action] = [action for action in make_plan(recipe, store, Selection(until=(address,))) if action.address == address]
    return action.fingerprint or ""
