"""What the counts say: load, entropy, dead experts, co-activation, specialisation by domain.

D domains, R rows, E experts, K choices of a token, P permutations.

    load            n_e / Σ n                       entropy over ln E; dead: below 1/(100 E)
    lift            pairs_ef / expected_ef          expected: quasi-independence (Goodman 1968), a_e·a_f off the diagonal with the same row sums.
                                                    The plain product of the loads is no yardstick: a token never chooses an expert twice
    specialisation  I(domain; expert) = Σ p_de ln(p_de / (p_d p_e)) over the table of choices
    bias            Miller-Madow (1955): (cells - rows - columns + 1) / (2 N), counting those that are not empty
    p               domains of whole rows permuted; the same permutations for all layers, so that their mean is tested too
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from pesc.evaluate.intervals import holm
from pesc.routing.config import RoutingConfig
from pesc.routing.counts import LayerChoices, Observation, count_pairs
from pesc.routing.results import DomainRows, LayerRouting, RoutingResult, Specialisation

DEAD_SHARE = 0.01
"""An expert with less than this share of an even load is dead."""
_FIT_STEPS = 500
_CHUNK = 64
"""Permutations in memory at once."""


def measure(seen: Observation, config: RoutingConfig) -> RoutingResult:
    """Every measure of one model."""
    choices = [seen.choices_KRE(layer) for layer in seen.layers]
    special, overall = specialisation(
        [counts_KRE.sum(axis=0) for counts_KRE in choices], seen.domain_of_R, config.permutations, config.seed
    )
    layers = [
        _measure_layer(seen, layer, counts_KRE, found) for layer, counts_KRE, found in zip(seen.layers, choices, special, strict=True)
    ]
    tokens_R = np.bincount(seen.row_of_T, minlength=len(seen.domain_of_R))
    domains = [
        DomainRows(name=name, rows=int((seen.domain_of_R == d).sum()), tokens=int(tokens_R[seen.domain_of_R == d].sum()))
        for d, name in enumerate(seen.domains)
    ]
    return RoutingResult(
        top_k=seen.top_k,
        tokens=config.tokens,
        domains=tuple(domains),
        layers=tuple(layers),
        permutations=config.permutations,
        overall=overall,
    )


def _measure_layer(seen: Observation, layer: LayerChoices, counts_KRE: np.ndarray, special: Specialisation | None) -> LayerRouting:
    by_domain_KDE = np.einsum("dr,kre->kde", seen.one_hot_DR, counts_KRE.astype(np.float64)).round().astype(np.int64)
    total_E, pairs_EE = counts_KRE.sum(axis=(0, 1)), count_pairs(layer)
    load_E = total_E / total_E.sum()
    return LayerRouting(
        layer=layer.layer,
        load=_digits(load_E),
        gate_weight=_digits(layer.weight_E / np.maximum(total_E, 1)),
        entropy=_digit(entropy(load_E)),
        token_entropy=_digit(layer.entropy / max(1, seen.num_tokens) / _most(layer.num_experts)),
        dead=tuple(np.flatnonzero(load_E < DEAD_SHARE / layer.num_experts).tolist()),
        choices={name: tuple(tuple(row) for row in by_domain_KDE[:, d].tolist()) for d, name in enumerate(seen.domains)},
        pairs=tuple(tuple(row) for row in pairs_EE.tolist()),
        lift=tuple(tuple(None if np.isnan(value) else _digit(value) for value in row) for row in lift(pairs_EE)),
        specialisation=special,
    )


def entropy(load_E: np.ndarray) -> float:
    """Of the load over ln E; 1 for a layer of one expert."""
    used = load_E[load_E > 0]
    return float(-(used * np.log(used)).sum()) / _most(len(load_E)) if len(load_E) > 1 else 1.0


def _most(num_experts: int) -> float:
    return float(np.log(num_experts)) if num_experts > 1 else 1.0


def lift(pairs_EE: np.ndarray) -> np.ndarray:
    """Pairs over those of experts as busy that are paired at random, [E, E]; NaN on the diagonal and where fewer than 1 is expected.

    pairs_EE: symmetric counts, the diagonal 0.
    """
    expected_EE = expected_pairs(pairs_EE)
    known = expected_EE >= 1
    return np.where(known, pairs_EE / np.where(known, expected_EE, 1), np.nan)


def expected_pairs(pairs_EE: np.ndarray) -> np.ndarray:
    """The table a_e·a_f with an empty diagonal and the row sums of `pairs_EE`, fitted by iteration."""
    sums_E = pairs_EE.sum(axis=1).astype(np.float64)
    total = sums_E.sum()
    factor_E = sums_E / np.sqrt(max(total, 1.0))
    for _ in range(_FIT_STEPS):
        others_E = factor_E.sum() - factor_E
        wanted_E = np.divide(sums_E, others_E, out=np.zeros_like(sums_E), where=others_E > 0)
        if np.allclose(wanted_E, factor_E, rtol=1e-12, atol=0):
            break
        factor_E = np.sqrt(factor_E * wanted_E)  # the geometric mean: the plain step swings
    table_EE = np.outer(factor_E, factor_E)
    np.fill_diagonal(table_EE, 0)
    return table_EE


def mutual_information(table_DE: np.ndarray) -> np.ndarray:
    """I(D; E) in nats of one or more tables of counts, [..., D, E] -> [...]."""
    table = np.asarray(table_DE, dtype=np.float64)
    total = table.sum(axis=(-2, -1))

    def plogp(counts: np.ndarray) -> np.ndarray:
        return counts * np.log(np.where(counts > 0, counts, 1.0))

    inner = plogp(table).sum(axis=(-2, -1)) + plogp(total)
    outer = plogp(table.sum(axis=-1)).sum(axis=-1) + plogp(table.sum(axis=-2)).sum(axis=-1)
    return np.maximum(0.0, (inner - outer) / np.maximum(total, 1.0))


def miller_madow(table_DE: np.ndarray) -> float:
    """I(D; E) less the bias of its three entropies; may be below 0."""
    table = np.asarray(table_DE)
    used = int((table > 0).sum()) - int(table.any(axis=1).sum()) - int(table.any(axis=0).sum()) + 1
    return float(mutual_information(table)) - used / (2 * max(1, int(table.sum())))


def specialisation(
    counts: Sequence[np.ndarray], domain_of_R: np.ndarray, permutations: int, seed: int
) -> tuple[list[Specialisation | None], Specialisation | None]:
    """Of each layer, and of the mean over the layers.  counts: for each layer the choices of each row, [R, E].  None for fewer than two domains."""
    domains = int(domain_of_R.max()) + 1 if len(domain_of_R) else 0
    if domains < 2:
        return [None] * len(counts), None
    widths = np.cumsum([0, *(table.shape[1] for table in counts)])
    counts_RX = np.concatenate(counts, axis=1).astype(np.float64)

    def information(labels_NR: np.ndarray) -> np.ndarray:
        """[N, L] of N labellings of the rows."""
        one_hot_NDR = (np.arange(domains)[None, :, None] == labels_NR[:, None, :]).astype(np.float64)
        tables_NDX = one_hot_NDR @ counts_RX
        return np.stack([mutual_information(tables_NDX[..., a:b]) for a, b in pairwise(widths)], axis=1)

    found_L = information(domain_of_R[None])[0]
    null_PL = _permuted(information, domain_of_R, permutations, seed)
    values_L = [int((null_PL[:, index] >= found_L[index] - 1e-12).sum()) for index in range(len(counts))]
    p_values = [(1 + more) / (1 + permutations) for more in values_L]
    one_hot_DR = (np.arange(domains)[:, None] == domain_of_R[None]).astype(np.float64)
    corrected = [miller_madow(one_hot_DR @ table) for table in counts]
    layers = [
        _specialisation(found_L[index], corrected[index], null_PL[:, index], p_values[index], adjusted)
        for index, adjusted in enumerate(holm(p_values))
    ]
    found, null_P = found_L.mean(), null_PL.mean(axis=1)
    p = (1 + int((null_P >= found - 1e-12).sum())) / (1 + permutations)
    return [*layers], _specialisation(found, float(np.mean(corrected)), null_P, p, p)


def _permuted(information: Callable[[np.ndarray], np.ndarray], domain_of_R: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """[P, L] of shuffled domains."""
    draw = np.random.default_rng(seed)
    chunks = [min(_CHUNK, permutations - start) for start in range(0, permutations, _CHUNK)]
    return np.concatenate([information(draw.permuted(np.tile(domain_of_R, (size, 1)), axis=1)) for size in chunks])


def _specialisation(found: float, corrected: float, null_P: np.ndarray, p: float, adjusted: float) -> Specialisation:
    return Specialisation(
        mutual_information=_digit(found), miller_madow=_digit(corrected), null_mean=_digit(null_P.mean()),
        null_95=_digit(np.quantile(null_P, 0.95)), p=_digit(p), p_adjusted=_digit(adjusted),
    )  # fmt: skip


def _digits(values: np.ndarray) -> tuple[float, ...]:
    return tuple(map(_digit, values.tolist()))


def _digit(value: float) -> float:
    """Six digits: sums in another order, on another machine, give the same."""
    return float(f"{float(value):.6g}")
