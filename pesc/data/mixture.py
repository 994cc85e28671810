"""The `mix` stage: quotas by domain, then by data set, then by stratum, drawn with a seed.

Which rows are drawn depends on (seed, row id) alone, so neither file order nor a new data set elsewhere changes the choice, and a
larger quota holds every row of a smaller one.  A domain that has too few rows gives its places to the others, stays short, or
fails, as `shortfall` says; nothing is ever padded with copies.  Within a domain, places of a data set that has too few rows always
go to its siblings.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pesc.data.config import MixConfig
from pesc.errors import DataError
from pesc.stage import BuildResult, StageContext

log = logging.getLogger(__name__)
Rows = dict[str, dict[str, dict[str, list[str]]]]
"""domain -> data set -> stratum -> ids."""


def build(ctx: StageContext) -> BuildResult:
    """Fill `ctx.out` with mixture.parquet and stats.json.

    Raises DataError: a domain without rows, weights for some data sets of a domain only, or a shortfall when that is not allowed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    config: MixConfig = ctx.config
    table = pq.read_table(ctx.inputs["rows"] / "rows.parquet")
    ids = table.column("id").to_pylist()
    if len(set(ids)) != len(ids):
        raise DataError("The rows to mix hold one id twice. Run the dedup stage again.")
    columns = (table.column(name).to_pylist() for name in ("domain", "dataset", "stratum"))
    rows: Rows = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row_id, domain, dataset, stratum in zip(ids, *columns, strict=True):
        rows[domain][dataset][stratum].append(row_id)
    drawn, stats = draw_mixture(rows, config)
    position = {row_id: place for place, row_id in enumerate(ids)}
    order = sorted(drawn, key=lambda row_id: _draw_key(config.seed, "order", row_id))
    mixture = table.take(pa.array([position[row_id] for row_id in order], type=pa.int64())).combine_chunks()
    pq.write_table(mixture, ctx.out / "mixture.parquet", compression="zstd")
    (ctx.out / "stats.json").write_text(json.dumps(stats, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    ctx.progress(len(drawn), config.total, "rows", "mixture drawn")
    return BuildResult(metrics={"drawn": len(drawn), "wanted": config.total, "shortfall": config.total - len(drawn)})


def draw_mixture(rows: Rows, config: MixConfig) -> tuple[list[str], dict[str, Any]]:
    """(ids, statistics).  Raises DataError as `build` does."""
    available = {domain: _count(rows.get(domain, {})) for domain in config.weights}
    wanted = allocate(config.total, config.weights)
    for domain, count in available.items():
        if not count:
            raise DataError(f"The domain {domain!r} of mix.weights has no rows left after dedup. See the ledger, or drop the domain.")
    short = {domain: wanted[domain] - available[domain] for domain in wanted if wanted[domain] > available[domain]}
    _report_shortfall(short, wanted, available, config)
    places = {domain: min(wanted[domain], available[domain]) for domain in wanted}
    if config.shortfall == "redistribute":
        places = allocate(config.total, config.weights, available)
    drawn: list[str] = []
    domains: dict[str, Any] = {}
    for domain in sorted(places):
        ids, datasets = _draw_domain(domain, rows[domain], places[domain], config)
        drawn += ids
        numbers = {
            "wanted": wanted[domain],
            "available": available[domain],
            "drawn": len(ids),
            "shortfall": max(0, wanted[domain] - len(ids)),
        }
        domains[domain] = {**numbers, "datasets": datasets}
    unused = {domain: _count(rows[domain]) for domain in sorted(set(rows) - set(config.weights))}
    total = {"wanted": config.total, "drawn": len(drawn), "shortfall": config.total - len(drawn)}
    return drawn, {"total": total, "policy": config.shortfall, "domains": domains, "domains_without_weight": unused}


def _report_shortfall(short: Mapping[str, int], wanted: Mapping[str, int], available: Mapping[str, int], config: MixConfig) -> None:
    for domain, missing in short.items():
        text = f"The domain {domain!r} has {available[domain]} rows, {missing} fewer than its quota of {wanted[domain]}"
        if config.shortfall == "fail":
            raise DataError(f"{text}. Lower mix.total, change mix.weights, or set mix.shortfall to redistribute or keep.")
        log.warning("%s; policy: %s", text, config.shortfall)


def _draw_domain(
    domain: str, datasets: Mapping[str, Mapping[str, list[str]]], places: int, config: MixConfig
) -> tuple[list[str], dict[str, Any]]:
    available = {name: sum(map(len, strata.values())) for name, strata in datasets.items()}
    weights = _dataset_weights(domain, available, config)
    wanted = allocate(places, weights)
    given = allocate(places, weights, available)
    drawn: list[str] = []
    stats: dict[str, Any] = {}
    for name in sorted(given):
        sizes = {stratum: len(ids) for stratum, ids in datasets[name].items()}
        shares = allocate(given[name], sizes, sizes)
        for stratum in sorted(shares):
            ordered = sorted(datasets[name][stratum], key=lambda row_id: _draw_key(config.seed, "draw", row_id))
            drawn += ordered[: shares[stratum]]
        stats[name] = {
            "wanted": wanted[name],
            "available": available[name],
            "drawn": given[name],
            "shortfall": max(0, wanted[name] - given[name]),
        }
        if len(sizes) > 1:
            stats[name]["strata"] = {key: {"available": sizes[key], "drawn": shares[key]} for key in sorted(sizes)}
    return drawn, stats


def _dataset_weights(domain: str, available: Mapping[str, int], config: MixConfig) -> dict[str, float]:
    """The recipe's weights for the data sets of a domain, or their sizes."""
    given = {name: config.dataset_weights[name] for name in available if name in config.dataset_weights}
    if not given:
        return {name: float(count) for name, count in available.items()}
    if missing := sorted(set(available) - set(given)):
        raise DataError(
            f"mix.dataset_weights has {', '.join(sorted(given))} but not {missing[0]}, which is in the same domain {domain!r}: "
            "give all of them or none."
        )
    return given


def allocate(total: int, weights: Mapping[str, float], available: Mapping[str, int] | None = None) -> dict[str, int]:
    """Split `total` places by weight with largest remainders; nobody gets more than is available.

    Exact arithmetic; equal remainders go by name.  Places that one cannot fill go to the others by their weights, until all are
    full: the sum is min(total, everything available).
    """
    result = dict.fromkeys(weights, 0)
    open_names = [name for name in sorted(weights) if weights[name] > 0 and (available is None or available[name] > 0)]
    left = total
    while left and open_names:
        whole = sum(Fraction(weights[name]) for name in open_names)
        ideal = {name: left * Fraction(weights[name]) / whole for name in open_names}
        full = [name for name in open_names if available is not None and ideal[name] >= available[name]]
        if not full:
            break
        for name in full:
            result[name] = (available or {})[name]
            left -= result[name]
            open_names.remove(name)
    if not open_names or not left:
        return result
    floors = {name: int(ideal[name]) for name in open_names}
    by_remainder = sorted(open_names, key=lambda name: (floors[name] - ideal[name], name))
    extra = left - sum(floors.values())
    return result | floors | {name: floors[name] + 1 for name in by_remainder[:extra]}


def _count(datasets: Mapping[str, Mapping[str, list[str]]]) -> int:
    return sum(len(ids) for strata in datasets.values() for ids in strata.values())


def _draw_key(seed: int, purpose: str, row_id: str) -> tuple[bytes, str]:
    """A pseudo-random sort key of one row."""
    return hashlib.blake2b(f"{seed}\0{purpose}\0{row_id}".encode(), digest_size=8).digest(), row_id
