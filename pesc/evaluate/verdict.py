"""What a difference allows to say, and how often that is wrong: 5 % of the time at most when there is no difference.

- An arm against one published figure: both are shares with sampling errors, taken as independent (`difference_of`). Several figures of
  one system are Holm-adjusted together.
- An arm against a published system: the mean difference over its comparable figures, each published row once. Yes (no) when its 95 %
  interval lies above (below) 0, else it cannot be told. So one bad benchmark can be made up for by good ones, and the counts stand beside.
- Two arms' held-out losses, as a recipe chose beforehand: `by_loss`.
- An arm against the control: by the Holm-adjusted p-value of each benchmark, and by the interval of the mean over them.

Each arm against each system (or control) is a question of its own; there is no correction over those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pesc.evaluate.intervals import Estimate, difference_of, holm, mean_of, p_of_zero, share_estimate

Verdict = Literal["yes", "no", "cannot tell"]
Direction = Literal["better", "worse", "cannot tell"]
LossVerdict = Literal["better", "worse", "no difference", "cannot tell"]
ALPHA = 0.05


def against_figure(measured: Estimate, figure: float, figure_items: int) -> Estimate:
    """Difference of a measured share to a published one over `figure_items` items, as fractions."""
    return difference_of(measured, share_estimate(min(1.0, max(0.0, figure)), figure_items))


def adjusted(differences: Sequence[Estimate]) -> list[tuple[float, float, Verdict]]:
    """p-value, Holm-adjusted p-value and verdict of each figure of one system."""
    raw = [p_of_zero(difference) for difference in differences]
    return [(p, q, outperforms(d.value, q)) for d, p, q in zip(differences, raw, holm(raw), strict=True)]


def outperforms(difference: float, p_value: float) -> Verdict:
    """Yes or no where the p-value is below 5 %."""
    if p_value >= ALPHA or difference == 0:
        return "cannot tell"
    return "yes" if difference > 0 else "no"


def overall(differences: Sequence[Estimate]) -> tuple[Estimate | None, Verdict]:
    """Mean difference over the comparable figures of one system, and what it says; None where there is none."""
    if not differences:
        return None, "cannot tell"
    mean = mean_of(differences)
    return mean, by_interval(*mean.interval)


def by_interval(low: float, high: float) -> Verdict:
    """Yes when the whole interval lies above 0, no when below."""
    return "yes" if low > 0 else "no" if high < 0 else "cannot tell"


def by_loss(low: float, high: float, smallest: float) -> LossVerdict:
    """What the 95 % interval of a difference in loss (arm minus control: below 0 is better) says.

    Inside (-smallest, smallest) there is no difference that counts, even where 0 is left out. Else better when all of it lies below 0,
    worse when above, and it cannot be told when it holds 0.
    """
    if -smallest < low and high < smallest:
        return "no difference"
    return "better" if high < 0 else "worse" if low > 0 else "cannot tell"


def direction(verdict: Verdict) -> Direction:
    """The same said of two arms: better, worse, cannot tell."""
    words: dict[Verdict, Direction] = {"yes": "better", "no": "worse", "cannot tell": "cannot tell"}
    return words[verdict]
