"""Figures of the data card as SVG text, in the style of every page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pesc.figures import MUTED, STYLE, WIDTH, legend_above, svg_text

DOMAIN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f8790")
_BINS = 48
_MAX_TURNS = 8


def plot_lengths(lengths: Mapping[str, np.ndarray], unit: str) -> str:
    """A histogram a series: share of its rows by length; what lies above the 99.5th percentile is in the last bin."""
    lengths = {name: values for name, values in lengths.items() if len(values)}
    top = max(float(np.percentile(values, 99.5)) for values in lengths.values())
    edges = np.linspace(0, max(top, 1.0), _BINS + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 1.05 * len(lengths)))
        panels = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
        for index, (axes, (name, values)) in enumerate(zip(panels, lengths.items(), strict=True)):
            counts = np.histogram(np.minimum(values, edges[-1]), edges)[0]
            colour = DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]
            axes.bar(edges[:-1], 100 * counts / len(values), width=np.diff(edges) * 0.92, align="edge", color=colour)
            axes.axvline(float(np.median(values)), color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
            axes.set_title(f"{name}: {len(values):,} rows, median {np.median(values):,.0f}", loc="left", fontsize=9)
            axes.grid(axis="x", visible=False)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        panels[-1].set_xlabel(f"length of a row in {unit}")
        panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panels[-1].set_xlim(0, edges[-1])
        return svg_text(figure)


def plot_turns(turns: Mapping[str, Counter[int]]) -> str:
    """Share of each domain's rows by the number of user turns."""
    most = min(_MAX_TURNS, max(3, *(max(counter) for counter in turns.values())))
    places = np.arange(1, most + 1)
    width = 0.8 / len(turns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.5))
        axes = figure.add_subplot()
        for index, (name, counter) in enumerate(turns.items()):
            total = max(1, counter.total())
            shares = [100 * sum(n for turn, n in counter.items() if min(max(turn, 1), most) == place) / total for place in places]
            colour = DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]
            bars = axes.bar(places + (index - (len(turns) - 1) / 2) * width, shares, width=width * 0.92, color=colour, label=name)
            axes.bar_label(bars, [f"{value:.0f}" if value >= 0.5 else f"{value:.1g}" if value else "" for value in shares], fontsize=7)
        labels = [str(place) for place in places]
        if any(max(counter) > most for counter in turns.values()):
            labels[-1] += " or more"
        axes.set_xticks(places, labels)
        axes.set_xlim(0.4, most + 0.6)
        axes.set_ylim(0, 108)
        axes.set_xlabel("user turns in a row")
        axes.set_ylabel("share of rows in %")
        axes.grid(axis="x", visible=False)
        legend_above(figure, *axes.get_legend_handles_labels(), handlelength=1)
        return svg_text(figure)
