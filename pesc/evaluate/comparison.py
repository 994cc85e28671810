"""Arms against each other, and against published figures, with what the numbers do and do not allow to say.

Rules, in one place (they are printed on the page, see `RULES`); `paired` compares arms, `verdict` holds the mathematics, `comparability` says which figures
count, `power` how small a difference can be shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from pesc.evaluate import power, verdict
from pesc.evaluate.baselines import Baselines, Figure
from pesc.evaluate.comparability import METRIC_KINDS, IntervalKind, caveats, comparability, score_estimate, score_interval
from pesc.evaluate.intervals import Z_95, Estimate
from pesc.evaluate.paired import (
    Answers,
    Measured,
    PairedComparison,
    PairedMean,
    Record,
    ReplicatedPair,
    compare_arms,
    compare_groups,
    digits,
)  # fmt: skip
from pesc.evaluate.replicates import groups_of
from pesc.evaluate.results import BenchmarkResult
from pesc.evaluate.verdict import Verdict

RULES = (
    "Intervals are 95 %: Wilson's where every item is right or wrong, else the value ± 1.96 standard errors.",
    "Arms are compared on the very same items: exact McNemar test (where items have other scores than right and wrong, the tails of the paired "
    "bootstrap), Holm-adjusted over the benchmarks, and Bonett and Price's interval of the difference (else the paired bootstrap's), which is not "
    "empty where no answer differs. One is better on a benchmark where the adjusted p-value is below 0.05, and over all where the interval of the "
    "mean, combined from those of the benchmarks, leaves out 0.",
    "A published figure counts as comparable when the metric, the number of examples, the way of answering and the whole set of questions are "
    "the same. Its prompts and harness are another's in any case; what is not published about them is said beside it and keeps it comparable.",
    "A published figure has a sampling error too, that of the same questions; both are taken as independent, which is careful, since the "
    "questions were the same. “Outperforms” on one benchmark is yes (no) when the score lies above (below) a comparable figure with a p-value, "
    "Holm-adjusted over the system's comparable figures, below 0.05; else it cannot be told.",
    "“Outperforms” over all is about the mean difference to the comparable figures, each counted once (of several settings of a benchmark, the "
    "one without chat template): yes (no) when its 95 % interval lies above (below) 0, else it cannot be told. Without a comparable figure it "
    "cannot be told.",
    "“Resolves from” is the smallest difference that this many items show with 95 % confidence in four of five such measurements, before any "
    "correction. Each arm against each system is a question of its own, without a correction over them.",
    "One training run an arm says nothing of how much another seed would differ; those intervals are about the questions, not about the training. "
    "Where both arms were trained several times (`report.replicates`), the spread from run to run is part of the interval, by "
    "Student's distribution: the runs with their few degrees of freedom, the questions with theirs (Banerjee's).",
)


class FigureComparison(Record):
    """A measured score beside a published one.  Points: percent."""

    system: str
    benchmark: str = Field(description="Row of the published figures.")
    name: str
    value: float
    shots: int | None
    metric: str
    source: str
    date: str
    note: str
    difference: float
    low: float = Field(description="95 % interval of the difference, with the figure's own sampling error.")
    high: float
    resolves: float = Field(description="Smallest difference that could be shown, in points.")
    comparable: bool
    reasons: tuple[str, ...] = Field(description="Why it is not comparable.")
    caveats: tuple[str, ...] = Field((), description="What may differ and is not published.")
    p_value: float | None = Field(default=None, description="That there is no difference; None where it is not comparable.")
    p_adjusted: float | None = Field(default=None, description="After Holm, over the system's comparable figures.")
    outperforms: Verdict


class Cell(Record):
    """One arm on one benchmark.  value, low, high in percent when `percent`, else in the metric's own unit."""

    arm: str
    benchmark: str
    metric: str
    filter: str
    value: float
    low: float
    high: float
    percent: bool
    interval: IntervalKind
    num_items: int
    num_available: int
    num_fewshot: int
    chat_template: bool
    figures: tuple[FigureComparison, ...]


class OverallVerdict(Record):
    """Does an arm outperform a published system?"""

    arm: str
    system: str
    name: str
    yes: int
    no: int
    cannot_tell: int
    not_comparable: int = Field(description="Figures that were measured in another way.")
    counted: int = Field(description="Comparable figures in the mean, each published row once.")
    difference: float | None = Field(None, description="Mean difference in points over those counted; None without any.")
    low: float | None = None
    high: float | None = None
    resolves: float | None = Field(None, description="Smallest mean difference that could be shown, in points.")
    outperforms: Verdict


class Comparison(Record):
    """Everything the tables show."""

    arms: tuple[str, ...]
    benchmarks: tuple[str, ...]
    cells: tuple[Cell, ...]
    paired: tuple[PairedComparison, ...]
    paired_means: tuple[PairedMean, ...]
    replicated: tuple[ReplicatedPair, ...] = Field((), description="Where both arms were trained several times.")
    not_paired: tuple[str, ...] = Field(description="Comparisons that could not be made, and why.")
    verdicts: tuple[OverallVerdict, ...]

    def cell(self, arm: str, benchmark: str) -> Cell | None:
        """One cell, or None where the arm has not been asked."""
        return next((c for c in self.cells if (c.arm, c.benchmark) == (arm, benchmark)), None)


def compare(
    measured: Measured,
    answers: Answers,
    arms: Sequence[str],
    control: str,
    systems: Sequence[str],
    baselines: Baselines,
    replicates: Mapping[str, Sequence[str]] | None = None,
) -> Comparison:
    """Tables from results and samples, keyed by (arm, benchmark).  Raises EvaluationError for an unknown column or row.

    replicates: arm -> arms that are further training runs of it.
    """
    benchmarks = tuple(dict.fromkeys(benchmark for _, benchmark in measured))
    for system in systems:
        baselines.require_system(system)
    cells = [_cell(arm, b, measured[arm, b], systems, baselines) for b in benchmarks for arm in arms if (arm, b) in measured]
    verdicts: list[OverallVerdict] = []
    for arm in arms:
        for system in systems:
            cells, overall = _judge(cells, measured, arm, system, baselines)
            verdicts += [overall] if overall else []
    paired: list[PairedComparison] = []
    means: list[PairedMean] = []
    problems: list[str] = []
    for arm in arms:
        if arm == control or control not in arms:
            continue
        pairs, mean, missing = compare_arms(arm, control, benchmarks, measured, answers)
        paired += pairs
        means += [mean] if mean else []
        problems += missing
    groups = groups_of(arms, replicates or {})
    replicated: list[ReplicatedPair] = []
    for arm in groups:
        if arm != control and control in groups:
            pairs, missing = compare_groups(groups[arm], groups[control], benchmarks, measured, answers)
            replicated += pairs
            problems += missing
    return Comparison(
        arms=tuple(arms),
        benchmarks=benchmarks,
        cells=tuple(cells),
        paired=tuple(paired),
        paired_means=tuple(means),
        replicated=tuple(replicated),
        not_paired=tuple(problems),
        verdicts=tuple(verdicts),
    )


def _cell(arm: str, benchmark: str, result: BenchmarkResult, systems: Iterable[str], baselines: Baselines) -> Cell:
    percent = result.num_correct is not None or METRIC_KINDS.get(result.metric) is not None
    scale = 100.0 if percent else 1.0
    kind, low, high = score_interval(result)
    row = result.settings.baseline or baselines.row_of_task(result.task)
    if result.settings.baseline:
        baselines.require_row(result.settings.baseline)
    found = [figure for system in systems if row and (figure := baselines.figure(system, row))]
    figures = tuple(_compare_figure(result, figure, baselines) for figure in found) if percent else ()
    return Cell(
        arm=arm, benchmark=benchmark, metric=result.metric, filter=result.filter, value=digits(result.value * scale), low=digits(low * scale),
        high=digits(high * scale), percent=percent, interval=kind, num_items=result.num_items, num_available=result.num_available,
        num_fewshot=result.num_fewshot, chat_template=result.chat_template_sha256 is not None, figures=figures,
    )  # fmt: skip


def _compare_figure(result: BenchmarkResult, figure: Figure, baselines: Baselines) -> FigureComparison:
    """One score beside one figure, without a verdict yet: that depends on the system's other figures."""
    row = baselines.benchmarks[figure.benchmark]
    reasons = comparability(result, figure, row)
    low, high = _to_figure(result, figure, baselines).interval
    resolves = power.smallest_against_figure(min(1.0, max(0.0, figure.value / 100)), result.num_items, row.items)
    return FigureComparison(
        system=figure.system, benchmark=figure.benchmark, name=baselines.systems[figure.system].name, value=figure.value, shots=figure.shots,
        metric=figure.metric, source=figure.source, date=figure.date, note=figure.note, difference=digits(100 * result.value - figure.value),
        low=digits(100 * low), high=digits(100 * high), resolves=digits(100 * resolves), comparable=not reasons, reasons=reasons,
        caveats=caveats(result), outperforms="cannot tell",
    )  # fmt: skip


def _to_figure(result: BenchmarkResult, figure: Figure, baselines: Baselines) -> Estimate:
    return verdict.against_figure(score_estimate(result)[1], figure.value / 100, baselines.benchmarks[figure.benchmark].items)


def _judge(
    cells: Sequence[Cell], measured: Measured, arm: str, system: str, baselines: Baselines
) -> tuple[list[Cell], OverallVerdict | None]:
    """The cells with the verdicts of one arm against one system, and the verdict over all; None where the system has no figure."""
    shown = [(i, f) for i, cell in enumerate(cells) if cell.arm == arm for f in cell.figures if f.system == system]
    judged = list(cells)
    if not shown:
        return judged, None
    counted = {i: f for i, f in shown if f.comparable}
    differences: dict[int, Estimate] = {}
    for i, f in counted.items():
        figure = baselines.figure(system, f.benchmark)
        assert figure is not None
        differences[i] = _to_figure(measured[arm, cells[i].benchmark], figure, baselines)
    said = verdict.adjusted(list(differences.values()))
    for i, (p_value, p_adjusted, word) in zip(differences, said, strict=True):
        update = {"p_value": p_value, "p_adjusted": p_adjusted, "outperforms": word}
        figures = tuple(f.model_copy(update=update) if f.system == system else f for f in cells[i].figures)
        judged[i] = cells[i].model_copy(update={"figures": figures})
    once = _once_a_row(cells, counted)
    mean, word = verdict.overall([differences[i] for i in once])
    words = [w for _, _, w in said]
    numbers: dict[str, Any] = {}
    if mean:
        bounds = (mean.value, *mean.interval, power.smallest_of_stderr((mean.interval[1] - mean.interval[0]) / (2 * Z_95)))
        numbers = dict(zip(("difference", "low", "high", "resolves"), (digits(100 * x) for x in bounds), strict=True))
    return judged, OverallVerdict(
        arm=arm, system=system, name=baselines.systems[system].name, yes=words.count("yes"), no=words.count("no"), cannot_tell=words.count("cannot tell"),
        not_comparable=len(shown) - len(counted), counted=len(once), outperforms=word, **numbers,
    )  # fmt: skip


def _once_a_row(cells: Sequence[Cell], counted: Mapping[int, FigureComparison]) -> list[int]:
    """Of the settings of one published row, the one without chat template, else the first by name: never chosen by its score."""
    chosen: dict[str, int] = {}
    for i in sorted(counted, key=lambda i: (cells[i].chat_template, cells[i].benchmark)):
        chosen.setdefault(counted[i].benchmark, i)
    return sorted(chosen.values())
