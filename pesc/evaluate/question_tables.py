"""Held-out losses and pre-registered answers as text (Markdown and cells of the page).  Plain data in, str out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pesc.evaluate.tables import format_number, format_p
from pesc.markdown import markdown_table

HEADING = "Pre-registered questions"
RULE = (
    "A difference is arm minus control in nats per token, the mean over the domains; below 0 the arm is better. Runs with one seed are paired, row "
    "by row, and the 95 % interval holds the spread from seed to seed and over rows, each with its own degrees of freedom (Student's distribution, "
    "Banerjee's interval: it misses at most 5 % of the time). "
    "Chosen before the runs: no difference, where the whole interval is smaller than {smallest:g} either way; else better where it lies below 0, worse "
    "where above; else it cannot be told. A secondary question must pass 0.05 after Holm as well. A seed changes first values, dropout and the order "
    "of the rows, hence also which are read where training ends before all are; another mixture or other settings are in no interval."
)


def format_loss(value: float | None) -> str:
    """`2.3456`."""
    return "–" if value is None else f"{value:.4f}"


def format_change(value: float) -> str:
    """`+0.0123` or `−0.0123`, with a real minus sign."""
    return f"{value:+.4f}".replace("-", "−")


def format_difference(answer: Mapping[str, Any]) -> str:
    """`−0.0123 [−0.0200, −0.0046]`."""
    return f"{format_change(answer['difference'])} [{format_change(answer['low'])}, {format_change(answer['high'])}]"


def rule(found: Mapping[str, Any]) -> str:
    """How an answer is decided."""
    return RULE.format(smallest=found["smallest_difference"])


def primary_answer(found: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The answer to the primary question, where there is one."""
    return next((answer for answer in (found or {}).get("answers", ()) if answer["kind"] == "primary"), None)


def primary_sentence(found: Mapping[str, Any]) -> str:
    """The answer to the primary question in a sentence; empty where none was asked."""
    if found["smallest_difference"] is None:
        return ""
    answer = primary_answer(found)
    if answer is None:
        return f"Primary question: no answer. {' '.join(found['unanswered'])}"
    return (
        f"Primary question, {answer['arm']} against {answer['control']}: {answer['verdict']} ({format_difference(answer)} nats per token, "
        f"{answer['runs']} seeds, {answer['rows']} rows, p {format_p(answer['p_value'])})."
    )


def answer_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row an answer: question, pair, part, difference, spread, p, p (Holm), verdict."""
    return [
        [
            answer["kind"], f"{answer['arm']} − {answer['control']}", answer["domain"] or "mean", format_difference(answer),
            format_loss(answer["spread"]), format_p(answer["p_value"]), format_p(answer["p_adjusted"]), answer["verdict"] or "–",
        ]
        for answer in found["answers"]
    ]  # fmt: skip


def asked_lines(found: Mapping[str, Any]) -> list[str]:
    """`pesc − qlora: the question in words`, of those that were put in words."""
    return [f"{a['arm']} − {a['control']}: {a['asks']}" for a in found["answers"] if a["asks"] and a["kind"] != "domain"]


ANSWER_HEAD = ("question", "pair", "domain", "difference in nats per token", "spread from seed to seed", "p", "p (Holm)", "verdict")
ANSWER_NUMBERS = (3, 4, 5, 6)
"""Columns of numbers."""


def group_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row an arm: runs, mean loss with its interval over seeds, loss by domain."""
    rows = []
    for group in found["groups"]:
        interval = "" if group["low"] is None else f" [{format_loss(group['low'])}, {format_loss(group['high'])}]"
        domains = [format_loss(group["domains"][name]) for name in found["domains"]]
        rows.append([group["group"], str(group["runs"]), f"{format_loss(group['mean'])}{interval}", format_loss(group["spread"]), *domains])
    return rows


def run_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row a run: arm, number, mean loss, loss by domain, parameters of the model, parameters trained."""
    return [
        [
            run["group"], str(run["number"]), run["arm"], format_loss(run["mean"]), *(format_loss(run["domains"][name]) for name in found["domains"]),
            format_number(run["parameters"]), format_number(run["trained"]),
        ]
        for run in found["runs"]
    ]  # fmt: skip


def group_head(found: Mapping[str, Any]) -> Sequence[str]:
    """Columns of `group_rows`."""
    return ("arm", "seeds", "mean loss, 95 % over seeds", "spread", *found["domains"])


def run_head(found: Mapping[str, Any]) -> Sequence[str]:
    """Columns of `run_rows`."""
    return ("arm", "run", "trained as", "mean loss", *found["domains"], "parameters", "trained")


def summary(found: Mapping[str, Any] | None) -> list[str]:
    """The losses of the arms and the answer to the primary question; nothing where a report has none.  found: results.json's `held_out`."""
    if not found or not found["runs"]:
        return []
    head = group_head(found)
    return [markdown_table(head, group_rows(found), range(1, len(head))), *filter(None, [primary_sentence(found)])]


def questions_markdown(found: Mapping[str, Any]) -> str:
    """The answers, then every arm and every run."""
    parts = []
    if found["smallest_difference"] is not None:
        parts = [f"## {HEADING}", f"**{primary_sentence(found)}**"]
        parts += [found["note"]] if found["note"] else []
        parts += ["\n".join(f"- {line}" for line in lines)] if (lines := asked_lines(found)) else []
        parts += [markdown_table(ANSWER_HEAD, answer_rows(found), ANSWER_NUMBERS), rule(found), *found["unanswered"]]
    if found["runs"]:
        rows = ", ".join(f"{count} {domain}" for domain, count in found["rows"].items())
        parts += ["## Held-out loss of the final models", f"Nats per supervised token, on {rows} rows that were never trained on."]
        groups, runs = group_head(found), run_head(found)
        parts += [
            markdown_table(groups, group_rows(found), range(1, len(groups))),
            markdown_table(runs, run_rows(found), range(3, len(runs))),
        ]
    return "\n\n".join(parts)
