"""How every page and figure looks; figures as SVG text: the same bytes for the same numbers, no date, no random ids.

Colours of text, axes and grid are marks that `inline` turns into CSS variables, so that a figure inside a page follows light and dark
mode (templates/page_style.css.j2); one written to a file keeps readable fixed ones.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1f24", "#5b6470", "#d9dde3"
STYLE: Any = {
    "svg.hashsalt": "pesc", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
"""matplotlib settings, for `matplotlib.rc_context`."""
WIDTH = 7.6
"""Inches."""
KEPT_COLOUR = "#009e73"
REASON_COLOURS = ("#8c6bb1", "#cc79a7", "#b8860b", "#e69f00", "#56b4e9", "#7f8790", "#994f00", "#d55e00", "#f0a07a", "#a50026", "#444c56")


def page_environment(package: str) -> Environment:
    """Jinja2 for the pages of a package: its own templates, and the style that all pages share."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package, "templates"), PackageLoader("pesc", "templates")])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def plot_funnel(funnel: Sequence[tuple[str, int, int, Mapping[str, int]]], reasons: Sequence[str]) -> str:
    """What became of each data set's rows, as shares.  funnel: (data set, rows read, rows kept, reason -> rows); reasons: their order."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = dict(zip(reasons, REASON_COLOURS * (1 + len(reasons) // len(REASON_COLOURS)), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.1 + 0.34 * len(funnel) + 0.17 * ((len(reasons) + 3) // 3)))
        axes = figure.add_subplot()
        left = [0.0] * len(funnel)
        for part in ["kept", *reasons]:
            rows = [kept if part == "kept" else removed.get(part, 0) for _, _, kept, removed in funnel]
            shares = [100 * number / max(1, read) for number, (_, read, *_) in zip(rows, funnel, strict=True)]
            colour = KEPT_COLOUR if part == "kept" else colours[part]
            axes.barh(range(len(funnel)), shares, left=left, height=0.62, color=colour, label=f"{part} ({sum(rows):,})")
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axes.set_yticks(range(len(funnel)), [f"{name}  ({read:,})" for name, read, *_ in funnel])
        axes.set_ylim(len(funnel) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the rows read in %, rows in brackets")
        axes.grid(axis="y", visible=False)
        legend_above(figure, *axes.get_legend_handles_labels(), most=3, columnspacing=1.2, handlelength=1)
        return svg_text(figure)


def legend_above(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], *, most: int = 6, columnspacing: float = 2.0, handlelength: float = 2.0
) -> None:
    """A legend above the panels, in as many columns as the figure is wide enough for.  Spacings are matplotlib's, in font sizes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    size = float(STYLE["font.size"])
    font = FontProperties(family=STYLE["font.family"], size=size)
    widths = [TextPath((0, 0), label, prop=font).get_extents().width for label in labels]
    beside = (handlelength + 0.8 + columnspacing) * size  # matplotlib's handletextpad is 0.8
    space = 72 * figure.get_figwidth() - 2 * size
    columns = next((n for n in range(min(most, len(labels)), 1, -1) if sum(map(max, _in_columns(widths, n))) + n * beside <= space), 1)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=columnspacing, handlelength=handlelength)


def _in_columns(items: Sequence[float], columns: int) -> list[Sequence[float]]:
    """Items as a legend places them: column by column, the first ones a row longer where they do not come out even."""
    rows, longer = divmod(len(items), columns)
    starts = [column * rows + min(column, longer) for column in range(columns + 1)]
    return [items[start:end] for start, end in itertools.pairwise(starts)]


class Drawing(str):
    """A figure as an SVG document, which can also say itself as a PNG."""

    figure: Figure

    def png(self, dpi: int = 120) -> bytes:
        """The figure on white, the same bytes for the same numbers."""
        buffer = io.BytesIO()
        self.figure.set_layout_engine("none")  # laid out when the SVG was made
        self.figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}, pil_kwargs={"compress_level": 3})
        return buffer.getvalue()


def svg_text(figure: Figure) -> Drawing:
    """The figure as an SVG document."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):  # ids and glyphs are made here
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = Drawing(re.sub(r"[ \t]+\n", "\n", buffer.getvalue()))
    drawing.figure = figure
    return drawing


def inline(svg: str, prefix: str, label: str) -> str:
    """The SVG for use inside HTML: ids made unique by `prefix`, colours from CSS variables, a label for screen readers."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    for colour, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--line")):
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return body.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def png_bytes(figure: Figure, dots_per_inch: int = 160) -> bytes:
    """The figure as a PNG on white paper, without the date and the version of whoever drew it."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
