"""Held-out losses of the arms, and what they answer to the questions that a recipe chose before its runs.

    loss of a domain = Σ loss of its rows / Σ their supervised tokens           the measure: the mean over the domains, in nats per token
    score of a row   = its loss / mean tokens of the domain's rows              so the mean of the scores is the domain's loss

Run i of an arm and run i of its control have a seed in common and are read row by row (`replicates.paired_runs_difference`): the interval
holds the spread from seed to seed and that over rows. Not in it: another mixture, other settings.  Lower is better throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from pesc.errors import EvaluationError
from pesc.evaluate.config import Preregistration, Question
from pesc.evaluate.intervals import holm
from pesc.evaluate.paired import Record
from pesc.evaluate.replicates import Difference, groups_of, paired_runs_difference
from pesc.evaluate.verdict import ALPHA, LossVerdict, by_loss
from pesc.heldout.results import HeldOutResult

DIGITS = 6
Losses = Mapping[str, HeldOutResult]


class RunLoss(Record):
    """One trained model (or the base as it came)."""

    arm: str = Field(description="The run's own name.")
    group: str = Field(description="Name of the arm's first run.")
    number: int = Field(description="Which run of its arm, from 1.")
    parameters: int
    trained: int | None = Field(description="Parameters that were trained; None for a model as it came.")
    domains: dict[str, float] = Field(description="Held-out loss by domain, nats per token.")
    mean: float = Field(description="Mean of the domains.")


class GroupLoss(Record):
    """One arm over its runs: the mean, and what another set of seeds would change in it (Student's interval; the rows are taken as fixed)."""

    group: str
    runs: int
    mean: float
    low: float | None = Field(description="None with one run.")
    high: float | None
    spread: float | None = Field(description="Standard deviation from run to run.")
    domains: dict[str, float]


class Answer(Record):
    """An arm against a control, run by run and row by row.  difference = arm - control, nats per token; below 0 the arm is better."""

    kind: str = Field(description="primary, secondary, or domain: a part of the primary one, which decides nothing.")
    arm: str
    control: str
    asks: str
    domain: str | None = Field(description="None: the mean over the domains.")
    runs: int
    rows: int
    difference: float
    low: float
    high: float
    spread: float = Field(description="Standard deviation of the difference from seed to seed.")
    p_value: float
    p_adjusted: float = Field(description="After Holm over the secondary questions, or over the domains; of the primary one, as it is.")
    verdict: LossVerdict | None = Field(description="None for a domain.")


class HeldOutComparison(Record):
    """Everything about held-out losses on the page."""

    domains: tuple[str, ...]
    rows: dict[str, int] = Field(description="Domain -> rows.")
    runs: tuple[RunLoss, ...]
    groups: tuple[GroupLoss, ...]
    smallest_difference: float | None = None
    note: str = ""
    answers: tuple[Answer, ...] = ()
    unanswered: tuple[str, ...] = Field((), description="Questions that could not be answered, and why.")


def compare_losses(
    losses: Losses, arms: Sequence[str], replicates: Mapping[str, Sequence[str]], trained: Mapping[str, int], asked: Preregistration | None
) -> HeldOutComparison | None:
    """None where no arm has held-out losses.  arms: in the page's order; trained: arm -> trained parameters.

    Raises EvaluationError when arms were measured on other rows.
    """
    if not losses:
        return None if asked is None else HeldOutComparison(
            domains=(), rows={}, runs=(), groups=(), smallest_difference=asked.smallest_difference, note=asked.note,
            unanswered=tuple(f"{q.arm} against {q.control}: no arm has held-out losses." for q in asked.questions),
        )  # fmt: skip
    first_name, first = next(iter(losses.items()))
    if other := next((arm for arm, found in losses.items() if found.rows_sha256 != first.rows_sha256), None):
        raise EvaluationError(f"The held-out losses of {first_name} and {other} are of different rows; run heldout again for both.")
    groups = groups_of([arm for arm in arms if arm in losses], replicates)
    runs = [_run(name, group, number, losses[name], trained) for group, names in groups.items() for number, name in enumerate(names, 1)]
    answers, unanswered = _answer_all(asked, losses, replicates) if asked else ([], [])
    return HeldOutComparison(
        domains=first.domains, rows={domain: len(first.rows_of(domain)) for domain in first.domains}, runs=tuple(runs),
        groups=tuple(_group([run for run in runs if run.group == group]) for group in groups),
        smallest_difference=asked.smallest_difference if asked else None, note=asked.note if asked else "", answers=tuple(answers),
        unanswered=tuple(unanswered),
    )  # fmt: skip


def _run(name: str, group: str, number: int, found: HeldOutResult, trained: Mapping[str, int]) -> RunLoss:
    return RunLoss(
        arm=name, group=group, number=number, parameters=found.parameters, trained=trained.get(name), mean=_digits(found.mean),
        domains={domain: _digits(found.loss(domain)) for domain in found.domains},
    )  # fmt: skip


def _group(runs: Sequence[RunLoss]) -> GroupLoss:
    means, low, high, spread = np.array([run.mean for run in runs]), None, None, None
    if len(runs) > 1:
        spread = float(means.std(ddof=1))
        low, high = map(_digits, Difference(float(means.mean()), ((spread**2 / len(runs), len(runs) - 1),)).interval)
    domains = {domain: _digits(float(np.mean([run.domains[domain] for run in runs]))) for domain in runs[0].domains}
    return GroupLoss(
        group=runs[0].group, runs=len(runs), mean=_digits(float(means.mean())), low=low, high=high, domains=domains,
        spread=None if spread is None else _digits(spread),
    )  # fmt: skip


def _answer_all(asked: Preregistration, losses: Losses, replicates: Mapping[str, Sequence[str]]) -> tuple[list[Answer], list[str]]:
    """The primary question with its domains, then the secondary ones; and why some have no answer."""
    answers: dict[str, list[Answer]] = {"primary": [], "domain": [], "secondary": []}
    unanswered = []
    for question in asked.questions:
        kind = "primary" if question is asked.primary else "secondary"
        ours, theirs = ((name, *replicates.get(name, ())) for name in (question.arm, question.control))
        if lost := [name for name in (*ours, *theirs) if name not in losses]:
            unanswered.append(f"{question.arm} against {question.control}: {', '.join(lost)} has no held-out losses.")
            continue
        differences = _differences([losses[name] for name in ours], [losses[name] for name in theirs])
        answers[kind].append(_answer(kind, question, differences, asked.smallest_difference))
        if kind == "primary":
            for domain, array_SI in differences.items():
                answers["domain"].append(_answer("domain", question, {domain: array_SI}, asked.smallest_difference))
    for kind in ("domain", "secondary"):
        for index, value in enumerate(holm([answer.p_value for answer in answers[kind]])):
            answers[kind][index] = _adjusted(answers[kind][index], value)
    return [answer for found in answers.values() for answer in found], unanswered


def _differences(arm: Sequence[HeldOutResult], control: Sequence[HeldOutResult]) -> dict[str, np.ndarray]:
    """Domain -> arm minus control of each row's score, [pairs of runs, rows]."""
    return {domain: _scores(arm, domain) - _scores(control, domain) for domain in arm[0].domains}


def _scores(runs: Sequence[HeldOutResult], domain: str) -> np.ndarray:
    rows_SI = [run.rows_of(domain) for run in runs]
    mean_tokens = np.mean([row.tokens for row in rows_SI[0]])
    return np.array([[row.loss for row in rows] for rows in rows_SI]) / mean_tokens


def _answer(kind: str, question: Question, differences: Mapping[str, np.ndarray], smallest: float) -> Answer:
    found = paired_runs_difference(list(differences.values()))
    low, high = found.interval
    return Answer(
        kind=kind, arm=question.arm, control=question.control, asks=question.asks, domain=next(iter(differences)) if kind == "domain" else None,
        runs=next(iter(differences.values())).shape[0], rows=sum(array.shape[1] for array in differences.values()),
        difference=_digits(found.difference), low=_digits(low), high=_digits(high), spread=_digits(found.spread), p_value=found.p_value,
        p_adjusted=found.p_value, verdict=None if kind == "domain" else by_loss(low, high, smallest),
    )  # fmt: skip


def _adjusted(answer: Answer, p_adjusted: float) -> Answer:
    """With the adjusted p-value; a secondary answer that does not pass it is not told."""
    update: dict[str, Any] = {"p_adjusted": p_adjusted}
    if answer.verdict in ("better", "worse") and p_adjusted >= ALPHA:
        update["verdict"] = "cannot tell"
    return answer.model_copy(update=update)


def _digits(value: float) -> float:
    return round(value, DIGITS)
