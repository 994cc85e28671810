"""Plots of the report as SVG text: the same bytes for the same numbers, no date, no random ids.

Style and conversion to SVG are those of every page (`pesc.figures`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pesc.evaluate.comparison import Cell, Comparison, FigureComparison
from pesc.evaluate.paired import PairedComparison
from pesc.evaluate.records import Training
from pesc.figures import INK, MUTED, legend_above, plot_funnel
from pesc.figures import STYLE as _STYLE
from pesc.figures import WIDTH as _WIDTH
from pesc.figures import svg_text as _svg

ARM_COLOURS = {"pesc": "#0072b2", "qlora": "#d55e00", "dense": "#7f8790"}
SPARE_COLOURS = ("#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8c6bb1", "#8fbc3f", "#a50026", "#7b4b2a")

MOST_BANDS = 4
"""Intervals over one another that can still be told apart."""


def arm_colours(kinds: Mapping[str, str]) -> dict[str, str]:
    """A colour an arm: the kind's own for its first arm, spare ones for more arms of a kind."""
    spare, taken, colours = iter(SPARE_COLOURS * 8), set(), {}
    for arm, kind in kinds.items():
        colours[arm] = ARM_COLOURS[kind] if kind not in taken else next(spare)
        taken.add(kind)
    return colours


def plot_scores(comparison: Comparison, kinds: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Each arm's score with its interval, a row a benchmark, and the first published column as a diamond.

    Hollow circles and ‡: not every question was asked; a hollow diamond: not comparable for at least one arm.
    """
    benchmarks = [b for b in comparison.benchmarks if any(c.percent for c in comparison.cells if c.benchmark == b)]
    colours = arm_colours(kinds)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.15 + (0.24 + 0.17 * len(comparison.arms)) * len(benchmarks)))
        axes = figure.add_subplot()
        step = 0.72 / max(1, len(comparison.arms))
        for index, arm in enumerate(comparison.arms):
            cells = [(row, cell) for row, b in enumerate(benchmarks) if (cell := comparison.cell(arm, b)) and cell.percent]
            heights = [row + (index - (len(comparison.arms) - 1) / 2) * step for row, _ in cells]
            axes.plot([], [], "o", markersize=5, color=colours[arm], label=arm)
            for limited in (False, True):
                chosen = [(cell, height) for (_, cell), height in zip(cells, heights, strict=True) if _is_limited(cell) == limited]
                _points(axes, chosen, colours[arm], hollow=limited)
        _mark_published(axes, comparison, benchmarks)
        limited = {c.benchmark for c in comparison.cells if _is_limited(c)}
        axes.set_yticks(range(len(benchmarks)), [names.get(b, b) + ("‡" if b in limited else "") for b in benchmarks])
        axes.set_ylim(len(benchmarks) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("score in %, bar: 95 % interval")
        axes.grid(axis="y", visible=False)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda index: labels[index] not in comparison.arms)
        legend_above(figure, [handles[i] for i in order], [labels[i] for i in order], columnspacing=1.4)
        return _svg(figure)


def _is_limited(record: Cell | PairedComparison) -> bool:
    return record.num_items < record.num_available


def _points(axes: Any, chosen: Sequence[tuple[Cell, float]], colour: str, hollow: bool) -> None:
    """Scores with their intervals at the given heights; hollow: of a part of the questions."""
    if not chosen:
        return
    values = [cell.value for cell, _ in chosen]
    errors = [[max(0.0, c.value - c.low) for c, _ in chosen], [max(0.0, c.high - c.value) for c, _ in chosen]]
    axes.errorbar(
        values, [height for _, height in chosen], xerr=errors, fmt="o", markersize=5, color=colour, markerfacecolor="none" if hollow else colour,
        elinewidth=1.6, clip_on=False,
    )  # fmt: skip


def _mark_published(axes: Any, comparison: Comparison, benchmarks: Sequence[str]) -> None:
    points: dict[tuple[str, bool], list[tuple[float, int]]] = {}
    for row, benchmark in enumerate(benchmarks):
        if figures := _first_figures(comparison, benchmark):
            comparable = all(f.comparable for f in figures)
            points.setdefault((figures[0].name, comparable), []).append((figures[0].value, row))
    for (name, comparable), found in sorted(points.items()):
        label = name if comparable else f"{name} (other settings)"
        xs, ys = [x for x, _ in found], [y for _, y in found]
        axes.plot(
            xs,
            ys,
            "D",
            markersize=6,
            color=INK,
            markerfacecolor=INK if comparable else "none",
            label=label,
            linestyle="none",
            clip_on=False,
        )


def plot_bars(comparison: Comparison, kinds: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Scores as bars with intervals, a group a benchmark; the first published column as a line across its group (dotted: not comparable).

    A bar without filling and ‡: not every question was asked.
    """
    benchmarks = [b for b in comparison.benchmarks if any(c.percent for c in comparison.cells if c.benchmark == b)]
    colours, width = arm_colours(kinds), 0.8 / max(1, len(comparison.arms))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.2))
        axes = figure.add_subplot()
        for index, arm in enumerate(comparison.arms):
            for column, benchmark in enumerate(benchmarks):
                cell = comparison.cell(arm, benchmark)
                if cell and cell.percent:
                    _bar(axes, cell, column + (index - (len(comparison.arms) - 1) / 2) * width, 0.92 * width, colours[arm])
        for column, benchmark in enumerate(benchmarks):
            if found := _first_figures(comparison, benchmark):
                fair = all(f.comparable for f in found)
                axes.plot([column - 0.44, column + 0.44], [found[0].value] * 2, color=INK, linewidth=1.4, linestyle="-" if fair else ":")
        handles: list[Any] = [Patch(color=colours[arm], label=arm) for arm in comparison.arms]
        if shown := [f for b in benchmarks for f in _first_figures(comparison, b)[:1]]:
            handles.append(Line2D([], [], color=INK, linewidth=1.4, label=f"{shown[0].name} (dotted: other settings)"))
        limited = {c.benchmark for c in comparison.cells if _is_limited(c)}
        labels = [names.get(b, b) + ("‡" if b in limited else "") for b in benchmarks]
        slanted = len(benchmarks) > 6
        axes.set_xticks(range(len(benchmarks)), labels, rotation=35 if slanted else 0, ha="right" if slanted else "center")
        axes.set_ylim(0, 100)
        axes.set_ylabel("score in %, 95 % interval")
        axes.grid(axis="x", visible=False)
        legend_above(figure, handles, [str(handle.get_label()) for handle in handles])
        return _svg(figure)


def _bar(axes: Any, cell: Cell, place: float, width: float, colour: str) -> None:
    error = [[max(0.0, cell.value - cell.low)], [max(0.0, cell.high - cell.value)]]
    face = "none" if _is_limited(cell) else colour
    axes.bar([place], [cell.value], width, color=face, edgecolor=colour, yerr=error, ecolor=MUTED, error_kw={"elinewidth": 1.2})


def _first_figures(comparison: Comparison, benchmark: str) -> list[FigureComparison]:
    """The first published column beside each arm of a benchmark."""
    return [c.figures[0] for c in comparison.cells if c.benchmark == benchmark and c.figures]


def plot_radar(comparison: Comparison, kinds: Mapping[str, str], names: Mapping[str, str]) -> str | None:
    """Scores in percent on spokes from 0 to 100, a line an arm with its interval as a band; None below three benchmarks that all arms have.

    More than `MOST_BANDS` arms have no bands: they would hide one another.  The area says nothing: it changes with the order of the spokes.
    """
    common = [b for b in comparison.benchmarks if all((c := comparison.cell(arm, b)) and c.percent for arm in comparison.arms)]
    if len(common) < 3:
        return None
    colours = arm_colours(kinds)
    angles = [2 * math.pi * index / len(common) for index in range(len(common))]
    angles.append(0.0)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.6 * _WIDTH))
        axes = figure.add_subplot(projection="polar")
        axes.set_theta_zero_location("N")  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        for arm in comparison.arms:
            cells = [cell for b in [*common, common[0]] if (cell := comparison.cell(arm, b))]
            if len(comparison.arms) <= MOST_BANDS:
                axes.fill_between(angles, [c.low for c in cells], [c.high for c in cells], color=colours[arm], alpha=0.18, linewidth=0)
            axes.plot(angles, [c.value for c in cells], color=colours[arm], linewidth=1.5, label=arm)
        limited = {c.benchmark for c in comparison.cells if _is_limited(c)}
        axes.set_xticks(angles[:-1], [names.get(b, b) + ("‡" if b in limited else "") for b in common])
        axes.set_ylim(0, 100)
        axes.set_yticks([25, 50, 75, 100])
        for angle, label in zip(angles[:-1], axes.get_xticklabels(), strict=True):
            side = math.sin(angle)
            label.set_horizontalalignment("left" if side > 0.1 else "right" if side < -0.1 else "center")
        legend_above(figure, *axes.get_legend_handles_labels())
        return _svg(figure)


def plot_differences(comparison: Comparison, arm: str, colour: str, names: Mapping[str, str]) -> str:
    """One arm minus the control, a row a benchmark, with intervals; the mean over benchmarks last.  Hollow and ‡: part of the questions."""
    pairs = [pair for pair in comparison.paired if pair.arm == arm]
    rows = [
        (names.get(p.benchmark, p.benchmark) + ("‡" if _is_limited(p) else ""), p.difference, p.low, p.high, "o", _is_limited(p))
        for p in pairs
    ]
    rows += [
        ("mean" + ("‡" if m.limited else ""), m.difference, m.low, m.high, "D", m.limited > 0)
        for m in comparison.paired_means
        if m.arm == arm
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.3 * len(rows)))
        axes = figure.add_subplot()
        axes.axvline(0, color=MUTED, linewidth=1)
        for index, (_, value, low, high, shape, hollow) in enumerate(rows):
            errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(
                [value], [index], xerr=errors, fmt=shape, markersize=6, color=colour, markerfacecolor="none" if hollow else colour, elinewidth=1.6,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        reach = max([1.0, *(abs(bound) for row in rows for bound in row[2:4])]) * 1.1
        axes.set_xlim(-reach, reach)
        axes.set_xlabel(f"{arm} minus {pairs[0].control}, percentage points on the same items, bar: 95 % interval")
        axes.grid(axis="y", visible=False)
        return _svg(figure)


def plot_training(training: Mapping[str, Training], colours: Mapping[str, str]) -> str:
    """Training loss of the arms, and the load-balancing loss where there is one."""
    balanced = {arm: run for arm, run in training.items() if run.series("balance")[0]}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.9))
        panels = figure.subplots(1, 2 if balanced else 1, squeeze=False, width_ratios=[3, 2] if balanced else [1])[0]
        for key, axes, runs, label in (
            ("loss", panels[0], training, "training loss in nats per token"),
            ("balance", panels[-1], balanced, "load-balancing loss"),
        ):
            if key == "balance" and not balanced:
                continue
            for arm, run in runs.items():
                steps, values = run.series(key)
                crowded = len(steps) > 60
                axes.plot(
                    steps,
                    values,
                    color=colours[arm],
                    linewidth=0.8 if crowded else 1.5,
                    alpha=0.3 if crowded else 1,
                    label=None if crowded else arm,
                )
                if crowded:
                    axes.plot(steps, _smooth(values), color=colours[arm], linewidth=1.6, label=f"{arm} (smoothed)")
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        handles, labels = panels[0].get_legend_handles_labels()
        legend_above(figure, handles, labels)
        return _svg(figure)


def plot_held_out(training: Mapping[str, Training], colours: Mapping[str, str]) -> str:
    """Held-out loss of the arms, a panel a domain, at most three beside one another."""
    domains = sorted({domain for run in training.values() for domain in run.domains})
    columns = 2 if len(domains) == 4 else min(3, len(domains))
    rows = -(-len(domains) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.5 + 2.1 * rows))
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, domain in zip(panels, domains, strict=False):
            for arm, run in training.items():
                steps, values = run.held_out_series(domain)
                axes.plot(steps, values, "o-", color=colours[arm], markersize=3, linewidth=1.5, label=arm)
            axes.set_title(domain, fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        for axes in panels[len(domains) :]:
            axes.set_axis_off()
        figure.supxlabel("optimizer step", fontsize=9)
        figure.supylabel("held-out loss in nats per token", fontsize=9)
        handles, labels = panels[0].get_legend_handles_labels()
        legend_above(figure, handles, labels)
        return _svg(figure)


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential mean with bias correction."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed


def plot_expert_load(load: Mapping[str, Any], experts: Mapping[int, int]) -> str:
    """How even the routing was: layers x steps, the busiest expert's share times the layer's number of experts (1: all equally busy).

    experts: layer -> number of its experts, of the sparse layers.
    """
    steps, shares = load["steps"], load["max"]
    columns = _evenly(range(len(steps)), 120)
    names, layers = list(experts), len(shares[0])
    values = [[shares[column][row] * experts[name] for column in columns] for row, name in enumerate(names)]
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, min(5.0, max(2.4, 1.3 + 0.075 * layers))))  # lower than 2.4 inches, the bar's label is cut
        axes = figure.add_subplot()
        top = max(2.0, min(float(max(experts.values())), max(max(row) for row in values)))
        image = axes.imshow(
            values, cmap="viridis", vmin=1, vmax=top, aspect="auto", interpolation="none", extent=(0, len(columns), layers, 0)
        )
        ticks = range(0, len(columns), -(-len(columns) // 12))
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(steps[columns[tick]]) for tick in ticks])
        rows = range(0, layers, -(-layers // 10))
        axes.set_yticks([row + 0.5 for row in rows], [str(names[row]) for row in rows])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, label="load of the busiest expert\n(1 = all equal)", pad=0.02)
        return _svg(figure)


def _evenly(items: Iterable[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spaced, first and last among them."""
    found = list(items)
    if len(found) <= most:
        return found
    return [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]


def plot_data(funnel: Sequence[Mapping[str, Any]]) -> str:
    """What became of each data set's rows: kept, and removed by reason, as shares of the rows read."""
    reasons = list(dict.fromkeys(reason for entry in funnel for reason in entry["removed"]))
    return plot_funnel([(entry["name"], entry["read"], entry["kept"], entry["removed"]) for entry in funnel], reasons)
