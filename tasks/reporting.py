"""Plans, progress, results and reports as artifacts of the Prefect UI.

Artifacts of one key keep their history: `benchmarks-demo` is a time line of benchmark tables, `benchmark-pesc-mmlu-demo` one of a single
benchmark, with a version for every run, whether it computed the result or found it. An artifact is a view, so one that cannot
be written costs a warning and never a run.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from pesc.build import Job, Outcome
from pesc.pipeline import Graph
from pesc.plan import Plan
from pesc.progress_text import fields_text
from pesc.recipe import Recipe
from pesc.stage import Progress
from pesc.store import Manifest, Store

logger = logging.getLogger(__name__)
ARTIFACT_SECONDS = 10.0
"""Seconds between updates of a progress artifact; a stage shorter than this has none."""
LOG_SECONDS = 30.0
"""Seconds between progress lines in the log."""
P = ParamSpec("P")


def artifact_key(*parts: str) -> str:
    """A key that Prefect accepts: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _best_effort(publish: Callable[P, None]) -> Callable[P, None]:
    """A view that cannot be written is a warning."""

    @functools.wraps(publish)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            publish(*args, **kwargs)
        except Exception as error:
            logger.warning("%s: the Prefect UI will lack an artifact (%s: %s)", publish.__name__, type(error).__name__, error)

    return attempt


class ProgressReport:
    """A builder's progress as a progress artifact and, now and then, a log line."""

    def __init__(self, job: Job, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._job, self._log, self._clock = job, log, clock
        self._artifact: UUID | None = None
        self._shown = self._logged = clock()

    def __call__(self, progress: Progress) -> None:
        """Show it, unless something was shown a moment ago."""
        now = self._clock()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._log.info("%s", progress_line(progress))
        is_last = self._artifact is not None and progress.total > 0 and progress.done >= progress.total
        if now - self._shown >= ARTIFACT_SECONDS or is_last:
            self._shown = now
            self._show(progress)

    @_best_effort
    def _show(self, progress: Progress) -> None:
        percent = min(100.0, 100 * progress.done / progress.total) if progress.total else 0.0
        if self._artifact is None:
            self._artifact = _uuid(create_progress_artifact(percent, key=None, description=self._job.label))
        else:
            update_progress_artifact(self._artifact, percent, description=f"{self._job.label}: {progress_line(progress)}")


def _uuid(value: Any) -> UUID:
    assert isinstance(value, UUID)  # the synchronous form of a call that Prefect types for both
    return value


def progress_line(progress: Progress) -> str:
    """`40/200 steps  loss 1.93`."""
    parts = [f"{progress.done:g}/{progress.total:g} {progress.unit}", progress.message, fields_text(progress.fields)]
    return "  ".join(filter(None, parts))


@_best_effort
def publish_plan(plan: Plan, graph: Graph) -> None:
    """What this run will do, and why."""
    create_markdown_artifact(plan_markdown(plan, graph), key=artifact_key("plan", plan.recipe.name), description="What runs, and why")


def plan_markdown(plan: Plan, graph: Graph) -> str:
    """The plan as a table, and the graph with the actions that will run in colour."""
    counts = ", ".join(f"{count} {status}" for status, count in plan.counts.items() if count)
    rows = [
        [action.status, f"`{action.address}`", action.reason, seconds_text(action.last_seconds) if action.last_seconds else ""]
        for action in plan
    ]
    running = {action.address for action in plan if action.status == "RUN"}
    table = markdown_table(["", "action", "why", "last time"], rows)
    return f"# Plan of {plan.recipe.name}\n\n{counts}\n\n{table}\n\n{lineage(graph, {a.address for a in plan}, running)}\n"


def lineage(graph: Graph, shown: set[str], running: set[str]) -> str:
    """A mermaid graph of the shown actions; the running ones are marked."""
    nodes = [node for node in graph.nodes if node.address in shown]
    names = {node.address: f"n{number}" for number, node in enumerate(nodes)}
    lines = ["```mermaid", "graph LR", "  classDef run stroke-width:3px,stroke:#d97706"]
    for node in nodes:
        mark = ":::run" if node.address in running else ""
        lines.append(f'  {names[node.address]}["{node.address}"]{mark}')
        lines.extend(f"  {names[source]} --> {names[node.address]}" for source in dict.fromkeys(node.inputs.values()) if source in names)
    return "\n".join([*lines, "```"])


@_best_effort
def publish_result(store: Store, outcome: Outcome) -> None:
    """How one result was made."""
    manifest = store.manifest(outcome.ref.stage, outcome.ref.fingerprint)
    if manifest is None:
        raise FileNotFoundError(f"{outcome.address} has no manifest")
    create_markdown_artifact(
        result_markdown(store, manifest),
        key=artifact_key(outcome.address, manifest.recipe),
        description=f"{outcome.address} {manifest.recipe}",
    )


def result_markdown(store: Store, manifest: Manifest) -> str:
    """A manifest for reading: names, inputs, measurements, where it was made."""
    facts = [
        ["fingerprint", f"`{manifest.fingerprint}`"],
        ["object", f"`{store.object_path(manifest.output.digest)}`"],
        ["size", f"{manifest.output.size_bytes / 1e6:.1f} MB in {len(manifest.output.files)} files"],
        ["took", seconds_text(manifest.seconds)],
        ["code version", str(manifest.key.code_version)],
        *([f"input {name}", f"`{digest[:12]}`"] for name, digest in manifest.key.inputs.items()),
        *([name, _cell(value)] for name, value in manifest.provenance.items()),
        *([name, _cell(manifest.environment.get(name))] for name in ("host", "hardware", "git") if manifest.environment.get(name)),
    ]
    measured = [[name, _cell(value)] for name, value in manifest.metrics.items()]
    parts = [f"# {manifest.address} of {manifest.recipe}", markdown_table(["", ""], facts)]
    if measured:
        parts += ["## Measured", markdown_table(["", ""], measured)]
    parts += ["## Settings", f"```json\n{json.dumps(manifest.key.config, indent=1)}\n```"]
    return "\n\n".join(parts) + "\n"


@_best_effort
def publish_training(store: Store, outcome: Outcome) -> None:
    """The curves of a training run."""
    from pesc.evaluate.training_page import training_markdown

    manifest = store.manifest(outcome.ref.stage, outcome.ref.fingerprint)
    recipe = manifest.recipe if manifest else ""
    title = f"Training: {outcome.address} of {recipe}"
    events = store.action_path(outcome.ref.stage, outcome.ref.fingerprint) / "events.jsonl"
    text = training_markdown(title, store.open(outcome.ref), events)
    create_markdown_artifact(text, key=artifact_key("training", outcome.address, recipe), description=title)


@_best_effort
def publish_routing(store: Store, outcome: Outcome) -> None:
    """The use of the experts, in numbers and pictures."""
    from pesc.evaluate.training_page import as_data_uri
    from pesc.figures import svg_text
    from pesc.routing.plots import draw
    from pesc.routing.results import read_result
    from pesc.routing.tables import routing_markdown

    manifest = store.manifest(outcome.ref.stage, outcome.ref.fingerprint)
    recipe = manifest.recipe if manifest else ""
    result = read_result(store.open(outcome.ref))
    pictures = [f"![{name}]({as_data_uri(svg_text(figure))})" for name, figure in draw(result).items()]
    text = "\n\n".join([routing_markdown({outcome.address: result}, level=1), *pictures]) + "\n"
    create_markdown_artifact(
        text, key=artifact_key(outcome.address, "experts", recipe), description=f"Experts: {outcome.address} of {recipe}"
    )


@_best_effort
def publish_report(store: Store, recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """The report's tables, and a link to its page."""
    place = store.open(outcomes["report"].ref)
    page = place / "report.html"
    text = (place / "report.md").read_text(encoding="utf-8")
    create_markdown_artifact(f"{text}\n\nPage: `{page}`\n", key=artifact_key("benchmarks", recipe), description=f"Results of {recipe}")
    create_link_artifact(page.as_uri(), link_text=str(page), key=artifact_key("page", recipe), description=f"Report page of {recipe}")


@_best_effort
def publish_history(store: Store, recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """Each benchmark of this run with its runs before, and all of the recipe's over time: lines, and a table."""
    from pesc.evaluate.history import benchmark_markdown, history_markdown, history_rows, read_history

    history = read_history(store, recipe)
    for address, outcome in outcomes.items():
        points = history.get(address) or []
        if points and points[-1].fingerprint == outcome.ref.fingerprint:
            text = benchmark_markdown(address, recipe, points)
            create_markdown_artifact(text, key=benchmark_key(address, recipe), description=f"{address} {recipe}: {points[-1].text}")
    if history:
        title = f"Benchmarks of {recipe} over its runs"
        create_markdown_artifact(history_markdown(recipe, history), key=artifact_key("history", recipe), description=title)
        create_table_artifact(history_rows(history), key=artifact_key("history-table", recipe), description=title)


def benchmark_key(address: str, recipe: str) -> str:
    """`benchmark-pesc-mmlu-demo` for evaluate[pesc/mmlu] of demo."""
    return artifact_key("benchmark", address.removeprefix("evaluate"), recipe)


@_best_effort
def publish_card(store: Store, recipe: Recipe) -> None:
    """The data card of what has been built so far."""
    from pesc.data.card import built_data, render_card

    text = render_card(built_data(recipe, store)).markdown
    create_markdown_artifact(text, key=artifact_key("data-card", recipe.name), description=f"Data of {recipe.name}")


@_best_effort
def publish_cost(store: Store, recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """Time, GPU-hours, dollars and measured energy of every result that the run has used, whenever it was made."""
    from pesc.cost import HEAD, NOTE, cost_of, cost_rows

    manifests = [store.manifest(outcome.ref.stage, outcome.ref.fingerprint) for outcome in outcomes.values()]
    table = markdown_table(list(HEAD), cost_rows(cost_of(manifest) for manifest in manifests if manifest))
    create_markdown_artifact(
        f"# Cost of {recipe}\n\n{table}\n\n{NOTE}\n", key=artifact_key("cost", recipe), description=f"Cost of {recipe}"
    )


@_best_effort
def publish_summary(recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """What was built and what was there already."""
    rows = [
        [
            outcome.how,
            f"`{outcome.address}`",
            seconds_text(outcome.seconds) if outcome.how == "built" else "",
            f"`{outcome.ref.digest[:12]}`",
        ]
        for outcome in outcomes.values()
    ]
    text = f"# {recipe}\n\n{markdown_table(['', 'action', 'seconds', 'object'], rows)}\n"
    create_markdown_artifact(text, key=artifact_key("run", recipe), description=f"Actions of {recipe}")


@_best_effort
def publish_note(key: str, title: str, lines: list[str]) -> None:
    """A titled list."""
    create_markdown_artifact(
        "\n".join([f"# {title}", "", *(f"- {line}" for line in lines)]) + "\n", key=artifact_key(key), description=title
    )


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table; bars and line breaks inside cells are escaped."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells)


def seconds_text(seconds: float) -> str:
    """`41.0 s`, `12.5 min` or `3.1 h`."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value, default=str)
    return text if len(text) <= 400 else text[:397] + "..."
