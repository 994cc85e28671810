"""What every figure has in common."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.figure import Figure

from pesc.evaluate.plots import arm_colours
from pesc.figures import STYLE, WIDTH, legend_above, svg_text

ARMS = ["pesc", "pesc-bias", "pesc-ffn-input", "pesc-no-balance", "pesc-r256", "qlora", "qlora-matched", "upcycle-full", "base"]


@pytest.mark.parametrize(
    ("names", "handlelength", "wanted"),
    [
        (ARMS, 2.0, 5),
        (ARMS, 1.0, 6),
        (ARMS[:3], 2.0, 3),
        ([*ARMS, "GPT-3.5 (dotted: other settings)"], 2.0, 4),
        (["long " * 14] * 2, 2.0, 1),
    ],
)
def test_a_legend_stays_inside_its_figure_and_uses_its_width(names, handlelength, wanted):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3))
        axes = figure.add_subplot()
        for name in names:
            axes.plot([0, 1], label=name)
        legend_above(figure, *axes.get_legend_handles_labels(), handlelength=handlelength)
        svg_text(figure)
        (legend,) = figure.legends
        assert legend.get_window_extent().x1 <= figure.bbox.x1
        assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == wanted


def test_nine_arms_have_nine_colours():
    kinds = {arm: "dense" if arm == "base" else "qlora" if arm.startswith("qlora") else "pesc" for arm in ARMS}
    assert len(set(arm_colours(kinds).values())) == len(ARMS)
