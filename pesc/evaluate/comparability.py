"""A measured score as an estimate, and whether a published figure was measured in the same way.

Reasons make a figure not comparable; caveats are said beside it. What a source does not publish about its prompt, its chat format or how
an option was chosen is a caveat: it is unknown for nearly every figure there is.
"""

from __future__ import annotations

from typing import Literal

from pesc.evaluate.baselines import BenchmarkEntry, Figure
from pesc.evaluate.intervals import Estimate, mean_estimate, share_estimate
from pesc.evaluate.results import BenchmarkResult

METRIC_KINDS = {
    "acc": "accuracy", "acc_norm": "accuracy", "pass@1": "pass@1", "pass_at_1": "pass@1", "exact_match": "exact match", "math_verify": "accuracy", "f1": "F1",
}  # fmt: skip
EXACT_MATCH_IS_ACCURACY = frozenset({"gsm8k", "math", "bbh"})
EXTRACTING = frozenset({"strict-match", "flexible-extract"})
IntervalKind = Literal["wilson", "normal", "none"]


def score_estimate(result: BenchmarkResult) -> tuple[IntervalKind, Estimate]:
    """A score in the metric's unit, with Wilson's interval, or a normal one; of kind "none" (no width) where no standard error is known.

    Wilson's needs the score to be the share of right items; a group that weighs its subtasks equally is none.
    """
    correct, total = result.num_correct, result.num_items
    if correct is not None and total and abs(correct / total - result.value) < 1e-9:
        return "wilson", share_estimate(correct / total, total)
    if result.stderr is None:
        return "none", mean_estimate(result.value, 0.0)
    return "normal", mean_estimate(result.value, result.stderr)


def score_interval(result: BenchmarkResult) -> tuple[IntervalKind, float, float]:
    """Kind and bounds of a score's 95 % interval, in the metric's unit."""
    kind, estimate = score_estimate(result)
    low, high = estimate.interval
    return (kind, max(0.0, low), min(1.0, high)) if kind == "normal" and METRIC_KINDS.get(result.metric) else (kind, low, high)


def comparability(result: BenchmarkResult, figure: Figure, row: BenchmarkEntry) -> tuple[str, ...]:
    """Why a measured score cannot be compared with a published figure of `row`; empty when the settings are the same."""
    reasons = [figure.never] if figure.never else []
    if figure.shots is None:
        reasons.append(f"{result.num_fewshot}-shot, the figure's number of examples is not published")
    elif figure.shots != result.num_fewshot:
        reasons.append(f"{result.num_fewshot}-shot, the figure is {figure.shots}-shot")
    if figure.method not in (None, row.method):
        reasons.append(f"answered by {row.method}, the figure by {figure.method}")
    if result.is_subset:
        reasons.append(f"{result.num_items:,} of {result.num_available:,} items")
    if result.task not in row.tasks:
        reasons.append(f"task {result.task} asks another selection or form of {row.name}'s {row.items:,} questions")
    elif result.num_available != row.items and not result.is_subset:
        reasons.append(f"{result.num_available:,} items where {row.name} has {row.items:,}")
    kind = METRIC_KINDS.get(result.metric, result.metric)
    same = kind == figure.metric or (kind == "exact match" and figure.metric == "accuracy" and figure.benchmark in EXACT_MATCH_IS_ACCURACY)
    if not same:
        reasons.append(f"{result.metric}, the figure is {figure.metric}")
    if score_estimate(result)[0] == "none":
        reasons.append("the measured score has no standard error")
    return tuple(reasons)


def caveats(result: BenchmarkResult) -> tuple[str, ...]:
    """What may differ from the way of any published figure, and cannot be known."""
    found = []
    if result.chat_template_sha256 is not None:
        found.append("asked in the chat template; the figure's prompt is not published")
    if result.metric == "acc_norm":
        found.append("acc_norm weighs options by their length; whether the figure does is not published")
    if result.filter in EXTRACTING:
        found.append(f"answers found by {result.filter}; how the figure's were is not published")
    return tuple(found)
