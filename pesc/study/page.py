"""study.md: the answers, every arm and every seed, with what each took.  Plain data in, str out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pesc.cost import time_text
from pesc.evaluate.question_tables import format_loss, questions_markdown
from pesc.evaluate.tables import format_number, replicated_table, results_table
from pesc.markdown import markdown_table
from pesc.routing.results import RoutingResult
from pesc.routing.tables import NOTES, SUMMARY_HEAD, summary_rows
from pesc.study.costs import ArmCost

HEAD = ("arm", "mean loss", "trained", "tokens/s", "peak memory of a rank", "training", "other stages", "device")
TIMES = (
    "Times are wall time as it was when each result was built, on a machine that may have had other work; tokens per second and memory are of training. "
    "Other stages: upcycle, merge, heldout, routing and the benchmarks of the arm; what arms share is counted with each."
)


def study_markdown(
    results: Mapping[str, Any], description: str, costs: Sequence[ArmCost], seconds: float, processors: Sequence[str]
) -> str:
    """results: the report's results.json; seconds: of all results together; processors: that built them."""
    found = results["held_out"]
    runs = {run["arm"]: run for run in found["runs"]} if found else {}
    parts = [f"# {results['title']}", f"{description}."]
    parts += [questions_markdown(found)] if found else []
    if found and found["runs"]:
        parts.append("![held-out loss of every arm, and the differences](plots/questions.png)")
    parts += ["## What it took", markdown_table(HEAD, [_row(cost, runs.get(cost.arm)) for cost in costs], numbers=range(1, 7))]
    where = f" Built on: {', '.join(processors)}." if processors else ""
    parts.append(f"All results together: {time_text(seconds)}, the sum of each one's own.{where} {TIMES}")
    parts += ["## Benchmarks", results_table(results)]
    if results["comparison"]["replicated"]:
        parts += [f"Against {results['control_arm']}, over all runs of both arms:", replicated_table(results)]
    if routing := {arm: RoutingResult.model_validate(value) for arm, value in results["routing"].items()}:
        means = "Means over the layers; dead: of all layers; p: of one test for the model, by shuffling the rows' domains."
        parts += ["## Routing", markdown_table(SUMMARY_HEAD, summary_rows(routing), numbers=range(1, 8)), means, *NOTES]
    parts.append("The data, and each layer's routing, are in report.html.")
    return "\n\n".join(parts) + "\n"


def _row(cost: ArmCost, run: Mapping[str, Any] | None) -> list[str]:
    memory = "–" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 1e9:.2f} GB"
    return [
        cost.arm, format_loss(run["mean"] if run else None), format_number(run["trained"] if run else None),
        "–" if cost.tokens_per_second is None else f"{cost.tokens_per_second:,.0f}", memory,
        "–" if cost.train_seconds is None else time_text(cost.train_seconds), time_text(cost.other_seconds), cost.device or "–",
    ]  # fmt: skip
