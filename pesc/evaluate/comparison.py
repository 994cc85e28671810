"""Arms against each other, and against published figures, with what the numbers do and do not allow to say.

Rules, in one place (they are printed on the page, see `RULES`):
- A score's 95 % interval is Wilson's where every item is right or wrong, else value ± 1.96 standard errors.
- Two arms are compared on the very same items: exact McNemar test (Holm-adjusted over the benchmarks of the pair) and a paired
  bootstrap interval of the difference; arms that were asked different items are not compared.
- A published figure is comparable when the benchmark's metric, number of examples and whole set of questions are the same. The
  prompts and the harness behind a published figure are never known to be the same.
- "outperforms": yes when comparable and the whole interval lies above the figure, no when comparable and the whole interval lies below
  it, else "cannot tell". Over all benchmarks: yes if all say yes, no if one says no, else "cannot tell".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pesc.errors import EvaluationError
from pesc.evaluate.baselines import Baselines, Figure
from pesc.evaluate.intervals import holm, mcnemar_exact, normal_interval, percentile_interval, resampled_means, wilson_interval
from pesc.evaluate.results import BenchmarkResult, Sample

Verdict = Literal["yes", "no", "cannot tell"]
SEED = 20240102
RULES = (
    "Intervals are 95 %: Wilson's where every item is right or wrong, else the value ± 1.96 standard errors.",
    "Arms are compared on the very same items: exact McNemar test, Holm-adjusted over the benchmarks, and a paired bootstrap interval of the difference.",
    "A published figure counts as comparable when the metric, the number of examples and the whole set of questions are the same. "
    "Its prompts and harness are another's in any case.",
    "“Outperforms” is yes (no) when the figure is comparable and the whole interval lies above (below) it; else it cannot be told. "
    "Over all benchmarks it is yes if each says yes, and no if one says no.",
)
METRIC_KINDS = {
    "acc": "accuracy", "acc_norm": "accuracy", "pass@1": "pass@1", "pass_at_1": "pass@1", "exact_match": "exact match", "math_verify": "accuracy", "f1": "F1",
}  # fmt: skip
EXACT_MATCH_IS_ACCURACY = frozenset({"gsm8k", "math", "bbh"})


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FigureComparison(_Record):
    """A measured score beside a published one.  Points: percent."""

    system: str
    name: str
    value: float
    shots: int | None
    metric: str
    source: str
    date: str
    note: str
    difference: float
    comparable: bool
    reasons: tuple[str, ...] = Field(description="Why it is not comparable.")
    outperforms: Verdict


class Cell(_Record):
    """One arm on one benchmark.  value, low, high in percent when `percent`, else in the metric's own unit."""

    arm: str
    benchmark: str
    metric: str
    filter: str
    value: float
    low: float
    high: float
    percent: bool
    interval: Literal["wilson", "normal", "none"]
    num_items: int
    num_available: int
    num_fewshot: int
    chat_template: bool
    figures: tuple[FigureComparison, ...]


class PairedComparison(_Record):
    """An arm against the control on the same items.  difference = arm - control, in points."""

    arm: str
    control: str
    benchmark: str
    num_items: int
    difference: float
    low: float
    high: float
    both: int | None = Field(None, description="Items both have right.")
    only_arm: int | None = None
    only_control: int | None = None
    neither: int | None = None
    p_value: float | None = Field(None, description="Exact McNemar test.")
    p_adjusted: float | None = Field(None, description="After Holm, over the benchmarks of this pair.")


class PairedMean(_Record):
    """Mean difference over the benchmarks of a pair, each counted once."""

    arm: str
    control: str
    benchmarks: int
    difference: float
    low: float
    high: float


class OverallVerdict(_Record):
    """Does an arm outperform a published system?"""

    arm: str
    system: str
    name: str
    yes: int
    no: int
    cannot_tell: int
    outperforms: Verdict


class Comparison(_Record):
    """Everything the tables show."""

    arms: tuple[str, ...]
    benchmarks: tuple[str, ...]
    cells: tuple[Cell, ...]
    paired: tuple[PairedComparison, ...]
    paired_means: tuple[PairedMean, ...]
    not_paired: tuple[str, ...] = Field(description="Comparisons that could not be made, and why.")
    verdicts: tuple[OverallVerdict, ...]

    def cell(self, arm: str, benchmark: str) -> Cell | None:
        """One cell, or None where the arm has not been asked."""
        return next((c for c in self.cells if (c.arm, c.benchmark) == (arm, benchmark)), None)


Measured = Mapping[tuple[str, str], BenchmarkResult]
Answers = Mapping[tuple[str, str], Sequence[Sample]]


def compare(
    measured: Measured, answers: Answers, arms: Sequence[str], control: str, systems: Sequence[str], baselines: Baselines
) -> Comparison:
    """Tables from results and samples, keyed by (arm, benchmark).  Raises EvaluationError for an unknown column or row."""
    benchmarks = tuple(dict.fromkeys(benchmark for _, benchmark in measured))
    for system in systems:
        baselines.require_system(system)
    cells = tuple(
        _cell(arm, benchmark, measured[arm, benchmark], systems, baselines)
        for benchmark in benchmarks
        for arm in arms
        if (arm, benchmark) in measured
    )
    paired: list[PairedComparison] = []
    means: list[PairedMean] = []
    problems: list[str] = []
    for arm in arms:
        if arm == control or control not in arms:
            continue
        pairs, mean, missing = _compare_arms(arm, control, benchmarks, measured, answers)
        paired += pairs
        means += [mean] if mean else []
        problems += missing
    verdicts = tuple(v for arm in arms for system in systems if (v := _overall(arm, system, baselines.systems[system].name, cells)))
    return Comparison(
        arms=tuple(arms),
        benchmarks=benchmarks,
        cells=cells,
        paired=tuple(paired),
        paired_means=tuple(means),
        not_paired=tuple(problems),
        verdicts=verdicts,
    )


def _cell(arm: str, benchmark: str, result: BenchmarkResult, systems: Iterable[str], baselines: Baselines) -> Cell:
    percent = result.num_correct is not None or METRIC_KINDS.get(result.metric) is not None
    scale = 100.0 if percent else 1.0
    kind, low, high = score_interval(result)
    value = result.value * scale
    row = result.settings.baseline or baselines.row_of_task(result.task)
    if result.settings.baseline:
        baselines.require_row(result.settings.baseline)
    found = [figure for system in systems if row and (figure := baselines.figure(system, row))]
    figures = tuple(_compare_figure(result, value, low * scale, high * scale, figure, baselines) for figure in found) if percent else ()
    return Cell(
        arm=arm, benchmark=benchmark, metric=result.metric, filter=result.filter, value=_digits(value), low=_digits(low * scale), high=_digits(high * scale),
        percent=percent, interval=kind, num_items=result.num_items, num_available=result.num_available, num_fewshot=result.num_fewshot,
        chat_template=result.chat_template_sha256 is not None, figures=figures,
    )  # fmt: skip


def score_interval(result: BenchmarkResult) -> tuple[Literal["wilson", "normal", "none"], float, float]:
    """Kind and bounds of a score's 95 % interval, in the metric's unit.

    Wilson's needs the score to be the share of right items; a group that weighs its subtasks equally is none.
    """
    correct, total = result.num_correct, result.num_items
    if correct is not None and total and abs(correct / total - result.value) < 1e-9:
        return "wilson", *wilson_interval(correct, total)
    if result.stderr is None:
        return "none", result.value, result.value
    low, high = normal_interval(result.value, result.stderr)
    return ("normal", max(0.0, low), min(1.0, high)) if METRIC_KINDS.get(result.metric) else ("normal", low, high)


def _compare_figure(
    result: BenchmarkResult, value: float, low: float, high: float, figure: Figure, baselines: Baselines
) -> FigureComparison:
    reasons = comparability(result, figure, baselines)
    verdict: Verdict = "cannot tell"
    if not reasons and low > figure.value:
        verdict = "yes"
    elif not reasons and high < figure.value:
        verdict = "no"
    return FigureComparison(
        system=figure.system, name=baselines.systems[figure.system].name, value=figure.value, shots=figure.shots, metric=figure.metric, source=figure.source,
        date=figure.date, note=figure.note, difference=_digits(value - figure.value), comparable=not reasons, reasons=reasons, outperforms=verdict,
    )  # fmt: skip


def comparability(result: BenchmarkResult, figure: Figure, baselines: Baselines) -> tuple[str, ...]:
    """Why a measured score cannot be compared with a published figure; empty when the settings are the same."""
    row = baselines.benchmarks[figure.benchmark]
    reasons = []
    if figure.shots is None:
        reasons.append(f"{result.num_fewshot}-shot, the figure's number of examples is not published")
    elif figure.shots != result.num_fewshot:
        reasons.append(f"{result.num_fewshot}-shot, the figure is {figure.shots}-shot")
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
    return tuple(reasons)


def _compare_arms(
    arm: str, control: str, benchmarks: Iterable[str], measured: Measured, answers: Answers
) -> tuple[list[PairedComparison], PairedMean | None, list[str]]:
    pairs: list[PairedComparison] = []
    means: list[np.ndarray] = []
    problems: list[str] = []
    for number, benchmark in enumerate(benchmarks):
        first, second = answers.get((arm, benchmark)), answers.get((control, benchmark))
        if first is None or second is None:
            continue
        try:
            pair, resampled = compare_paired(arm, control, benchmark, first, second, SEED + number)
        except EvaluationError as error:
            problems.append(str(error))
            continue
        pairs.append(pair)
        means.append(resampled)
    tested = [index for index, pair in enumerate(pairs) if pair.p_value is not None]
    adjusted = holm([pairs[index].p_value or 0.0 for index in tested])
    for index, value in zip(tested, adjusted, strict=True):
        pairs[index] = pairs[index].model_copy(update={"p_adjusted": value})
    mean = None
    if len(pairs) > 1:
        low, high = percentile_interval(np.mean(means, axis=0) * 100)
        difference = sum(pair.difference for pair in pairs) / len(pairs)
        mean = PairedMean(
            arm=arm, control=control, benchmarks=len(pairs), difference=_digits(difference), low=_digits(low), high=_digits(high)
        )
    return pairs, mean, problems


def compare_paired(
    arm: str, control: str, benchmark: str, first: Sequence[Sample], second: Sequence[Sample], seed: int
) -> tuple[PairedComparison, np.ndarray]:
    """One benchmark, item by item, and the resampled mean differences (as fractions).

    Raises EvaluationError when the items differ or have no score.
    """
    ours, theirs = ({sample.key: sample for sample in samples} for samples in (first, second))
    if ours.keys() != theirs.keys():
        raise EvaluationError(
            f"{benchmark}: {arm} and {control} were asked different items ({len(ours.keys() ^ theirs.keys())} differ), so they are not paired."
        )
    scores = [(ours[key].score, theirs[key].score) for key in sorted(ours)]
    if not scores or any(a is None or b is None for a, b in scores):
        raise EvaluationError(f"{benchmark}: {ours and first[0].task} has no score for each item, so {arm} and {control} are not paired.")
    differences = [float(a) - float(b) for a, b in scores if a is not None and b is not None]
    resampled = resampled_means(differences, seed)
    low, high = percentile_interval(resampled)
    table: dict[str, Any] = {}
    if all(sample.correct is not None for sample in (*first, *second)):
        kinds = [(ours[key].correct, theirs[key].correct) for key in ours]
        table = {
            "both": kinds.count((1, 1)),
            "only_arm": kinds.count((1, 0)),
            "only_control": kinds.count((0, 1)),
            "neither": kinds.count((0, 0)),
        }
        table["p_value"] = mcnemar_exact(kinds.count((1, 0)), kinds.count((0, 1)))
    pair = PairedComparison(
        arm=arm, control=control, benchmark=benchmark, num_items=len(differences), difference=_digits(100 * sum(differences) / len(differences)),
        low=_digits(100 * low), high=_digits(100 * high), **table,
    )  # fmt: skip
    return pair, resampled


def _overall(arm: str, system: str, name: str, cells: Iterable[Cell]) -> OverallVerdict | None:
    said = [figure.outperforms for cell in cells if cell.arm == arm for figure in cell.figures if figure.system == system]
    if not said:
        return None
    counts = {word: said.count(word) for word in ("yes", "no", "cannot tell")}
    overall: Verdict = "no" if counts["no"] else "yes" if counts["yes"] == len(said) else "cannot tell"
    return OverallVerdict(
        arm=arm, system=system, name=name, yes=counts["yes"], no=counts["no"], cannot_tell=counts["cannot tell"], outperforms=overall
    )


def _digits(value: float) -> float:
    return round(value, 4)
