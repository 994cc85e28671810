"""An arm against the control on the very same items, alone and over several training runs, with the benchmarks' mean.

The rules are with the other ones in `comparison.RULES`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pesc.errors import EvaluationError
from pesc.evaluate import power, verdict
from pesc.evaluate.intervals import (
    Z_95,
    Estimate,
    bootstrap_p,
    holm,
    mcnemar_exact,
    mean_of,
    paired_mean_estimate,
    paired_share_estimate,
    resampled_means,
)  # fmt: skip
from pesc.evaluate.replicates import runs_difference, score_matrix
from pesc.evaluate.results import BenchmarkResult, Sample
from pesc.evaluate.verdict import Direction

SEED = 20240102
Measured = Mapping[tuple[str, str], BenchmarkResult]
Answers = Mapping[tuple[str, str], Sequence[Sample]]


class Record(BaseModel):
    """A row of a table: it cannot be changed, and has no field that the tables do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PairedComparison(Record):
    """An arm against the control on the same items.  difference = arm - control, in points."""

    arm: str
    control: str
    benchmark: str
    num_items: int
    num_available: int
    difference: float
    low: float
    high: float
    both: int | None = Field(None, description="Items both have right.")
    only_arm: int | None = None
    only_control: int | None = None
    neither: int | None = None
    discordant: int = Field(description="Items on which the two scores differ.")
    p_value: float = Field(description="Exact McNemar test, or the bootstrap's tails where items are not right or wrong.")
    p_adjusted: float = Field(description="After Holm, over the benchmarks of this pair.")
    resolves: float = Field(description="Smallest difference that could be shown, in points.")
    power_of_one_point: float | None = Field(None, description="Chance to find a difference of one point.")
    verdict: Direction = "cannot tell"


class PairedMean(Record):
    """Mean difference over the benchmarks of a pair, each counted once."""

    arm: str
    control: str
    benchmarks: int
    difference: float
    low: float
    high: float
    resolves: float = Field(description="Smallest difference that could be shown, in points.")
    verdict: Direction
    limited: int = Field(description="Benchmarks of which not every question was asked.")


class ReplicatedPair(Record):
    """An arm against the control over several training runs of both.  In points."""

    arm: str
    control: str
    benchmark: str | None = Field(description="None: the mean over the benchmarks.")
    runs_arm: int
    runs_control: int
    num_items: int
    num_available: int
    difference: float
    low: float
    high: float
    spread_arm: float = Field(description="Standard deviation from run to run.")
    spread_control: float
    p_value: float
    p_adjusted: float = Field(description="After Holm, over the benchmarks of this pair; of the mean, as it is.")
    verdict: Direction = "cannot tell"


def compare_arms(
    arm: str, control: str, benchmarks: Iterable[str], measured: Measured, answers: Answers
) -> tuple[list[PairedComparison], PairedMean | None, list[str]]:
    """The pairs, their mean where there are several, and why a pair could not be made."""
    pairs: list[PairedComparison] = []
    differences: list[Estimate] = []
    problems: list[str] = []
    for number, benchmark in enumerate(benchmarks):
        first, second = answers.get((arm, benchmark)), answers.get((control, benchmark))
        if first is None or second is None:
            continue
        try:
            pair, difference = compare_paired(arm, control, benchmark, first, second, SEED + number)
        except EvaluationError as error:
            problems.append(str(error))
            continue
        pairs.append(pair.model_copy(update={"num_available": measured[arm, benchmark].num_available}))
        differences.append(difference)
    adjusted = holm([pair.p_value for pair in pairs])
    for index, (pair, value) in enumerate(zip(pairs, adjusted, strict=True)):
        word = verdict.direction(verdict.outperforms(pair.difference, value))
        pairs[index] = pair.model_copy(update={"p_adjusted": value, "verdict": word})
    return pairs, _mean(arm, control, pairs, differences) if len(pairs) > 1 else None, problems


def _mean(arm: str, control: str, pairs: Sequence[PairedComparison], differences: Sequence[Estimate]) -> PairedMean:
    mean = mean_of(differences)
    low, high = mean.interval
    return PairedMean(
        arm=arm, control=control, benchmarks=len(pairs), difference=digits(100 * mean.value), low=digits(100 * low), high=digits(100 * high),
        resolves=digits(100 * power.smallest_of_stderr((high - low) / (2 * Z_95))), verdict=verdict.direction(verdict.by_interval(low, high)),
        limited=sum(pair.num_items < pair.num_available for pair in pairs),
    )  # fmt: skip


def compare_groups(
    arm: Sequence[str], control: Sequence[str], benchmarks: Iterable[str], measured: Measured, answers: Answers
) -> tuple[list[ReplicatedPair], list[str]]:
    """Two arms over their training runs, a benchmark each and their mean; nothing where one of them was trained once."""
    if len(arm) < 2 or len(control) < 2:
        return [], []
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    problems: list[str] = []
    for benchmark in benchmarks:
        if any((name, benchmark) not in answers for name in (*arm, *control)):
            continue
        try:
            keys, ours = score_matrix([answers[name, benchmark] for name in arm], f"{benchmark}, {arm[0]}")
            other_keys, theirs = score_matrix([answers[name, benchmark] for name in control], f"{benchmark}, {control[0]}")
        except EvaluationError as error:
            problems.append(str(error))
            continue
        if keys == other_keys:  # else compare_arms has said it
            found[benchmark] = ours, theirs
    available = {benchmark: measured[arm[0], benchmark].num_available for benchmark in found}
    pairs = [_replicated(arm, control, {b: arrays}, available) for b, arrays in found.items()]
    for index, value in enumerate(holm([pair.p_value for pair in pairs])):
        word = verdict.direction(verdict.outperforms(pairs[index].difference, value))
        pairs[index] = pairs[index].model_copy(update={"p_adjusted": value, "verdict": word})
    if len(found) > 1:
        mean = _replicated(arm, control, found, available)
        pairs.append(mean.model_copy(update={"verdict": verdict.direction(verdict.by_interval(mean.low, mean.high))}))
    return pairs, problems


def _replicated(
    arm: Sequence[str], control: Sequence[str], arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], available: Mapping[str, int]
) -> ReplicatedPair:
    found = runs_difference([ours for ours, _ in arrays.values()], [theirs for _, theirs in arrays.values()])
    low, high = found.interval
    return ReplicatedPair(
        arm=arm[0], control=control[0], benchmark=next(iter(arrays)) if len(arrays) == 1 else None, runs_arm=len(arm), runs_control=len(control),
        num_items=sum(ours.shape[1] for ours, _ in arrays.values()), num_available=sum(available[b] for b in arrays),
        difference=digits(100 * found.difference), low=digits(100 * low), high=digits(100 * high), spread_arm=digits(100 * found.spread_arm),
        spread_control=digits(100 * found.spread_control), p_value=found.p_value, p_adjusted=found.p_value,
    )  # fmt: skip


def compare_paired(
    arm: str, control: str, benchmark: str, first: Sequence[Sample], second: Sequence[Sample], seed: int
) -> tuple[PairedComparison, Estimate]:
    """One benchmark, item by item, and the difference (as a fraction) with its interval at any level.

    Raises EvaluationError when the items differ or have no score.
    """
    ours, theirs = ({sample.key: sample for sample in samples} for samples in (first, second))
    if ours.keys() != theirs.keys():
        raise EvaluationError(
            f"{benchmark}: {arm} and {control} were asked different items ({len(ours.keys() ^ theirs.keys())} differ), so they are not paired."
        )
    items = [(sample, theirs[key]) for key, sample in ours.items()]
    differences = [float(a.score) - float(b.score) for a, b in items if a.score is not None and b.score is not None]
    if not items or len(differences) < len(items):
        raise EvaluationError(f"{benchmark}: {ours and first[0].task} has no score for each item, so {arm} and {control} are not paired.")
    discordant = sum(d != 0 for d in differences)
    table: dict[str, Any] = {}
    if all(a.correct is not None and b.correct is not None for a, b in items):
        kinds = Counter((a.correct, b.correct) for a, b in items)
        p_value, resolves = mcnemar_exact(kinds[1, 0], kinds[0, 1]), power.smallest_paired(len(items), discordant / len(items))
        table = {"both": kinds[1, 1], "only_arm": kinds[1, 0], "only_control": kinds[0, 1], "neither": kinds[0, 0]}
        table["power_of_one_point"] = digits(power.paired_power(len(items), discordant / len(items), 0.01))
        difference = paired_share_estimate(kinds[1, 0], kinds[0, 1], len(items))
    else:
        resampled = resampled_means(differences, seed)
        p_value, resolves = bootstrap_p(resampled), power.smallest_of_stderr(float(resampled.std()))
        difference = paired_mean_estimate(differences, seed)
    low, high = difference.interval
    pair = PairedComparison(
        arm=arm, control=control, benchmark=benchmark, num_items=len(items), num_available=len(items), difference=digits(100 * difference.value),
        low=digits(100 * low), high=digits(100 * high), discordant=discordant, p_value=p_value, p_adjusted=p_value, resolves=digits(100 * resolves), **table,
    )  # fmt: skip
    return pair, difference


def digits(value: float) -> float:
    """A figure as the tables keep it: four decimals."""
    return round(value, 4)
