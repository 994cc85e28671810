"""How sure a measured number is: intervals and tests, exact where that is cheap.

wilson_interval     Wilson (1927) score interval of a proportion; unlike p ± 1.96 s it stays within [0, 1] and is not empty at 0 of n
mcnemar_exact       two-sided exact McNemar test on paired right/wrong answers (binomial on the discordant pairs)
paired_bootstrap    percentile interval of a mean paired difference, seeded
holm                Holm (1979) step-down adjustment of several p-values
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 10_000


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion.  Raises ValueError unless 0 <= successes <= total and total > 0."""
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} of {total} is not a proportion")
    share, z2 = successes / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return low, high


def normal_interval(value: float, stderr: float) -> tuple[float, float]:
    """95 % interval from a standard error."""
    return value - Z_95 * stderr, value + Z_95 * stderr


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Probability, if both were equally good, of discordant pairs at least this uneven.  1 when there are none."""
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def resampled_means(differences: Sequence[float], seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of `resamples` bootstrap samples of paired differences, [resamples].

    Items with equal differences are exchangeable, so the counts of the distinct values are drawn instead of the items: the same
    distribution, in memory that does not grow with the number of items.
    """
    counts = Counter(differences)
    values = np.array(sorted(counts))
    shares = np.array([counts[value] for value in values.tolist()]) / len(differences)
    drawn = np.random.default_rng(seed).multinomial(len(differences), shares, size=resamples)
    return drawn @ values / len(differences)


def percentile_interval(means: np.ndarray) -> tuple[float, float]:
    """Central 95 % of resampled means."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(differences: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % interval of the mean difference."""
    return percentile_interval(resampled_means(differences, seed))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
