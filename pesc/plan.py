"""What a run would do, and why: HIT, RUN or BLOCKED for every action, without importing torch or building anything.

HIT      the store, or its remote, has the result of exactly this intent
RUN      it will be built; the reason says what changed since the last time this address was built
BLOCKED  it would have to be built, but the selection does not allow it (or something it needs)

An action below one that will RUN is shown as RUN: its own fingerprint is known only when its inputs' bytes are. When they turn out
to be the same as before, it is a HIT after all (early cut-off).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pesc.errors import RecipeError
from pesc.pipeline import Graph, Node, build_graph
from pesc.recipe import Recipe
from pesc.store import ArtifactRef, Manifest, Store
from pesc.store.changes import changes_between
from pesc.store.manifest import Key

Status = Literal["HIT", "RUN", "BLOCKED"]


@dataclass(frozen=True)
class Selection:
    """Which actions may be built.  Patterns are stage names or addresses; the same words on the CLI and in Prefect."""

    only: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    """`--from`: these and what depends on them."""
    until: tuple[str, ...] = ()
    refresh: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    """Addresses of benchmarks that have ended without a result: what can do without them does."""

    def allowed(self, graph: Graph) -> set[str]:
        """Addresses that may be built.  Raises RecipeError when the selection is empty."""
        allowed = {node.address for node in graph.nodes}
        if self.only:
            allowed &= graph.select(self.only)
        if self.start:
            allowed &= graph.downstream(graph.select(self.start))
        if self.until:
            allowed &= graph.upstream(graph.select(self.until))
        if not allowed:
            raise RecipeError("The selection (--only, --from, --until together) leaves nothing to do. Drop one of them.")
        return allowed

    def considered(self, graph: Graph) -> set[str]:
        """Addresses a plan shows: those that may be built, and what they need.  Raises RecipeError for one that cannot be done without."""
        holes = graph.select(self.without) if self.without else set()
        if needed := holes - graph.may_fail:
            raise RecipeError(f"{min(needed)} is no benchmark: nothing can do without it.")
        return graph.upstream(self.allowed(graph)) - holes

    def refreshed(self, graph: Graph) -> set[str]:
        """Addresses that are built even when the store has them.  Raises RecipeError for one that the selection leaves out."""
        chosen = graph.select(self.refresh) if self.refresh else set()
        if outside := chosen - self.allowed(graph):
            raise RecipeError(f"--refresh names {min(outside)}, which --only, --from or --until leaves out.")
        return chosen


@dataclass(frozen=True)
class PlannedAction:
    """One line of a plan."""

    node: Node
    status: Status
    reason: str
    fingerprint: str | None = None
    manifest: Manifest | None = None
    last_seconds: float | None = None
    """How long it took the last time this address was built."""

    @property
    def address(self) -> str:
        """The action's address."""
        return self.node.address


@dataclass(frozen=True)
class Plan:
    """All lines, in the order in which they would run."""

    recipe: Recipe
    actions: tuple[PlannedAction, ...]
    counts: Mapping[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[PlannedAction]:
        return iter(self.actions)


def key_of(node: Node, inputs: Mapping[str, str]) -> Key:
    """The key of a node whose inputs have these digests."""
    return Key(
        stage=node.stage.name,
        code_version=node.stage.code_version,
        config=node.config.model_dump(mode="json"),
        inputs={**inputs, **_local_inputs(node)},
    )


def _local_inputs(node: Node) -> dict[str, str]:
    """Local files enter by content: an edited file is another source."""
    uri = getattr(node.config, "uri", "") if node.stage.name == "download" else ""
    if not uri or uri.startswith(("pypi:", "hub:")):
        return {}
    from pesc.data.sources import local_digest

    digest = local_digest(uri)
    return {"local": digest} if digest else {}


def make_plan(recipe: Recipe, store: Store, selection: Selection = Selection()) -> Plan:
    """Decide HIT, RUN or BLOCKED for every action that the selection considers."""
    graph = build_graph(recipe)
    allowed, refreshed, shown = selection.allowed(graph), selection.refreshed(graph), selection.considered(graph)
    done: dict[str, PlannedAction] = {}
    for node in graph.nodes:
        if node.address in shown:
            done[node.address] = _plan_node(node, recipe, store, done, node.address in allowed, node.address in refreshed)
    actions = tuple(done.values())
    return Plan(recipe, actions, {status: sum(a.status == status for a in actions) for status in ("HIT", "RUN", "BLOCKED")})


def _plan_node(node: Node, recipe: Recipe, store: Store, done: Mapping[str, PlannedAction], allowed: bool, refresh: bool) -> PlannedAction:
    inputs = {name: done[address] for name, address in node.inputs.items() if address in done}  # what is left out may be done without
    pending = [a for a in inputs.values() if a.status != "HIT"]
    if pending:
        return _plan_pending(node, recipe, store, pending, allowed)
    key = key_of(node, {name: a.manifest.output.digest for name, a in inputs.items() if a.manifest})
    manifest = store.find(node.stage.name, key.fingerprint)
    if manifest and not refresh:
        where = f", in {store.remote.url}" if store.remote and not store.has(manifest) else ""
        return PlannedAction(node, "HIT", f"{_age(manifest)}{where}", key.fingerprint, manifest)
    last = _last_built(store, recipe, node)
    seconds = last.seconds if last else None
    reason = "refresh was asked for" if refresh and manifest else _why(store, key, last)
    if not allowed:
        return PlannedAction(node, "BLOCKED", f"{reason}; the selection does not build it", key.fingerprint, None, seconds)
    return PlannedAction(node, "RUN", reason, key.fingerprint, None, seconds)


def _plan_pending(node: Node, recipe: Recipe, store: Store, pending: list[PlannedAction], allowed: bool) -> PlannedAction:
    blocked = [a.address for a in pending if a.status == "BLOCKED"]
    if blocked:
        return PlannedAction(node, "BLOCKED", f"needs {_names(blocked)}, which {'is' if len(blocked) == 1 else 'are'} not there")
    if not allowed:
        return PlannedAction(node, "BLOCKED", "the selection does not build it")
    last = _last_built(store, recipe, node)
    running = [a.address for a in pending]
    if last is None:
        reason = f"never built; waits for {_names(running)}"
    else:
        # what is known already (settings, code) is compared with the inputs as they were
        own = changes_between(last.key, key_of(node, {k: v for k, v in last.key.inputs.items() if k != "local"}))
        reason = "; ".join(
            [*own, f"{_names(running)} will run (kept if the bytes stay the same)" if not own else f"{_names(running)} will run"]
        )
    return PlannedAction(node, "RUN", reason, last_seconds=last.seconds if last else None)


def _last_built(store: Store, recipe: Recipe, node: Node) -> Manifest | None:
    for manifest in store.manifests(node.stage.name):
        if manifest.recipe == recipe.name and manifest.address == node.address:
            return manifest
    return None


def reason_to_run(recipe: Recipe, store: Store, node: Node, key: Key, refresh: bool) -> str:
    """Why a node whose inputs are there is built now."""
    return "refresh was asked for" if refresh else _why(store, key, _last_built(store, recipe, node))


def _why(store: Store, key: Key, last: Manifest | None) -> str:
    if store.manifest(key.stage, key.fingerprint) is not None:
        return "its object is missing from the store"
    if last is None:
        return "never built"
    return "; ".join(changes_between(last.key, key)) or "its last result was removed"


def _names(addresses: list[str]) -> str:
    return ", ".join(addresses) if len(addresses) <= 3 else f"{', '.join(addresses[:2])} and {len(addresses) - 2} more"


def _age(manifest: Manifest) -> str:
    note = f"adopted: {manifest.reason}" if manifest.made_by == "adopt" else f"built {manifest.started_at[:16].replace('T', ' ')}"
    return f"{note}, object {manifest.output.digest[:8]}"


def refs_of(plan: Iterable[PlannedAction]) -> dict[str, ArtifactRef]:
    """References of the actions that are HITs, by address."""
    return {action.address: action.manifest.ref for action in plan if action.manifest}
