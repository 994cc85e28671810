"""What will run and why, before a run; how its results came from one another, after it."""

from __future__ import annotations

from collections.abc import Mapping

from pesc.build import Outcome
from pesc.markdown import markdown_table
from pesc.pipeline import Graph
from pesc.plan import Plan
from pesc.store import Manifest, Store
from tasks.reporting.artifacts import artifact_key, best_effort, tag_run, write_markdown
from tasks.reporting.drawing import draw_graph
from tasks.reporting.tables import seconds_text


@best_effort
def publish_plan(plan: Plan, graph: Graph) -> None:
    """What this run will do, and why; the run gets the recipe's tag, by which the UI finds it."""
    tag_run(f"recipe:{plan.recipe.name}")
    counts = ", ".join(f"{count} {status}" for status, count in plan.counts.items() if count)
    write_markdown(artifact_key("plan", plan.recipe.name), plan_markdown(plan, graph), f"What runs, and why: {counts}")


def plan_markdown(plan: Plan, graph: Graph) -> str:
    """The plan as a table, and the graph with the actions that will run in colour."""
    counts = ", ".join(f"{count} {status}" for status, count in plan.counts.items() if count)
    rows = [
        [
            action.status if action.status == "HIT" else f"**{action.status}**", f"`{action.address}`", action.reason,
            seconds_text(action.last_seconds) if action.last_seconds else "",
        ]
        for action in plan
    ]  # fmt: skip
    running = {action.address for action in plan if action.status == "RUN"}
    shown = {action.address for action in plan}
    edges = {node.address: list(node.inputs.values()) for node in graph.nodes if node.address in shown}
    table = markdown_table(["", "action", "why", "last time"], rows)
    legend = "\n\nA thick border: it will run." if running else ""
    return f"# Plan of {plan.recipe.name}\n\n{counts}\n\n{table}\n\n{draw_graph(edges, marked=running)}{legend}\n"


@best_effort
def publish_lineage(store: Store, recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """How the results that this run has used came from one another."""
    manifests = {address: found for address, outcome in outcomes.items() if (found := _manifest(store, outcome))}
    if manifests:
        write_markdown(artifact_key("lineage", recipe), lineage_markdown(recipe, manifests), f"What came from what: {recipe}")


def _manifest(store: Store, outcome: Outcome) -> Manifest | None:
    return store.find(outcome.ref.stage, outcome.ref.fingerprint)


def lineage_markdown(recipe: str, manifests: Mapping[str, Manifest]) -> str:
    """The manifests as a graph of objects, and a table of what made each.

    An input is an object; the action that made it is found among the manifests by the fingerprint that the reader has recorded.
    """
    made_by = {manifest.fingerprint: address for address, manifest in manifests.items()}
    sources = {
        address: list(dict.fromkeys(made_by[fp] for fp in manifest.input_fingerprints.values() if fp in made_by))
        for address, manifest in manifests.items()
    }
    notes = {address: manifest.output.digest[:8] for address, manifest in manifests.items()}
    rows = [
        [
            f"`{address}`", f"`{manifest.output.digest[:8]}`", manifest.started_at[:16].replace("T", " "),
            str((manifest.environment.get("git") or {}).get("commit", ""))[:8], str(manifest.environment.get("host", "")),
        ]
        for address, manifest in manifests.items()
    ]  # fmt: skip
    table = markdown_table(["action", "object", "made", "commit", "host"], rows)
    return (
        f"# What came from what: {recipe}\n\n{draw_graph(sources, notes)}\n\nUnder each name stands its object, the bytes themselves; an arrow that a "
        f"longer way implies is left out.\n\n{table}\n\n`pesc explain {recipe} ADDRESS` prints a manifest in full.\n"
    )
