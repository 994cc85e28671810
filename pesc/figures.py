"""How every figure looks, as SVG text: the same bytes for the same numbers, no date, no random ids.

Colours of text, axes and grid are marks that `inline` turns into CSS variables, so that a figure inside a page follows light and dark
mode (templates/page_style.css.j2); one written to a file keeps readable fixed ones.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def svg_text(figure: Figure) -> str:
    """The figure as an SVG document."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+\n", "\n", buffer.getvalue())


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
