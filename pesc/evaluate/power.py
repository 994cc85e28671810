"""How small a difference a set of questions can show: 95 % confidence, found four times in five.

Formulas are the usual normal ones: McNemar's test after Connor (1987, Biometrics 43, 207), two proportions, a mean from its standard
error. They are for one question by itself; after a correction for many benchmarks a difference must be larger still, so "cannot
resolve less than" holds then as well. Shares and differences are fractions here, not points.
"""

from __future__ import annotations

import math

from pesc.evaluate.intervals import Z_95

POWER = 0.8
Z_POWER = 0.8416212335729143
"""Standard normal quantile of POWER."""
Z_SUM = Z_95 + Z_POWER


def smallest_paired(num_items: int, discordant_share: float) -> float:
    """Smallest difference of two arms that `num_items` common items show, when they differ on `discordant_share` of them.

    Never below the difference that such a set could show if the arms differed in one direction only.
    """
    return max(Z_SUM * math.sqrt(discordant_share / num_items), Z_SUM**2 / num_items)


def smallest_of_stderr(stderr: float) -> float:
    """Smallest difference that an estimate with this standard error shows."""
    return Z_SUM * stderr


def smallest_against_figure(share: float, num_items: int, figure_items: int) -> float:
    """Smallest difference to a published share, itself measured on `figure_items` items."""
    return Z_SUM * math.sqrt(share * (1 - share) * (1 / num_items + 1 / figure_items))


def paired_power(num_items: int, discordant_share: float, difference: float) -> float:
    """Chance that McNemar's test at 5 % finds `difference` between two arms, in its own direction.

    A difference larger than the share of discordant items cannot be, so the share is taken to be at least that.
    """
    share, size = max(discordant_share, abs(difference)), abs(difference)
    spread = math.sqrt(max(share - size**2, 1e-12))
    return _normal_cdf((size * math.sqrt(num_items) - Z_95 * math.sqrt(share)) / spread)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
