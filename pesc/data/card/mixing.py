"""The later sections of a data card: the mixture, lengths and turns, packing, samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pesc.data.card.figures import plot_lengths, plot_turns
from pesc.data.card.measures import MixtureMeasures, measure_mixture, packed_lengths
from pesc.data.card.parts import Figure, Note, Section, Table, Texts, clip, count, one_line, share

_INDENT = "\u2003"
"""One step to the right in the first cell of a table; the page turns it into a margin."""
_STRATA = 24
_PERCENTILES = {50: "Median", 90: "90th percentile", 99: "99th percentile"}
_SHORTFALL = {
    "redistribute": "places that a domain cannot fill go to the others by their weights",
    "keep": "a domain that has too few stays short",
    "fail": "a domain that has too few stops the stage",
}
_TOKEN_FACTS = (
    ("rows_in", "rows of the mixture"),
    ("rows", "rows in the blocks"),
    ("held_out", "rows kept out for prompts"),
    ("truncated", "rows truncated to the context"),
    ("system_folded", "system prompts folded into the first user turn"),
    ("straddling_tokens", "tokens across the border of an answer, without loss"),
    ("tokens", "tokens"),
    ("supervised_tokens", "tokens with loss"),
    ("blocks", "blocks"),
    ("context_length", "tokens in a full block"),
)


def mixture_sections(mix: Path, stats: Mapping[str, Any], tokenize: Path | None) -> list[Section]:
    """Mixture, lengths and turns, samples."""
    measures = measure_mixture(mix)
    packed = packed_lengths(tokenize) if tokenize else None
    return [mixture_section(stats), lengths_section(measures, packed), samples_section(measures)]


def mixture_section(stats: Mapping[str, Any]) -> Section:
    """Wanted, available and drawn by domain, data set and stratum."""
    unit = stats.get("unit", "rows")
    rows = [row for name, domain in stats["domains"].items() for row in _domain_rows(name, domain, stats["total"]["drawn"])]
    total = stats["total"]
    rows.append(
        ["total", count(total["wanted"]), "", count(total["drawn"]), "100 %", count(total["shortfall"]), count(total.get("held_out"))]
    )
    header = ("", f"Wanted, {unit}", "Available", "Drawn", "Share", "Shortfall", "Held out, rows")
    temperature = f", temperature {stats['temperature']:g} over {stats['temperature_over']}" if "temperature" in stats else ""
    told = [
        f"Sized by {stats.get('mode', 'quota')}{temperature}; {_SHORTFALL.get(stats.get('policy', ''), '')}. Nothing is padded with copies."
    ]
    if total.get("held_out"):
        told.append("Held-out rows are in heldout.parquet and never in the mixture.")
    if unused := stats.get("domains_without_weight"):
        told.append(f"Not in the mixture: {', '.join(f'{name} ({n:,} {unit})' for name, n in unused.items())}.")
    return Section("mixture", "The mixture", (Table(header, rows), Note(" ".join(told))))


def _domain_rows(name: str, domain: Mapping[str, Any], whole: int) -> Iterator[list[str]]:
    def line(label: str, item: Mapping[str, Any]) -> list[str]:
        numbers = [count(item.get(key)) if key in item else "" for key in ("wanted", "available", "drawn")]
        missing, held = (count(item[key]) if key in item else "" for key in ("shortfall", "held_out"))
        return [label, *numbers, share(item["drawn"], whole), missing, held]

    yield line(name, domain)
    for dataset, item in domain["datasets"].items():
        yield line(_INDENT + dataset, item)
        strata = sorted(item.get("strata", {}).items(), key=lambda entry: (-entry[1]["available"], entry[0]))
        for stratum, numbers in strata[:_STRATA]:
            yield line(2 * _INDENT + (one_line(stratum, 80) or "(empty)"), numbers)
        if rest := strata[_STRATA:]:
            sums = {key: sum(numbers[key] for _, numbers in rest) for key in ("available", "drawn")}
            yield line(f"{2 * _INDENT}{len(rest):,} more strata", sums)


def lengths_section(measures: MixtureMeasures, packed: tuple[np.ndarray, np.ndarray] | None) -> Section:
    """Histograms and percentiles of lengths, and the number of turns."""
    lengths = {name: domain.lengths for name, domain in measures.domains.items()}
    parts: list[Any] = [
        Figure("lengths", plot_lengths(lengths, measures.unit), f"Lengths of the mixture's rows in {measures.unit}; dashed: the median."),
        _length_table(f"Length in {measures.unit}", lengths),
    ]
    if packed:
        exact = {"all rows": packed[0]}
        parts += [
            Figure("tokens", plot_lengths(exact, "tokens"), "Lengths as tokenised, chat template included, after truncation."),
            _length_table("Length in tokens, as tokenised", exact),
        ]
    turns = {name: domain.turns for name, domain in measures.domains.items()}
    parts.append(Figure("turns", plot_turns(turns), "User turns in a row."))
    rows = []
    for name, domain in measures.domains.items():
        total, several = domain.turns.total(), sum(n for turn, n in domain.turns.items() if turn > 1)
        rows.append([name, count(total), share(several, total), count(max(domain.turns)), share(domain.with_system, total)])
    parts.append(Table(("Domain", "Rows", "With several turns", "Most turns", "With a system prompt"), rows))
    return Section("lengths", "Lengths and turns", tuple(parts))


def _length_table(title: str, lengths: Mapping[str, np.ndarray]) -> Table:
    rows = []
    for name, values in lengths.items():
        percentiles = [count(int(np.percentile(values, p, method="lower"))) for p in _PERCENTILES]
        rows.append([name, count(len(values)), f"{values.mean():,.1f}", *percentiles, count(int(values.max())), count(int(values.sum()))])
    return Table(("", "Rows", "Mean", *_PERCENTILES.values(), "Longest", "Sum"), rows, title=title)


def packing_section(stats: Mapping[str, Any]) -> Section:
    """What tokenisation and packing did."""
    rows = [[label, count(stats[key])] for key, label in _TOKEN_FACTS if key in stats]
    rows += [[f"rows dropped: {name.replace('_', ' ')}", count(number)] for name, number in (stats.get("dropped") or {}).items()]
    if stats.get("tokens") and "supervised_tokens" in stats:
        rows.append(["share of tokens with loss", share(stats["supervised_tokens"], stats["tokens"])])
    if stats.get("fill"):
        rows.append(["fill of the blocks", f"{100 * stats['fill']:.2f} %"])
    return Section("packing", "Tokens and packing", (Table(("", ""), rows),))


def samples_section(measures: MixtureMeasures) -> Section:
    """A few rows of each domain."""
    parts: list[Note | Texts] = [Note("The first rows of the shuffled mixture, cut where they are long.")]
    for domain, rows in measures.samples.items():
        for row in rows:
            stratum = f" · {one_line(row['stratum'], 60)}" if row["stratum"] else ""
            turns = [(turn["role"], clip(turn["content"])) for turn in row["messages"]]
            parts.append(Texts(f"{domain} · {row['dataset']}{stratum}", turns))
    return Section("samples", "Samples", tuple(parts))
