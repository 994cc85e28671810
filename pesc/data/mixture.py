"""The `mix` stage: quotas by domain, then by data set, then by stratum, drawn with a seed.

    held out   the first `held_out` rows of each domain by (seed, "held_out", id); at most `held_out_share` of it; they never
               enter the mixture
    places     by weights or by temperature, in rows or in tokens; a domain that has too few gives its places to the others, stays
               short, or fails, as `shortfall` says; within a domain, places that a data set cannot fill always go to its siblings
    draw       the first rows of each stratum by (seed, "draw", id), until its places are filled

Which rows are drawn depends on (seed, row id) alone, so neither file order nor a data set elsewhere changes the choice.  Within a
stratum a larger share holds every row of a smaller one.  Nothing is padded with copies.  In tokens, each stratum stops before the
first row that would go over its share: it is short by less than one row.

Only the light columns are read to decide; the rows themselves are streamed into mixture.parquet and heldout.parquet.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)
from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from pesc.data.allocation import Weight, allocate, temperature_weights
from pesc.data.config import MixConfig
from pesc.data.reorder import write_reordered
from pesc.errors import DataError
from pesc.stage import BuildResult, StageContext

log = logging.getLogger(__name__)
RARE = "(rare strata)"
"""Name of the stratum that strata below `min_stratum_rows` make up together."""
_KEY_ROWS = 65_536


@dataclass(frozen=True)
class Draw:
    """What was chosen: row numbers of the table that was drawn from, in the order they are written in, and the statistics."""

    mixture: np.ndarray
    held_out: np.ndarray
    stats: dict[str, Any]


@dataclass(frozen=True)
class Stratum:
    """Rows of one stratum in draw order, and how many units (rows or tokens) each adds."""

    rows: np.ndarray
    units: np.ndarray

    @property
    def available(self) -> int:
        """Units of all rows."""
        return int(self.units.sum())

    def first(self, places: int) -> np.ndarray:
        """The longest prefix of rows within `places` units."""
        return self.rows[: int(np.searchsorted(np.cumsum(self.units), places, side="right"))]


@dataclass
class Pool:
    """What can be drawn: domain -> data set -> stratum, and the rows that each domain holds out."""

    domains: dict[str, dict[str, dict[str, Stratum]]] = field(default_factory=dict)
    held_out: dict[str, np.ndarray] = field(default_factory=dict)
    rare: dict[str, int] = field(default_factory=dict)
    """Data set -> number of strata that were joined."""


def build(ctx: StageContext) -> BuildResult:
    """Fill `ctx.out` with mixture.parquet, heldout.parquet and stats.json.

    Raises DataError: one id twice, a domain without rows, weights for some data sets of a domain only, a token budget without
    token counts, or a shortfall when that is not allowed.
    """
    import pyarrow.parquet as pq

    config: MixConfig = ctx.config
    path = ctx.inputs["rows"] / "rows.parquet"
    names = ["id", "dataset", "domain", "stratum"]
    if config.unit == "tokens":
        if "approximate_tokens" not in pq.read_schema(path).names:
            raise DataError("mix.unit is tokens, but rows.parquet has no column approximate_tokens. Run the dedup stage again.")
        names.append("approximate_tokens")
    draw = draw_mixture(pq.read_table(path, columns=names, read_dictionary=["dataset", "domain", "stratum"]), config)
    outputs = {ctx.out / "mixture.parquet": draw.mixture, ctx.out / "heldout.parquet": draw.held_out}
    write_reordered(path, outputs, ctx.work / "buckets", lambda done, total: ctx.progress(done, total, "rows", "writing the mixture"))
    text = json.dumps(draw.stats, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (ctx.out / "stats.json").write_text(text, encoding="utf-8")
    return BuildResult(metrics={**draw.stats["total"], "unit": config.unit})


def draw_mixture(table: Any, config: MixConfig) -> Draw:
    """Choose rows of an Arrow table: id, dataset, domain, stratum, and approximate_tokens where the unit is tokens.

    Raises DataError as `build` does.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    ids = table.column("id").combine_chunks()
    order = pc.sort_indices(ids).to_numpy()  # from here on ties of keys go by id, whatever the order of the rows
    ids = ids.take(pa.array(order))
    if len(ids) > 1 and pc.any(pc.equal(ids[1:], ids[:-1])).as_py():
        raise DataError("The rows to mix hold one id twice. Run the dedup stage again.")
    pool = _make_pool(table.take(pa.array(order)), ids, config)
    chosen, stats = _draw(pool, config)
    held_out = np.concatenate([np.zeros(0, dtype=np.int64), *(pool.held_out[name] for name in stats["domains"])])

    def written(rows: np.ndarray) -> np.ndarray:
        rows = np.sort(rows)
        return order[rows[np.argsort(_draw_keys(config.seed, "order", ids.take(pa.array(rows))), kind="stable")]].astype(np.int64)

    return Draw(written(chosen), written(held_out), stats)


def _draw_keys(seed: int, purpose: str, ids: Any) -> np.ndarray:
    """A pseudo-random sort key of each id, uint64."""
    head, keys = f"{seed}\0{purpose}\0".encode(), []
    for start in range(0, len(ids), _KEY_ROWS):
        digests = (hashlib.blake2b(head + row_id.encode(), digest_size=8).digest() for row_id in ids[start : start + _KEY_ROWS].to_pylist())
        keys.append(np.frombuffer(b"".join(digests), dtype=">u8"))
    return np.concatenate([np.zeros(0, dtype=np.uint64), *keys]).astype(np.uint64)


# --- what there is ---------------------------------------------------------------------------------------------------------------


def _make_pool(table: Any, ids: Any, config: MixConfig) -> Pool:
    """The rows (sorted by id) by domain, data set and stratum, without those held out."""
    domain, domains = _codes(table, "domain")
    dataset, datasets = _codes(table, "dataset")
    stratum, strata = _codes(table, "stratum")
    units = np.ones(len(ids), dtype=np.int64)
    if config.unit == "tokens":
        units = _token_counts(table.column("approximate_tokens"))
    free, pool = np.ones(len(ids), dtype=bool), Pool()
    held_out_keys = _draw_keys(config.seed, "held_out", ids) if config.held_out else None
    for code, rows in _groups(domain):
        count = min(config.held_out, int(len(rows) * Fraction(str(config.held_out_share))))
        held = rows[np.argsort(held_out_keys[rows], kind="stable")[:count]] if held_out_keys is not None else rows[:0]
        free[held] = False
        pool.domains[domains[code]], pool.held_out[domains[code]] = {}, held
    by_draw = np.argsort(_draw_keys(config.seed, "draw", ids), kind="stable")
    by_draw = by_draw[free[by_draw]]
    group = (domain[by_draw] * len(datasets) + dataset[by_draw]).astype(np.int64)
    for code, places in _groups(group):
        rows = by_draw[places]
        name = datasets[code % len(datasets)]
        found = {strata[label]: rows[own] for label, own in _groups(stratum[rows])}
        joined, rare = _join_rare(found, rows, config.min_stratum_rows)
        pool.rare[name] = pool.rare.get(name, 0) + rare
        pool.domains[domains[code // len(datasets)]][name] = {key: Stratum(own, units[own]) for key, own in joined.items()}
    return pool


def _codes(table: Any, name: str) -> tuple[np.ndarray, list[str]]:
    """A text column as (int64 codes, the texts)."""
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    if column.null_count:
        raise DataError(f"The rows to mix have an empty {name}. Run the dedup stage again.")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    return column.indices.to_numpy(zero_copy_only=False).astype(np.int64), column.dictionary.to_pylist()


def _token_counts(column: Any) -> np.ndarray:
    if column.null_count:
        raise DataError("The rows to mix have an empty approximate_tokens. Run the dedup stage again.")
    counts = column.to_numpy().astype(np.int64)
    if len(counts) and counts.min() < 0:
        raise DataError("The rows to mix have a negative approximate_tokens. Run the dedup stage again.")
    return counts


def _groups(codes: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each code with the places that have it, in their order."""
    order = np.argsort(codes, kind="stable")
    names, starts = np.unique(codes[order], return_index=True)
    return [(int(name), places) for name, places in zip(names, np.split(order, starts[1:]), strict=True)] if len(codes) else []


def _join_rare(strata: dict[str, np.ndarray], rows: np.ndarray, least: int) -> tuple[dict[str, np.ndarray], int]:
    """Strata of fewer than `least` rows as one, in draw order; (strata, number joined).

    Drawn apart, strata of a row or two would be filled by the alphabet: largest remainders that are equal go by name.
    """
    rare = {name for name, own in strata.items() if len(own) < least}
    if len(rare) < 2:
        return strata, 0
    among = np.isin(rows, np.concatenate([strata[name] for name in sorted(rare)]))
    return {**{name: own for name, own in strata.items() if name not in rare}, RARE: rows[among]}, len(rare)


# --- what is drawn ---------------------------------------------------------------------------------------------------------------


def _draw(pool: Pool, config: MixConfig) -> tuple[np.ndarray, dict[str, Any]]:
    """(Row numbers in no order, statistics)."""
    sizes = {domain: {name: _available(strata) for name, strata in sets.items()} for domain, sets in pool.domains.items()}
    available = {domain: sum(sizes.get(domain, {}).values()) for domain in config.weights or sizes}
    for domain, count in available.items():
        if not count:
            raise DataError(f"The domain {domain!r} of mix.weights has no rows left after dedup. See the ledger, or drop the domain.")
    gone = _weighted_without_rows(sizes, config)
    weights, inner = _all_weights(sizes, available, config)
    wanted = allocate(config.total, weights)
    _report_shortfall(wanted, available, config)
    places = {domain: min(wanted[domain], available[domain]) for domain in wanted}
    if config.shortfall == "redistribute":
        places = allocate(config.total, weights, available)
    drawn, domains = [np.zeros(0, dtype=np.int64)], {}
    for domain in sorted(places):
        parts, datasets = _draw_domain(pool, domain, places[domain], inner[domain], config)
        drawn += parts
        numbers = _numbers(wanted[domain], available[domain], sum(item["drawn"] for item in datasets.values()))
        domains[domain] = {**numbers, "held_out": len(pool.held_out[domain]), "datasets": datasets}
    count = sum(item["drawn"] for item in domains.values())
    rows = np.concatenate(drawn)
    total = {"wanted": config.total, "drawn": count, "shortfall": config.total - count}
    total |= {"rows": len(rows), "held_out": sum(item["held_out"] for item in domains.values())}
    unused = {domain: sum(sets.values()) for domain, sets in sorted(sizes.items()) if domain not in places}
    how = {"unit": config.unit, "mode": config.mode, "policy": config.shortfall}
    if config.mode == "temperature":
        how |= {"temperature": config.temperature, "temperature_over": config.temperature_over}
    return rows, {"total": total, **how, "domains": domains, "domains_without_weight": unused, "datasets_without_rows": gone}


def _available(strata: Mapping[str, Stratum]) -> int:
    return sum(stratum.available for stratum in strata.values())


def _numbers(wanted: int, available: int, drawn: int) -> dict[str, int]:
    return {"wanted": wanted, "available": available, "drawn": drawn, "shortfall": max(0, wanted - drawn)}


def _all_weights(
    sizes: Mapping[str, Mapping[str, int]], available: Mapping[str, int], config: MixConfig
) -> tuple[dict[str, Weight], dict[str, dict[str, Weight]]]:
    """Weights of the domains, and of the data sets within each."""
    if config.mode == "temperature" and config.temperature_over == "datasets":
        inner = {domain: temperature_weights(sizes[domain], config.temperature) for domain in available}
        return {domain: sum(weights.values(), Fraction(0)) for domain, weights in inner.items()}, {k: {**v} for k, v in inner.items()}
    within = {domain: _dataset_weights(domain, sizes[domain], config) for domain in available}
    if config.mode == "temperature":
        return {**temperature_weights(available, config.temperature)}, within
    return {**config.weights}, within


def _dataset_weights(domain: str, available: Mapping[str, int], config: MixConfig) -> dict[str, Weight]:
    """The recipe's weights for the data sets of a domain, or their sizes."""
    given: dict[str, Weight] = {name: config.dataset_weights[name] for name in available if name in config.dataset_weights}
    if not given:
        return {**available}
    if missing := sorted(set(available) - set(given)):
        raise DataError(
            f"mix.dataset_weights has {', '.join(sorted(given))} but not {missing[0]}, which is in the same domain {domain!r}: "
            "give all of them or none."
        )
    return given


def _weighted_without_rows(sizes: Mapping[str, Mapping[str, int]], config: MixConfig) -> list[str]:
    """Data sets of `dataset_weights` of which dedup has left nothing: their places go to their siblings, and that is said."""
    gone = sorted(set(config.dataset_weights) - {name for sets in sizes.values() for name in sets})
    if gone:
        text = f"mix.dataset_weights names {', '.join(gone)}, of which no row is left after dedup"
        if config.shortfall == "fail":
            raise DataError(f"{text}. See the ledger, drop it, or set mix.shortfall to redistribute or keep.")
        log.warning("%s; its places go to the other data sets of its domain", text)
    return gone


def _report_shortfall(wanted: Mapping[str, int], available: Mapping[str, int], config: MixConfig) -> None:
    for domain, count in wanted.items():
        if (missing := count - available[domain]) > 0:
            text = f"The domain {domain!r} has {available[domain]} {config.unit}, {missing} fewer than its quota of {count}"
            if config.shortfall == "fail":
                raise DataError(f"{text}. Lower mix.total, change mix.weights, or set mix.shortfall to redistribute or keep.")
            log.warning("%s; policy: %s", text, config.shortfall)


def _draw_domain(
    pool: Pool, domain: str, places: int, weights: Mapping[str, Weight], config: MixConfig
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Rows of one domain, and the statistics of its data sets."""
    datasets = pool.domains[domain]
    available = {name: _available(strata) for name, strata in datasets.items()}
    wanted, given = allocate(places, weights), allocate(places, weights, available)
    drawn: list[np.ndarray] = []
    stats: dict[str, Any] = {}
    for name in sorted(given):
        sizes = {key: stratum.available for key, stratum in datasets[name].items()}
        shares = allocate(given[name], sizes, sizes)
        taken = {key: datasets[name][key].first(shares[key]) for key in sorted(shares)}
        drawn += taken.values()
        got = {key: shares[key] if config.unit == "rows" else _units(datasets[name][key], len(rows)) for key, rows in taken.items()}
        stats[name] = _numbers(wanted[name], available[name], sum(got.values()))
        if config.unit == "tokens":
            stats[name]["rows"] = sum(map(len, taken.values()))
        if len(sizes) > 1:
            stats[name]["strata"] = {key: {"available": sizes[key], "drawn": got[key]} for key in sorted(sizes)}
        if pool.rare[name]:
            stats[name]["rare_strata"] = pool.rare[name]
    return drawn, stats


def _units(stratum: Stratum, rows: int) -> int:
    return int(stratum.units[:rows].sum())
