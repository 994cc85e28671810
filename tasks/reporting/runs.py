"""A whole run: what it did, what it cost, the benchmarks and their history, the report's page."""

from __future__ import annotations

from collections.abc import Mapping

from pesc.build import Outcome
from pesc.markdown import markdown_table
from pesc.settings import store_url
from pesc.store import Store
from tasks.reporting.artifacts import artifact_key, best_effort, write_markdown, write_table
from tasks.reporting.tables import seconds_text


@best_effort
def publish_summary(recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """What was built and what was there already."""
    rows = [
        [
            "**built**" if outcome.how == "built" else "cached", f"`{outcome.address}`",
            seconds_text(outcome.seconds) if outcome.how == "built" else "", f"`{outcome.ref.digest[:12]}`",
        ]
        for outcome in outcomes.values()
    ]  # fmt: skip
    built = sum(outcome.how == "built" for outcome in outcomes.values())
    said = f"{built} built, {len(outcomes) - built} cached"
    text = f"# Run of {recipe}\n\n{said}\n\n{markdown_table(['', 'action', 'took', 'object'], rows)}\n"
    write_markdown(artifact_key("run", recipe), text, f"Actions of {recipe}: {said}")


@best_effort
def publish_cost(store: Store, recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """Time, GPU-hours, dollars and measured energy of every result that the run has used, whenever it was made."""
    from pesc.cost import HEAD, NOTE, cost_of, cost_rows

    manifests = [store.find(outcome.ref.stage, outcome.ref.fingerprint) for outcome in outcomes.values()]
    rows = cost_rows(cost_of(manifest) for manifest in manifests if manifest)
    table = markdown_table(list(HEAD), rows, numbers=range(1, len(HEAD)))
    write_markdown(artifact_key("cost", recipe), f"# Cost of {recipe}\n\n{table}\n\n{NOTE}\n", f"Cost of {recipe}")


@best_effort
def publish_report(store: Store, recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """The report's tables, and where its page is."""
    digest = outcomes["report"].ref.digest
    place = store.open(outcomes["report"].ref)
    text = (place / "report.md").read_text(encoding="utf-8")
    write_markdown(artifact_key("benchmarks", recipe), f"{text}\n\n{page_markdown(store, digest)}\n", f"Results of {recipe}")
    title = f"Report page of {recipe}"
    write_markdown(artifact_key("page", recipe), f"# {title}\n\n{page_markdown(store, digest)}\n", title)


def page_markdown(store: Store, digest: str) -> str:
    """A link to the page where the store is served (PESC_STORE_URL), else where its file is: no browser follows http: to file:."""
    page = store.object_path(digest) / "report.html"
    if base := store_url():
        return (
            f"[Open the report with its plots]({base}/objects/{digest}/report.html)\n\nThe same file in the store:\n\n```text\n{page}\n```"
        )
    return (
        f"The report with its plots is this file of the store; open it where the store is mounted:\n\n```text\n{page}\n```\n\nTo have a link here, "
        "serve the store by HTTP, and set `PESC_STORE_URL` to its address for the workers."
    )


@best_effort
def publish_history(store: Store, recipe: str, outcomes: Mapping[str, Outcome]) -> None:
    """Each benchmark of this run with its runs before, and all of the recipe's over time: lines, and a table."""
    from pesc.evaluate.history import benchmark_markdown, history_markdown, history_rows, read_history

    history = read_history(store, recipe)
    for address, outcome in outcomes.items():
        points = history.get(address) or []
        if points and points[-1].fingerprint == outcome.ref.fingerprint:
            text = benchmark_markdown(address, recipe, points)
            write_markdown(benchmark_key(address, recipe), text, f"{address} {recipe}: {points[-1].text}")
    if history:
        title = f"Benchmarks of {recipe} over its runs"
        write_markdown(artifact_key("history", recipe), history_markdown(recipe, history), title)
        write_table(artifact_key("history-table", recipe), history_rows(history), title)


def benchmark_key(address: str, recipe: str) -> str:
    """`benchmark-pesc-mmlu-demo` for evaluate[pesc/mmlu] of demo."""
    return artifact_key("benchmark", address.removeprefix("evaluate"), recipe)
