"""The plot of a study: every run's held-out loss, and the pre-registered differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pesc.figures import INK, MUTED, WIDTH, svg_text
from pesc.figures import STYLE as _STYLE

COLOUR = "#0072b2"


def plot_questions(found: Mapping[str, Any]) -> str:
    """Left: a row an arm, dots the runs, bar the 95 % interval over seeds.  Right: differences (arm minus control); hollow: it cannot be told, which a
    secondary question's interval alone does not show (Holm); the band is what counts as none.

    Arms as they came are left out on the left where they are not trained: their loss is of another size.  found: `HeldOutComparison` as data.
    """
    trained = {run["group"] for run in found["runs"] if run["trained"] is not None}
    groups = [group for group in found["groups"] if group["group"] in trained] or found["groups"]
    answers = [answer for answer in found["answers"] if answer["kind"] != "domain"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * max(len(groups), len(answers))))
        panels = figure.subplots(1, 2 if answers else 1, squeeze=False)[0]
        _draw_groups(panels[0], found, groups)
        if answers:
            _draw_answers(panels[1], answers, found["smallest_difference"])
        return svg_text(figure)


def _draw_groups(axes: Any, found: Mapping[str, Any], groups: list[Any]) -> None:
    for row, group in enumerate(groups):
        runs = [run["mean"] for run in found["runs"] if run["group"] == group["group"]]
        if group["low"] is not None:
            axes.plot([group["low"], group["high"]], [row, row], color=COLOUR, linewidth=1.6)
        axes.plot(runs, [row] * len(runs), "o", markersize=4, color=COLOUR, markerfacecolor="none")
        axes.plot([group["mean"]], [row], "|", markersize=10, color=INK)
    axes.set_yticks(range(len(groups)), [group["group"] for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("held-out loss, mean of domains\nnats per token; circle: a seed", fontsize=8)
    axes.grid(axis="y", visible=False)


def _draw_answers(axes: Any, answers: list[Any], smallest: float) -> None:
    axes.axvspan(-smallest, smallest, color=MUTED, alpha=0.2, linewidth=0)
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, answer in enumerate(answers):
        colour = INK if answer["kind"] == "primary" else COLOUR
        axes.plot([answer["low"], answer["high"]], [row, row], color=colour, linewidth=1.6)
        filled = "white" if answer["verdict"] == "cannot tell" else colour
        axes.plot(
            [answer["difference"]], [row], "D" if answer["kind"] == "primary" else "o", markersize=5, color=colour, markerfacecolor=filled
        )
    axes.set_yticks(range(len(answers)), [f"{answer['arm']} −\n{answer['control']}" for answer in answers], fontsize=7)
    axes.set_ylim(len(answers) - 0.5, -0.5)
    axes.set_xlabel(
        "difference, nats per token, 95 % interval\nbelow 0: better; diamond: primary question\nhollow: cannot tell (after Holm)",
        fontsize=8,
    )
    axes.grid(axis="y", visible=False)
