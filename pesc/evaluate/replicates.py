"""Arms that were trained several times: the difference with what another seed would change in it.

A benchmark's mean difference between two arms varies for two reasons: other questions, and other training runs. With m and k runs of
the arms, n questions,

    variance = s_arm^2 / m + s_control^2 / k + s_questions^2 / n

where s_arm and s_control are the spreads of the runs' scores, and s_questions that of the questions' differences between the arms' means
over runs, less what single runs scatter on single questions, which the first two terms hold already (a two-way analysis of variance; a
bootstrap of runs and questions counts that scatter three times).

Each source of variance has degrees of freedom of its own, and its own quantile t of Student's distribution: with V_j of d_j degrees, the
interval is difference +- sqrt(sum_j t(d_j)^2 V_j) (Banerjee, Sankhya A 23, 1961), which misses no more often than its level whatever the variances
are, and is Student's own where one source is alone. One distribution for their sum, with Welch and Satterthwaite's degrees, misses up to
12 times in 100 here: where the two or three runs happen to lie close together, it takes the many degrees of the questions for theirs. The
runs of two arms of equally many runs are one source, as in Welch's test. Two or three runs make an interval wide, as they should.

Where run i of the arm and run i of the control have a seed in common (the order of the rows, hence much of what is random in training),
`paired_runs_difference` takes the runs' differences first, so that what the seed does to both falls out:

    variance = s_differences^2 / m + s_questions^2 / n
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from pesc.errors import EvaluationError
from pesc.evaluate.results import Sample

_SMALLEST_LEVEL = 1e-100
"""p-values below are 0."""

Part = tuple[float, float]
"""One source of an estimate's variance: the variance, and its degrees of freedom (infinite: it is known)."""


@dataclass(frozen=True)
class Difference:
    """Arm minus control over several runs of both, in the scores' own unit."""

    difference: float
    parts: tuple[Part, ...]

    @property
    def stderr(self) -> float:
        """Standard error."""
        return math.sqrt(sum(variance for variance, _ in self.parts))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        half = self.half_width(0.05)
        return self.difference - half, self.difference + half

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference: the level at which the interval would end at 0."""
        distance = abs(self.difference)
        if self.stderr == 0:
            return 1.0 if distance == 0 else 0.0
        if self.half_width(_SMALLEST_LEVEL) < distance:
            return 0.0
        logarithm = brentq(lambda value: self.half_width(math.exp(value)) - distance, math.log(_SMALLEST_LEVEL), 0.0, xtol=1e-10)
        return math.exp(cast(float, logarithm))

    def half_width(self, level: float) -> float:
        """Of the interval that misses at most this share of the time."""
        return math.sqrt(sum(float(stdtrit(degrees, level / 2)) ** 2 * variance for variance, degrees in self.parts))


@dataclass(frozen=True)
class RunsDifference(Difference):
    """Of runs that have nothing in common."""

    spread_arm: float
    """Standard deviation of the arm's score from run to run."""
    spread_control: float


@dataclass(frozen=True)
class PairedRunsDifference(Difference):
    """Of pairs of runs with a common seed."""

    spread: float
    """Standard deviation of the difference from seed to seed."""


def score_matrix(runs: Sequence[Sequence[Sample]], label: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """The items' keys, and scores [runs, items].  Raises EvaluationError when runs were asked different items or lack scores."""
    tables = [{sample.key: sample.score for sample in run} for run in runs]
    keys = sorted(tables[0])
    if any(table.keys() != tables[0].keys() for table in tables):
        raise EvaluationError(f"{label}: its training runs were asked different items, so they are not taken together.")
    if any(score is None for table in tables for score in table.values()):
        raise EvaluationError(f"{label}: items without a score, so its training runs are not taken together.")
    return keys, np.array([[table[key] for key in keys] for table in tables], dtype=float)


def runs_difference(arm_BSI: Sequence[np.ndarray], control_BSI: Sequence[np.ndarray]) -> RunsDifference:
    """Mean over benchmarks of the difference of two arms.  Each array: [runs, items] of one benchmark, the same runs in each.

    Runs are models, so a run's scores on the benchmarks go together and their mean is taken first. Raises ValueError for fewer than two
    runs of an arm.
    """
    arm, control = (np.mean([scores.mean(axis=1) for scores in arrays], axis=0) for arrays in (arm_BSI, control_BSI))
    if len(arm) < 2 or len(control) < 2:
        raise ValueError("the spread between runs needs two runs of each arm")
    runs: list[Part] = [(float(scores.var(ddof=1)) / len(scores), len(scores) - 1) for scores in (arm, control)]
    parts = [*([_welch(runs)] if len(arm) == len(control) else runs), _questions(arm_BSI, control_BSI)]
    spreads = float(arm.std(ddof=1)), float(control.std(ddof=1))
    return RunsDifference(float(arm.mean() - control.mean()), tuple(parts), *spreads)


def paired_runs_difference(difference_BSI: Sequence[np.ndarray]) -> PairedRunsDifference:
    """Mean over benchmarks (or domains) of arm minus control.  Each array: [pairs of runs, items] of one benchmark, the same pairs in each.

    Raises ValueError for fewer than two pairs.
    """
    by_run = np.mean([scores.mean(axis=1) for scores in difference_BSI], axis=0)
    if len(by_run) < 2:
        raise ValueError("the spread between seeds needs two pairs of runs")
    parts = (
        (float(by_run.var(ddof=1)) / len(by_run), len(by_run) - 1),
        _questions(difference_BSI, [np.zeros_like(d) for d in difference_BSI]),
    )
    return PairedRunsDifference(float(by_run.mean()), parts, float(by_run.std(ddof=1)))


def _welch(parts: Sequence[Part]) -> Part:
    """Two variances as one, with Welch and Satterthwaite's degrees of freedom."""
    variance = sum(part for part, _ in parts)
    weights = sum(part**2 / degrees for part, degrees in parts)
    return variance, variance**2 / weights if weights else math.inf


def _questions(arm_BSI: Sequence[np.ndarray], control_BSI: Sequence[np.ndarray]) -> Part:
    """What the choice of questions adds to the variance of the mean over benchmarks."""
    variances = [_question_variance(a, c) for a, c in zip(arm_BSI, control_BSI, strict=True)]
    return sum(variances) / len(variances) ** 2, max(1, sum(scores.shape[1] - 1 for scores in arm_BSI))


def _question_variance(arm_SI: np.ndarray, control_SI: np.ndarray) -> float:
    """Variance of the mean difference that comes from the choice of questions."""
    items = arm_SI.shape[1]
    if items < 2:
        return 0.0
    differences = float((arm_SI.mean(axis=0) - control_SI.mean(axis=0)).var(ddof=1))
    scatter = sum(_scatter(scores) / len(scores) for scores in (arm_SI, control_SI))
    return max(0.0, differences - scatter) / items


def _scatter(scores_SI: np.ndarray) -> float:
    """Variance of single runs on single questions: the residual mean square of runs x questions."""
    runs, items = scores_SI.shape
    rest = scores_SI - scores_SI.mean(axis=1, keepdims=True) - scores_SI.mean(axis=0, keepdims=True) + scores_SI.mean()
    return float((rest**2).sum()) / ((runs - 1) * (items - 1))


def groups_of(arms: Sequence[str], replicates: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Arm -> itself and its further runs, of those that have results; arms that stand for others are no groups of their own."""
    others = {name for names in replicates.values() for name in names}
    return {arm: (arm, *(name for name in replicates.get(arm, ()) if name in arms)) for arm in arms if arm not in others}
