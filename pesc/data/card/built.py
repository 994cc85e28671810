"""What a recipe's data stages have left in a store: manifests of the sources, objects of the stages, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pesc.plan import PlannedAction
    from pesc.recipe import Recipe
    from pesc.store import Store

DATA_STAGES = ("dedup", "mix", "tokenize")


@dataclass(frozen=True)
class SourceFacts:
    """One source: what the recipe asks for, and what was fetched."""

    name: str
    uri: str
    license: str
    use: tuple[str, ...]
    """`data set NAME`, `benchmark NAME` or `dense model`."""
    revision: str = ""
    """Commit, version, or "" for local files."""
    requested: str = ""
    """What was asked for, where that is a moving name."""
    sha256: str = ""
    """Of the archive or the single file; else of the whole tree."""
    files: int | None = None
    """None: not fetched yet."""
    size_bytes: int = 0


@dataclass(frozen=True)
class CardInputs:
    """Everything a card is made of."""

    recipe: str
    description: str
    sources: tuple[SourceFacts, ...]
    objects: Mapping[str, Path]
    """Stage (dedup, mix, tokenize) -> its object."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Address -> why it is not there."""
    semantic: Mapping[str, Any] = field(default_factory=dict)
    """What dedup's optional semantic pass reports (its manifest's metrics); empty without one."""


def built_data(recipe: Recipe, store: Store) -> CardInputs:
    """What has been built of a recipe's data so far.  Raises DataError when that is no stage at all."""
    from pesc.errors import DataError
    from pesc.plan import make_plan

    actions = [action for action in make_plan(recipe, store) if action.node.stage.name in ("download", *DATA_STAGES)]
    uses = _uses(recipe)
    sources = tuple(_source(action, uses[action.node.instance]) for action in actions if action.node.instance in uses)
    objects = {a.address: store.open(a.manifest.ref) for a in actions if a.address in DATA_STAGES and a.manifest}
    missing = {a.address: a.reason for a in actions if not a.manifest and (a.address in DATA_STAGES or a.node.instance in uses)}
    if not objects:
        raise DataError(
            f"Nothing is built of the data of recipe {recipe.name!r} in {store.root}. Build it with `pesc run {recipe.name} --until tokenize`."
        )
    semantic = next((a.manifest.metrics.get("semantic") for a in actions if a.address == "dedup" and a.manifest), None)
    return CardInputs(recipe.name, recipe.description, sources, objects, missing, semantic or {})


def _uses(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Source -> what it is used for, of the sources that the data stages read."""
    uses: dict[str, list[str]] = {recipe.base: ["dense model"]}
    for name, dataset in recipe.dedup.datasets.items():
        uses.setdefault(dataset.source, []).append(f"data set {name}")
    for name, benchmark in recipe.dedup.benchmarks.items():
        uses.setdefault(benchmark.source, []).append(f"benchmark {name}")
    return {name: tuple(found) for name, found in uses.items()}


def _source(action: PlannedAction, use: tuple[str, ...]) -> SourceFacts:
    config: Any = action.node.config
    if action.manifest is None:
        return SourceFacts(action.node.instance, config.uri, config.license, use)
    facts, output = action.manifest.provenance, action.manifest.output
    return SourceFacts(
        name=action.node.instance,
        uri=config.uri,
        license=config.license,
        use=use,
        revision=str(facts.get("revision") or ""),
        requested=str(facts.get("requested_revision") or ""),
        sha256=str(facts.get("sha256") or output.digest),
        files=len(output.files),
        size_bytes=output.size_bytes,
    )
