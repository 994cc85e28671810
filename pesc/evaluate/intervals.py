"""How sure a measured number is: intervals and tests, exact where that is cheap.

wilson_interval     Wilson (1927) score interval of a proportion; unlike p ± 1.96 s it stays within [0, 1] and is not empty at 0 of n
mcnemar_exact       two-sided exact McNemar test on paired right/wrong answers (binomial on the discordant pairs)
paired_share        Bonett and Price (2012) interval of the difference of two shares on the same items; not empty where no item differs
paired_mean         percentile interval of a mean paired difference by the bootstrap, seeded
holm                Holm (1979) step-down adjustment of several p-values
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided interval at any level: `bounds(z)` for z standard deviations, wider as z grows."""

    value: float
    bounds: Callable[[float], tuple[float, float]]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.bounds(Z_95)


def share_estimate(share: float, total: int) -> Estimate:
    """A proportion of `total` items, with Wilson's interval."""
    return Estimate(share, lambda z: _wilson(share, total, z))


def mean_estimate(value: float, stderr: float) -> Estimate:
    """A mean with a normal interval."""
    return Estimate(value, lambda z: (value - z * stderr, value + z * stderr))


def paired_share_estimate(only_first: int, only_second: int, total: int) -> Estimate:
    """The first share less the second on the same `total` items: the adjusted Wald interval of Bonett and Price (2012).

    Fagerland, Lydersen and Laake (2014) recommend it; one item of each discordant kind is added, so that a few equal answers do not
    look like certainty.
    """
    first, second = ((count + 1) / (total + 2) for count in (only_first, only_second))
    stderr = math.sqrt((first + second - (first - second) ** 2) / (total + 2))
    return Estimate(
        (only_first - only_second) / total, lambda z: (max(-1.0, first - second - z * stderr), min(1.0, first - second + z * stderr))
    )


def paired_mean_estimate(differences: Sequence[float], seed: int) -> Estimate:
    """The mean of paired differences, with the bootstrap's percentiles."""
    means = resampled_means(differences, seed)

    def bounds(z: float) -> tuple[float, float]:
        tail = 50 * math.erfc(z / math.sqrt(2))
        low, high = np.percentile(means, [tail, 100 - tail])
        return float(low), float(high)

    return Estimate(sum(differences) / len(differences), bounds)


def difference_of(first: Estimate, second: Estimate) -> Estimate:
    """The first minus the second of two independent estimates: Newcombe's hybrid interval (1998, method 10), which is Zou and Donner's MOVER.

    Where both come from the same items and go up and down together, it is too wide, never too narrow.
    """
    value = first.value - second.value

    def bounds(z: float) -> tuple[float, float]:
        (low, high), (other_low, other_high) = first.bounds(z), second.bounds(z)
        down = math.hypot(first.value - low, other_high - second.value)
        return value - down, value + math.hypot(high - first.value, second.value - other_low)

    return Estimate(value, bounds)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of independent estimates, by MOVER.  Raises ValueError without any."""
    if not estimates:
        raise ValueError("no estimate to take the mean of")
    count, value = len(estimates), sum(e.value for e in estimates) / len(estimates)

    def bounds(z: float) -> tuple[float, float]:
        pairs = [(e.value, *e.bounds(z)) for e in estimates]
        down = math.sqrt(sum((v - low) ** 2 for v, low, _ in pairs)) / count
        return value - down, value + math.sqrt(sum((high - v) ** 2 for v, _, high in pairs)) / count

    return Estimate(value, bounds)


def p_of_zero(estimate: Estimate) -> float:
    """Two-sided p-value of 0: 1 - level of the widest interval that leaves 0 out.  Agrees with the estimate's own intervals."""
    sign = 1 if estimate.value > 0 else -1
    near, far = 0.0, 40.0
    for _ in range(60):
        z = (near + far) / 2
        bound = estimate.bounds(z)[0] if sign > 0 else -estimate.bounds(z)[1]
        near, far = (z, far) if bound > 0 else (near, z)
    return math.erfc(near / math.sqrt(2))


def _wilson(share: float, total: int, z: float) -> tuple[float, float]:
    z2 = z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return low, high


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion.  Raises ValueError unless 0 <= successes <= total and total > 0."""
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} of {total} is not a proportion")
    return _wilson(successes / total, total, Z_95)


def normal_interval(value: float, stderr: float) -> tuple[float, float]:
    """95 % interval from a standard error."""
    return mean_estimate(value, stderr).interval


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


def bootstrap_p(means: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0 from resampled means: twice the smaller share on one side of 0, never below 2 / (resamples + 1)."""
    below, above = int(np.count_nonzero(means <= 0)), int(np.count_nonzero(means >= 0))
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(means)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
