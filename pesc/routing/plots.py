"""Pictures of the routing, in the style of every page (`pesc.figures`): the same bytes for the same numbers.

`draw` gives all figures of one model by name; `svg_text` and `png_bytes` of `pesc.figures` turn one into a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pesc.figures import INK, MUTED, STYLE, WIDTH
from pesc.routing.results import Agreement, LayerRouting, RoutingResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOUR, SECOND = "#0072b2", "#d55e00"
ON_DARK, ON_LIGHT = "#ffffff", "#101418"
"""Text inside cells: fixed, since the cells do not follow light and dark mode."""
MOST_RECTANGLES = 600
MOST_LABELLED = 16
"""Experts up to which cells carry their number."""
ORDINALS = ("first", "second", "third", "fourth")


def draw(result: RoutingResult, layer: int | None = None, other: tuple[str, RoutingResult] | None = None) -> dict[str, Figure]:
    """domains, load, pairs and specialisation, as far as there is something to show.

    layer: of `domains` and `pairs`; None: the middle one.  other: name and routing of another model on the same rows, for `specialisation`.

    Raises KeyError when the model has no router at `layer`.
    """
    if not result.layers:
        return {}
    shown = result.at(result.shown_layer if layer is None else layer)
    figures = {"domains": plot_domains(shown, result.top_k), "load": plot_load(result.layers)}
    if result.top_k > 1 and len(shown.load) > 2:
        figures["pairs"] = plot_pairs(_neighbours(result, shown))
    if result.overall:
        figures["specialisation"] = plot_specialisation(result, other)
    return figures


def plot_domains(entry: LayerRouting, top_k: int) -> Figure:
    """Experts x domains of one layer: share of the domain's choices in %, for all K, the first and the second choice (PESC's Figure 4)."""
    panels = [(f"top-{top_k}", range(top_k)), *((f"{ORDINALS[k]} choice", [k]) for k in range(min(2, top_k)) if top_k > 1)]
    tables = [_domain_shares(entry, ranks) for _, ranks in panels]
    experts, domains = len(entry.load), list(entry.choices)
    top = max(2 / experts, *(value for table in tables for row in table for value in row))
    with _figure(1.25 + max(1.6, min(0.3 * experts, 5.2))) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        mesh = None
        for panel, (title, _), table in zip(axes, panels, tables, strict=True):
            mesh = _heat_map(panel, table, 0, 100 * top, scale=100)
            panel.set_title(title, fontsize=9)
            _name_columns(panel, domains)
            if experts <= MOST_LABELLED and len(domains) <= 6:
                _write_cells(panel, table, 100 * top, scale=100, form=".0f")
        _number_rows(axes[0], range(experts))
        axes[0].set_ylabel("expert")
        figure.suptitle(f"layer {entry.layer}", x=0.01, ha="left", fontsize=9, color=MUTED)
        _colour_bar(figure, mesh, axes, f"% of the domain's choices\n(even: {100 / experts:.3g})")
        return figure


def _domain_shares(entry: LayerRouting, ranks: Sequence[int]) -> list[list[float]]:
    """[E][D] shares of 1 of each domain's choices."""
    columns = []
    for by_rank in entry.choices.values():
        counts = [sum(by_rank[k][expert] for k in ranks) for expert in range(len(entry.load))]
        columns.append([count / max(1, sum(counts)) for count in counts])
    return [list(row) for row in zip(*columns, strict=True)]


def plot_load(layers: Sequence[LayerRouting]) -> Figure:
    """Layers x experts: load over an even load; dead experts are crossed out."""
    experts = max(len(entry.load) for entry in layers)
    table = [
        [entry.load[expert] * len(entry.load) if expert < len(entry.load) else float("nan") for entry in layers]
        for expert in range(experts)
    ]
    top = max(2.0, *(value for row in table for value in row if value == value))
    with _figure(1.1 + max(1.2, min(0.24 * experts, 5.0))) as figure:
        axes = figure.add_subplot()
        mesh = _heat_map(axes, table, 0, top)
        dead = [(x + 0.5, expert + 0.5) for x, entry in enumerate(layers) for expert in entry.dead]
        axes.plot([x for x, _ in dead], [y for _, y in dead], "x", color=ON_DARK, markersize=4, markeredgewidth=1)
        _number_columns(axes, [entry.layer for entry in layers])
        _number_rows(axes, range(experts))
        axes.set_xlabel("layer")
        axes.set_ylabel("expert")
        _colour_bar(figure, mesh, [axes], "load (1 = even)" + ("\n× = dead" if dead else ""))
        return figure


def plot_pairs(layers: Sequence[LayerRouting]) -> Figure:
    """Experts x experts of some layers: pairs chosen together over what experts as busy would have at random, on a scale of doublings."""
    from math import log2

    experts = max(len(entry.load) for entry in layers)
    with _figure(2.75) as figure:
        axes = figure.subplots(1, len(layers), squeeze=False)[0]
        mesh = None
        for panel, entry in zip(axes, layers, strict=True):
            logs = [[float("nan") if v is None else max(-2.0, min(2.0, log2(v) if v else -2.0)) for v in row] for row in entry.lift]
            mesh = _heat_map(panel, logs, -2, 2, colours="RdBu_r")
            panel.set_aspect("equal")
            panel.set_title(f"layer {entry.layer}", fontsize=9)
            _number_columns(panel, range(len(entry.load)))
            _number_rows(panel, range(len(entry.load)))
            panel.set_xlabel("expert")
            if experts <= 8:
                _write_lift(panel, entry)
        axes[0].set_ylabel("expert")
        bar = _colour_bar(figure, mesh, axes, "chosen together, over chance")
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "1", "2", "≥ 4"])
        return figure


def _neighbours(result: RoutingResult, shown: LayerRouting) -> list[LayerRouting]:
    """The first layer, the shown one and the last, each once."""
    wanted = {entry.layer: entry for entry in (result.layers[0], shown, result.layers[-1])}
    return [wanted[number] for number in sorted(wanted)]


def plot_specialisation(result: RoutingResult, other: tuple[str, RoutingResult] | None = None) -> Figure:
    """Mutual information of expert and domain by layer, above what shuffled domains give; filled where that is more than chance (Holm, 0.05)."""
    found = [(entry.layer, entry.specialisation) for entry in result.layers if entry.specialisation]
    layers, values = [layer for layer, _ in found], [one for _, one in found]
    with _figure(2.6, grid=True) as figure:
        axes = figure.add_subplot()
        axes.plot(layers, [one.mutual_information for one in values], color=COLOUR, linewidth=1.4, label="measured")
        if other:
            name, before = other
            lines = [(entry.layer, entry.specialisation.mutual_information) for entry in before.layers if entry.specialisation]
            axes.plot(*zip(*lines, strict=True), color=SECOND, linewidth=1.2, label=name)
        axes.fill_between(
            layers, 0, [one.null_95 for one in values], color=MUTED, alpha=0.22, linewidth=0, label="95 % of shuffled domains"
        )
        axes.plot(layers, [one.null_mean for one in values], color=MUTED, linewidth=1, linestyle="--", label="mean of shuffled domains")
        for sure, face, label in ((True, COLOUR, "more than chance (p < 0.05, Holm)"), (False, "none", "not distinguishable from chance")):
            points = [(layer, one.mutual_information) for layer, one in found if (one.p_adjusted < 0.05) is sure]
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=COLOUR, markerfacecolor=face, markersize=5, label=label)
        axes.set_xlabel("layer")
        axes.set_ylabel("mutual information of\nexpert and domain, nats")
        axes.set_ylim(bottom=0)
        _whole_layers(axes)
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.4)
        return figure


def plot_agreement(agreement: Agreement) -> Figure:
    """Two checkpoints by layer: share of tokens with the same K experts, and the same first choice; dashed is chance."""
    layers = [entry.layer for entry in agreement.layers]
    matched = any(entry.matching != tuple(range(len(entry.matching))) for entry in agreement.layers)
    with _figure(2.9, grid=True) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, title in ((panels[0], "same_set", "same experts"), (panels[1], "first", "same first choice")):
            lines = [("plain", "chance", COLOUR, "expert for expert"), ("matched", "matched_chance", SECOND, "after the best matching")]
            for part, chance, colour, label in lines if matched else lines[:1]:
                axes.plot(
                    layers,
                    [100 * getattr(getattr(e, part), key) for e in agreement.layers],
                    "o-",
                    color=colour,
                    markersize=3.5,
                    label=label,
                )
                by_chance = [100 * getattr(getattr(e, chance), key) for e in agreement.layers]
                axes.plot(layers, by_chance, "--", color=colour, linewidth=1, label=f"{label}, tokens shuffled")
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("layer")
            axes.set_ylim(0, 102)
            _whole_layers(axes)
        panels[0].set_ylabel("tokens, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        return figure


@contextmanager
def _figure(height: float, grid: bool = False) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "axes.grid": grid}):
        yield Figure(figsize=(WIDTH, height))


def _heat_map(axes: Any, table: Sequence[Sequence[float]], low: float, high: float, scale: float = 1, colours: str = "viridis") -> Any:
    """Cells as rectangles, sharp at any size, or where they are many as one image; the first row on top."""
    values, rows, columns = [[scale * value for value in row] for row in table], len(table), len(table[0])
    if rows * columns <= MOST_RECTANGLES:
        mesh = axes.pcolormesh(values, cmap=colours, vmin=low, vmax=high, edgecolors="face", linewidth=0.2)
    else:
        place = (0, columns, rows, 0)
        mesh = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none", extent=place)
    axes.set_ylim(rows, 0)
    axes.set_xlim(0, columns)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _write_cells(axes: Any, table: Sequence[Sequence[float]], high: float, scale: float, form: str) -> None:
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            colour = ON_LIGHT if scale * value > 0.6 * high else ON_DARK
            axes.text(x + 0.5, y + 0.52, format(scale * value, form), ha="center", va="center", fontsize=7.5, color=colour)


def _write_lift(axes: Any, entry: LayerRouting) -> None:
    for y, row in enumerate(entry.lift):
        for x, value in enumerate(row):
            if value is not None:
                colour = ON_DARK if value > 2.6 or value < 0.38 else ON_LIGHT
                axes.text(x + 0.5, y + 0.52, f"{value:.1f}", ha="center", va="center", fontsize=5.5, color=colour)


def _name_columns(axes: Any, names: Sequence[str]) -> None:
    turned = len(names) > 4 or max(map(len, names)) > 10
    axes.set_xticks([x + 0.5 for x in range(len(names))], names, rotation=30 if turned else 0, ha="right" if turned else "center")


def _number_columns(axes: Any, numbers: Sequence[int]) -> None:
    places = range(0, len(numbers), -(-len(numbers) // 32))
    axes.set_xticks([x + 0.5 for x in places], [str(numbers[x]) for x in places], fontsize=7.5)


def _number_rows(axes: Any, numbers: Sequence[int]) -> None:
    places = range(0, len(numbers), -(-len(numbers) // 16))
    axes.set_yticks([y + 0.5 for y in places], [str(numbers[y]) for y in places], fontsize=7.5)


def _whole_layers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def _colour_bar(figure: Figure, mesh: Any, axes: Sequence[Any], label: str) -> Any:
    bar = figure.colorbar(mesh, ax=list(axes), label=label, pad=0.02, aspect=18, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK)
    return bar
