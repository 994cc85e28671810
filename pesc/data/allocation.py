"""How many places each part of a mixture gets: largest remainders with limits, and weights by temperature.

Exact arithmetic, so that the same counts give the same places on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, localcontext
from fractions import Fraction

Weight = int | float | Fraction
_DIGITS = 28


def allocate(total: int, weights: Mapping[str, Weight], available: Mapping[str, int] | None = None) -> dict[str, int]:
    """Split `total` places by weight with largest remainders; nobody gets more than is available.

    Equal remainders go by name.  Places that one cannot fill go to the others by their weights, until all are full: the sum is
    min(total, everything available).
    """
    result = dict.fromkeys(weights, 0)
    exact = {name: Fraction(weight) for name, weight in weights.items()}
    open_names = [name for name in sorted(weights) if exact[name] > 0 and (available is None or available[name] > 0)]
    ideal: dict[str, Fraction] = {}
    left = total
    while left and open_names:
        whole = sum(exact[name] for name in open_names)
        ideal = {name: left * exact[name] / whole for name in open_names}
        full = {name for name in open_names if available is not None and ideal[name] >= available[name]}
        if not full:
            break
        for name in full:
            result[name] = (available or {})[name]
            left -= result[name]
        open_names = [name for name in open_names if name not in full]
    if not open_names or not left:
        return result
    floors = {name: int(ideal[name]) for name in open_names}
    by_remainder = sorted(open_names, key=lambda name: (floors[name] - ideal[name], name))
    extra = left - sum(floors.values())
    return result | floors | {name: floors[name] + 1 for name in by_remainder[:extra]}


def temperature_weights(sizes: Mapping[str, int], temperature: float) -> dict[str, Fraction]:
    """p_i ~ n_i^(1/T) (mT5, Xue 2021, section 3.1, with T = 1/α): T = 1 keeps the proportions, a large T makes the parts equal.

    Computed with decimals of fixed precision, since the last bit of a floating-point power differs between machines.
    """
    with localcontext() as context:
        context.prec = _DIGITS
        exponent = 1 / Decimal(repr(float(temperature)))
        return {name: Fraction(Decimal(size) ** exponent) if size else Fraction(0) for name, size in sizes.items()}
