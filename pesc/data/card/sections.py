"""The sections of a data card, from what was built: sources, funnel, removed rows, duplicates, contamination; `mixing.py` has the rest.

Counts come from the ledger and the statistics; a statistic that a stage does not record leaves its cell empty and stops nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pesc.data.card.built import CardInputs, SourceFacts
from pesc.data.card.ledger import Example, Ledger, read_ledger, reason_label
from pesc.data.card.mixing import mixture_sections, packing_section
from pesc.data.card.parts import Figure, Note, Section, Table, Texts, clip, count, one_line, share
from pesc.errors import DataError
from pesc.figures import plot_funnel

_CELL_KEYS = {"rows", "items", "item_share", "examples"}
_DETAILS = 12
"""Causes of one reason that are listed."""


def headline(inputs: CardInputs) -> tuple[str, str, list[tuple[str, str, str]]]:
    """(title, lead, facts at the top)."""
    facts: list[tuple[str, str, str]] = []
    if dedup := inputs.objects.get("dedup"):
        total = read_stats(dedup).get("total", {})
        removed = total.get("read", 0) - total.get("kept", 0)
        facts.append(("Rows read", count(total.get("read")), f"{share(removed, total.get('read', 0))} removed, each with its reason"))
        hits = total.get("contaminated")
        facts.append(("Contaminated rows", count(hits), "hold benchmark questions; removed" if hits else ""))
    if mix := inputs.objects.get("mix"):
        stats = read_stats(mix)
        total, unit = stats.get("total", {}), stats.get("unit", "rows")
        missing = total.get("shortfall", 0)
        facts.append(
            (
                "Rows in the mixture",
                count(total.get("rows", total.get("drawn"))),
                f"{missing:,} {unit} short of what was wanted" if missing else "as wanted",
            )
        )
    if tokens := inputs.objects.get("tokenize"):
        stats = read_stats(tokens)
        fill = stats.get("fill")
        facts.append(("Tokens", count(stats.get("tokens")), f"blocks {100 * fill:.2f} % full" if fill else ""))
    return f"Data of {inputs.recipe}", inputs.description or "The instruction mixture, where it comes from, and what was left out.", facts


def read_stats(folder: Path) -> dict[str, Any]:
    """stats.json of an object.  Raises DataError when it is not there."""
    try:
        return json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(
            f"The object {folder} has no readable stats.json, so there is no card of it. `pesc fsck` checks the store."
        ) from None


def sections_of(inputs: CardInputs) -> list[Section]:
    """Everything that can be told of what has been built, in the order of the steps."""
    sections = []
    if inputs.missing:
        rows = [[address, reason] for address, reason in inputs.missing.items()]
        parts = (Note("These are not built yet; what they would tell is left out."), Table(("Missing", "Why"), rows, words=2))
        sections.append(Section("missing", "Not built yet", parts))
    sections.append(sources_section(inputs.sources))
    if dedup := inputs.objects.get("dedup"):
        sections += dedup_sections(dedup)
    if inputs.semantic:
        sections.append(semantic_section(inputs.semantic))
    if mix := inputs.objects.get("mix"):
        sections += mixture_sections(mix, read_stats(mix), inputs.objects.get("tokenize"))
    if tokenize := inputs.objects.get("tokenize"):
        sections.insert(-1 if mix else len(sections), packing_section(read_stats(tokenize)))
    return sections


def sources_section(sources: tuple[SourceFacts, ...]) -> Section:
    """Where the bytes come from: licence, revision, digest."""
    rows = []
    for source in sources:
        revision = source.revision[:12] or ("local files" if source.files is not None else "not fetched yet")
        asked = f"\nasked for {source.requested}" if source.requested and source.requested != source.revision else ""
        size = f"\n{source.size_bytes / 1e6:,.1f} MB" if source.files is not None else ""
        rows.append(
            [
                f"{source.name}\n{source.uri}",
                "\n".join(_use_lines(source.use)),
                source.license or "not stated in the recipe",
                revision + asked,
                source.sha256[:12] or "–",
                f"{count(source.files)}{size}",
            ]
        )
    note = "Licences are what the recipe states; read the sources' own before publishing. The digest is the start of the SHA-256."
    return Section(
        "sources", "Sources", (Table(("Source", "Used as", "Licence", "Revision", "Digest", "Files"), rows, words=5), Note(note))
    )


def _use_lines(use: tuple[str, ...]) -> Iterator[str]:
    """`data set a, b` and the like, a kind a line."""
    for kind in ("dense model", "data set ", "benchmark "):
        names = [text.removeprefix(kind) for text in use if text.startswith(kind)]
        if names:
            yield (kind + ", ".join(names)).strip()


def dedup_sections(dedup: Path) -> list[Section]:
    """Funnel, removed rows, duplicates, contamination."""
    stats, ledger = read_stats(dedup), read_ledger(dedup)
    sections = [funnel_section(stats, ledger)]
    if ledger.reasons:
        sections.append(Section("removed", "Removed rows, by reason", tuple(_removed_parts(ledger, stats["total"]["read"]))))
    if ledger.pairs:
        sections.append(duplicates_section(ledger))
    if stats.get("contamination"):
        sections.append(contamination_section(stats["contamination"], stats["datasets"]))
    return sections


def funnel_section(stats: Mapping[str, Any], ledger: Ledger) -> Section:
    """Rows read, removed by each reason, and kept, a data set a line."""
    datasets: dict[str, dict[str, Any]] = stats["datasets"]
    reasons = ledger.reasons
    total = {key: sum(item[key] for item in datasets.values()) for key in ("read", "kept")}
    rows = []
    for name, item in datasets.items():
        read = item["read"]
        removed = [ledger.counts[reason][name] for reason in reasons]
        shown = [f"{number:,}\n{share(number, read)}" if number else "0" for number in removed]
        rows.append([f"{name}\n{item.get('domain', '')}", count(read), *shown, f"{item['kept']:,}\n{share(item['kept'], read)}"])
    removed = [sum(ledger.counts[reason].values()) for reason in reasons]
    shown = [f"{number:,}\n{share(number, total['read'])}" for number in removed]
    rows.append(["total", count(total["read"]), *shown, f"{total['kept']:,}\n{share(total['kept'], total['read'])}"])
    missing = total["read"] - total["kept"] - sum(removed)
    note = "Rows read = rows kept + rows in the ledger." if not missing else f"{missing:,} rows are neither kept nor in the ledger."
    funnel = [
        (n, i["read"], i["kept"], {reason_label(r): ledger.counts[r][n] for r in reasons if ledger.counts[r][n]})
        for n, i in datasets.items()
    ]
    figure = Figure("funnel", plot_funnel(funnel, [reason_label(reason) for reason in reasons]), "What became of each row that was read.")
    table = Table(("Data set", "Read", *(reason_label(reason) for reason in reasons), "Kept"), rows)
    return Section("funnel", "From rows read to rows kept", (figure, table, Note(note)))


def _removed_parts(ledger: Ledger, read: int) -> Iterator[Table | Texts]:
    rows = []
    for reason in ledger.reasons:
        number = sum(ledger.counts[reason].values())
        causes = ledger.details[reason].most_common(_DETAILS)
        more = len(ledger.details[reason]) - len(causes)
        told = "; ".join(f"{one_line(cause)} {n:,}" for cause, n in causes) + (f"; {more:,} more" if more > 0 else "")
        rows.append([reason_label(reason), told or "–", count(number), share(number, read)])
    yield Table(("Reason", "Cause, where there are several", "Rows", "Of all rows read"), rows, words=2)
    for reason in ledger.reasons:
        examples = ledger.examples[reason]
        texts = [text for example in examples for text in _example_texts(example)]
        yield Texts(f"{reason_label(reason)}: {len(examples)} of {sum(ledger.counts[reason].values()):,} rows", texts)


def _example_texts(example: Example) -> Iterator[tuple[str, str]]:
    cause = example.reason.partition(":")[2].strip()
    score = f", score {example.score:.2f}" if example.score is not None else ""
    yield f"{example.dataset}, {example.file} row {example.row}{f' ({one_line(cause)})' if cause else ''}{score}", clip(example.text)
    if example.kept_text:
        yield f"kept instead, from {example.kept_dataset}", one_line(example.kept_text, 300)


def duplicates_section(ledger: Ledger) -> Section:
    """Which data set's rows stand for the duplicates of which: a line a data set that lost rows, a column one that kept them."""
    keepers = sorted({kept for pairs in ledger.pairs.values() for _, kept in pairs})
    rows = []
    for reason in (reason for reason in ledger.reasons if reason in ledger.pairs):
        pairs = ledger.pairs[reason]
        for name in sorted({name for name, _ in pairs}):
            numbers = [pairs[name, kept] for kept in keepers]
            rows.append([reason_label(reason), name, *map(count, numbers), count(sum(numbers))])
    sums: Counter[str] = Counter()
    for pairs in ledger.pairs.values():
        for (name, kept), number in pairs.items():
            sums["within" if name == kept else "across"] += number
    note = f"Duplicates within one data set: {sums['within']:,}; across data sets: {sums['across']:,}. One row of each cluster stays."
    header = ("Kind", "Removed from", *(f"kept in {name}" for name in keepers), "Sum")
    return Section("duplicates", "Duplicates", (Note(note), Table(header, rows, words=2)))


def contamination_section(table: Mapping[str, Any], datasets: Mapping[str, Any]) -> Section:
    """Benchmark × data set: rows removed, questions found; then examples."""
    names = [name for name in datasets if any(_is_touched(entry["datasets"].get(name, {})) for entry in table.values())]
    rows, examples = [], []
    for benchmark, entry in table.items():
        cells = {name: entry["datasets"].get(name, {}) for name in names}
        found = [_contamination_cell(cell) for cell in cells.values()]
        everywhere = sum(cell.get("rows", 0) for cell in entry["datasets"].values())
        rows.append([benchmark, count(entry["items"]), *found, count(everywhere)])
        texts = [text for name, cell in cells.items() for one in cell.get("examples", ()) for text in _contamination_texts(name, one)]
        if texts:
            examples.append(Texts(f"{benchmark}: {len(texts) // 2} of {everywhere:,} rows", texts))
    note = (
        "Each cell: rows that hold a question and were removed; below, the benchmark's questions found and their share, and rows by kind. A number "
        "twin is a question with other numbers: it is counted apart, and removed only if the recipe says so. Data sets without any are not shown."
    )
    header = ("Benchmark", "Questions", *names, "Rows removed")
    return Section("contamination", "Benchmark questions in the training data", (Table(header, rows), Note(note), *examples))


def semantic_section(report: Mapping[str, Any]) -> Section:
    """Paraphrases that an embedding model found; nothing was removed for them."""
    groups = {**report["pairs"], **{f"in {name}": found for name, found in report["benchmarks"].items()}}
    rows = [[name, count(found["count"])] for name, found in groups.items()]
    note = (
        f"Pairs with a cosine of at least {report['threshold']:g} among {report['rows']:,} of the kept rows, drawn at random, and between these and "
        "the benchmark questions. Reported, not removed: the same subject is hard to tell from a paraphrase."
    )
    examples = [
        Texts(
            f"{name}: {len(found['examples'])} of {found['count']:,} pairs",
            [text for one in found["examples"] for text in _pair_texts(one)],
        )
        for name, found in groups.items()
    ]
    table = [Table(("Between", "Pairs"), rows)] if rows else []
    return Section("semantic", "Paraphrases", (Note(note), *table, *examples))


def _pair_texts(example: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"cosine {example['score']:.3f}", clip(str(example["row"]))
    yield "and", clip(str(example["other"]))


def _is_touched(cell: Mapping[str, Any]) -> bool:
    return bool(cell.get("rows")) or any(number for _, number in _flat(cell))


def _contamination_cell(cell: Mapping[str, Any]) -> str:
    if not _is_touched(cell):
        return "0"
    more = [f"{key.replace('_', ' ')} {value:,}" for key, value in _flat(cell) if value]
    return "\n".join([f"{cell['rows']:,}", f"{cell.get('items', 0):,} questions, {share(cell.get('item_share', 0), 1)}", *more])


def _flat(cell: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Further counts of a cell, also ones that are a map of counts, or of {rows, items}."""
    for key, value in cell.items():
        if key in _CELL_KEYS:
            continue
        if isinstance(value, Mapping):
            counts = ((name, number.get("rows") if isinstance(number, Mapping) else number) for name, number in value.items())
            yield from ((name, number) for name, number in counts if isinstance(number, int))
        elif isinstance(value, int):
            yield key, value


def _remarks(example: Mapping[str, Any]) -> str:
    """`, near, coverage 0.81`: what is said of an example besides its texts."""
    told = (
        value if isinstance(value, str) else f"{key.replace('_', ' ')} {value:g}"
        for key, value in example.items()
        if _is_remark(key, value)
    )
    return "".join(f", {one_line(text, 40)}" for text in told)


def _is_remark(key: str, value: object) -> bool:
    return key not in {"id", "row", "item"} and isinstance(value, str | int | float) and not isinstance(value, bool)


def _contamination_texts(dataset: str, example: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"training row of {dataset}{_remarks(example)}", clip(str(example.get("row", "")))
    yield "benchmark question", clip(str(example.get("item", "")))
