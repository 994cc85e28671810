"""The `dedup` stage: one schema, filters, exact and near-duplicates, decontamination.

    read -> malformed -> filters -> exact -> near -> contaminated -> kept

Writes rows.parquet (what is kept), removed.parquet (the ledger: what is not, and why) and stats.json.  Rows read = rows kept + ledger
rows is checked on each run.  Decontamination comes last, on the survivors: a near-duplicate of a contaminated row is already gone,
so nothing that resembles a benchmark question is left through the back door.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pesc.data.config import DatasetConfig, DedupConfig, filters_of
from pesc.data.conversation import BadRow, Conversation, RowError, conversation_id, detect_format, parse_row
from pesc.data.decontaminate import BenchmarkIndex, ContaminationTable, Item, removing_hit
from pesc.data.exact_dedup import split_exact_duplicates, survival_order
from pesc.data.filters import FILTER_REASONS, reason_to_drop
from pesc.data.functions import is_test_file
from pesc.data.minhash import find_near_duplicates
from pesc.data.rows import ROW_SUFFIXES, find_row_files, read_rows
from pesc.data.text import excerpt
from pesc.errors import DataError
from pesc.stage import BuildResult, StageContext

log = logging.getLogger(__name__)
_REPORT_EVERY = 5000
_DETECTION_ROWS = 20


class Removal(NamedTuple):
    """One line of the ledger."""

    id: str
    dataset: str
    file: str
    row: int
    reason: str
    kept_id: str | None
    score: float | None
    excerpt: str


@dataclass
class Ledger:
    """Everything that was removed, and the counts."""

    removals: list[Removal] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def remove(self, row: Conversation, reason: str, kept_id: str | None = None, score: float | None = None) -> None:
        """Note one conversation that goes.  The count's name is the reason up to the colon."""
        self.removals.append(Removal(row.id, row.dataset, row.file, row.row, reason, kept_id, score, excerpt(row.prompt)))
        self.counts[row.dataset][reason.split(":")[0]] += 1


def build(ctx: StageContext) -> BuildResult:
    """Fill `ctx.out` with rows.parquet, removed.parquet and stats.json.

    Raises DataError: no row files, too many malformed rows, a data set that loses too much to near-duplicates, or a benchmark
    without its field.
    """
    config: DedupConfig = ctx.config
    ledger = Ledger(counts={name: Counter() for name in sorted(config.datasets)})
    seconds: dict[str, float] = {}
    rows = _timed(seconds, "read", lambda: _read_all(ctx, ledger))
    rows = _timed(seconds, "filter", lambda: _filter(rows, ctx, ledger))
    rows = _timed(seconds, "exact", lambda: _drop_exact(rows, ledger))
    rows = _timed(seconds, "near", lambda: _drop_near(rows, ctx, ledger))
    rows, table = _timed(seconds, "decontaminate", lambda: _decontaminate(rows, ctx, ledger))
    stats = _finish(rows, ledger, table, config)
    _timed(seconds, "write", lambda: _write(ctx.out, rows, ledger, stats))
    total = stats["total"]
    log.info("%d rows read, %d kept", total["read"], total["kept"])
    return BuildResult(metrics={"seconds": seconds, **total})


def _timed(seconds: dict[str, float], name: str, step: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = step()
    seconds[name] = round(time.perf_counter() - start, 3)
    return result


# --- reading -------------------------------------------------------------------------------------------------------------------


def _read_all(ctx: StageContext, ledger: Ledger) -> list[Conversation]:
    config: DedupConfig = ctx.config
    rows: list[Conversation] = []
    for done, (name, dataset) in enumerate(sorted(config.datasets.items())):
        before = len(ledger.removals)
        found = list(_read_dataset(name, dataset, ctx.inputs[dataset.source], ledger))
        _check_dataset(name, dataset, found, ledger.removals[before:], config)
        rows += found
        ctx.progress(done + 1, len(config.datasets), "data sets", f"{name}: {ledger.counts[name]['read']} rows")
    return rows


def _read_dataset(name: str, dataset: DatasetConfig, root: Path, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one data set; rows that are none go into the ledger."""
    counts = ledger.counts[name]
    code = dataset.format == "python_functions"
    files = find_row_files(root, dataset.files, (".py",) if code else ROW_SUFFIXES, f"Data set {name!r}")
    for file in files:
        if code and is_test_file(file):
            continue
        row_format = dataset.format if dataset.format != "auto" else _detect(root / file)
        for number, raw in read_rows(root / file):
            if dataset.max_rows is not None and counts["read"] >= dataset.max_rows:
                return
            counts["read"] += 1
            try:
                yield _as_conversation(raw, row_format, name, dataset, file, number)
            except RowError as error:
                counts["malformed"] += 1
                ledger.removals.append(_malformed(raw, name, file, number, str(error)))


def _as_conversation(raw: Any, row_format: str | None, name: str, dataset: DatasetConfig, file: str, number: int) -> Conversation:
    if isinstance(raw, BadRow):
        raise RowError("row", raw.reason)
    if row_format is None:
        known = ", ".join(sorted(raw)) if isinstance(raw, dict) else type(raw).__name__
        raise RowError("row", f"has the fields of no known format ({known[:200]})")
    messages, questions = parse_row(raw, row_format)
    stratum = ""
    if dataset.stratify_by:
        if dataset.stratify_by not in raw:
            raise RowError(dataset.stratify_by, "is missing (stratify_by)")
        stratum = str(raw[dataset.stratify_by])
    return Conversation(conversation_id(name, messages), name, dataset.domain, stratum, messages, questions, file, number)


def _detect(path: Path) -> str | None:
    """The format of the first rows that have one."""
    for position, (_, row) in enumerate(read_rows(path)):
        if found := detect_format(row):
            return found
        if position >= _DETECTION_ROWS:
            break
    return None


def _malformed(raw: Any, dataset: str, file: str, number: int, problem: str) -> Removal:
    shown = raw.reason if isinstance(raw, BadRow) else json.dumps(raw, ensure_ascii=True, sort_keys=True, default=str)
    row_id = hashlib.sha256(f"{dataset}\0{file}\0{number}\0{shown}".encode()).hexdigest()[:32]
    return Removal(row_id, dataset, file, number, f"malformed: {_printable(problem)}", None, None, excerpt(shown))


def _printable(text: str) -> str:
    """Text that a Parquet file can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _check_dataset(name: str, dataset: DatasetConfig, found: list[Conversation], malformed: list[Removal], config: DedupConfig) -> None:
    read = len(found) + len(malformed)
    if not read:
        raise DataError(f"Data set {name!r} has no rows in {', '.join(dataset.files)}. Check `files` and `format`.")
    share = len(malformed) / read
    if share > config.filters.max_malformed_share:
        first = malformed[0]
        raise DataError(
            f"Data set {name!r}: {len(malformed)} of {read} rows ({share:.1%}) are not conversations, more than "
            f"filters.max_malformed_share allows ({config.filters.max_malformed_share:.1%}). The first: {first.file}, row {first.row}, "
            f"{first.reason.removeprefix('malformed: ')}. Mend the file, choose another `format`, or raise the share."
        )


# --- removing ------------------------------------------------------------------------------------------------------------------


def _filter(rows: list[Conversation], ctx: StageContext, ledger: Ledger) -> list[Conversation]:
    kept, filters = [], {name: filters_of(ctx.config, name) for name in ctx.config.datasets}
    for done, row in enumerate(rows, start=1):
        reason = reason_to_drop(row, filters[row.dataset])
        if reason:
            ledger.remove(row, f"filter_{reason}")
        else:
            kept.append(row)
        if done % _REPORT_EVERY == 0 or done == len(rows):
            ctx.progress(done, len(rows), "rows", "filtering")
    return kept


def _drop_exact(rows: list[Conversation], ledger: Ledger) -> list[Conversation]:
    kept, removed = split_exact_duplicates(rows)
    for row, survivor in removed:
        ledger.remove(row, "exact", survivor.id, 1.0)
    return kept


class _Texts(Sequence[str]):
    """The rows' texts, made when asked for: all of them at once would double the memory."""

    def __init__(self, rows: Sequence[Conversation]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return self._rows[place].text


def _drop_near(rows: list[Conversation], ctx: StageContext, ledger: Ledger) -> list[Conversation]:
    config: DedupConfig = ctx.config
    rows = sorted(rows, key=survival_order)
    found = find_near_duplicates(
        _Texts(rows),
        threshold=config.near_duplicate_threshold,
        ngram=config.ngram_words,
        permutations=config.num_permutations,
        on_progress=lambda done, total: ctx.progress(done, total, "rows", "near-duplicates"),
    )
    candidates = Counter(row.dataset for row in rows)
    gone = {duplicate.removed for duplicate in found}
    for duplicate in found:
        ledger.remove(rows[duplicate.removed], "near", rows[duplicate.kept].id, duplicate.score)
    for name, total in sorted(candidates.items()):
        lost = ledger.counts[name]["near"]
        if lost > config.max_duplicate_share * total:
            pair = next(item for item in found if rows[item.removed].dataset == name)
            raise DataError(
                f"Data set {name!r} would lose {lost} of {total} rows ({lost / total:.1%}) to near-duplicates, more than max_duplicate_share "
                f"allows ({config.max_duplicate_share:.1%}); templated sets do that. For example {_place(rows[pair.removed])} resembles "
                f"{_place(rows[pair.kept])} by {pair.score:.2f}. Raise near_duplicate_threshold, or max_duplicate_share if that is meant."
            )
    return [row for number, row in enumerate(rows) if number not in gone]


def _place(row: Conversation) -> str:
    return f"{row.dataset}/{row.file} row {row.row}"


def _decontaminate(rows: list[Conversation], ctx: StageContext, ledger: Ledger) -> tuple[list[Conversation], ContaminationTable]:
    config: DedupConfig = ctx.config
    items = list(_benchmark_items(ctx))
    table = ContaminationTable(items)
    if not items:
        return rows, table
    index = BenchmarkIndex.build(items, config.contamination_ngram, config.contamination_coverage)
    kept = []
    for done, (row, hits) in enumerate(zip(rows, index.find(row.questions for row in rows), strict=True), start=1):
        if hits:
            table.add(row.dataset, row.id, excerpt(row.questions[0]), hits)
        if hit := removing_hit(hits, config.number_twins):
            ledger.remove(row, f"contaminated: {items[hit.item].benchmark}", None, hit.coverage)
        else:
            kept.append(row)
        if done % _REPORT_EVERY == 0 or done == len(rows):
            ctx.progress(done, len(rows), "rows", "decontaminating")
    return kept, table


def _benchmark_items(ctx: StageContext) -> Iterator[Item]:
    """The bare questions of every benchmark, each text once."""
    for name, benchmark in sorted(ctx.config.benchmarks.items()):
        root, what = ctx.inputs[benchmark.source], f"Benchmark {name!r}"
        texts: dict[str, None] = {}
        for file in find_row_files(root, benchmark.files, ROW_SUFFIXES, what):
            for number, raw in read_rows(root / file):
                missing = [key for key in benchmark.fields if not isinstance(raw, dict) or not isinstance(raw.get(key), str)]
                if missing:
                    raise DataError(f"{what}: {file}, row {number} has no text in the field {missing[0]!r}. Mend `fields` or the file.")
                texts.setdefault("\n".join(raw[key] for key in benchmark.fields))
        if not texts:
            raise DataError(f"{what} has no rows in {', '.join(benchmark.files)}. Check `files`.")
        yield from (Item(name, text) for text in texts)


# --- writing -------------------------------------------------------------------------------------------------------------------


def _finish(rows: list[Conversation], ledger: Ledger, table: ContaminationTable, config: DedupConfig) -> dict[str, Any]:
    """The statistics, after the invariant: every row read is either kept or in the ledger."""
    kept = Counter(row.dataset for row in rows)
    removed = Counter(removal.dataset for removal in ledger.removals)
    for name, counts in ledger.counts.items():
        if counts["read"] != kept[name] + removed[name]:
            raise RuntimeError(f"{name}: {counts['read']} rows read, but {kept[name]} kept and {removed[name]} in the ledger")
    reasons = ("malformed", *(f"filter_{name}" for name in FILTER_REASONS), "exact", "near", "contaminated")
    per_dataset = {
        name: {"domain": config.datasets[name].domain, "read": counts["read"], **{key: counts[key] for key in reasons}, "kept": kept[name]}
        for name, counts in ledger.counts.items()
    }
    total = {key: sum(item[key] for item in per_dataset.values()) for key in ("read", *reasons, "kept")}
    if not rows:
        raise DataError(f"No row is left of {total['read']}: {', '.join(f'{key} {total[key]}' for key in reasons if total[key])}.")
    return {"datasets": per_dataset, "total": total, "contamination": table.summary(list(per_dataset))}


def _write(out: Path, rows: list[Conversation], ledger: Ledger, stats: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [("id", pa.string()), ("dataset", pa.string()), ("domain", pa.string()), ("stratum", pa.string()), ("messages", pa.list_(turn))]
    )
    rows = sorted(rows, key=lambda row: (row.dataset, row.id))
    columns = {name: [getattr(row, name) for row in rows] for name in ("id", "dataset", "domain", "stratum")}
    columns["messages"] = [[message._asdict() for message in row.messages] for row in rows]
    pq.write_table(pa.table(columns, schema=schema), out / "rows.parquet", compression="zstd")
    ledger_schema = pa.schema(
        [
            ("id", pa.string()),
            ("dataset", pa.string()),
            ("file", pa.string()),
            ("row", pa.int64()),
            ("reason", pa.string()),
            ("kept_id", pa.string()),
            ("score", pa.float64()),
            ("excerpt", pa.string()),
        ]
    )
    removals = sorted(ledger.removals, key=lambda item: (item.dataset, item.file, item.row))
    removed = {name: [getattr(item, name) for item in removals] for name in Removal._fields}
    pq.write_table(pa.table(removed, schema=ledger_schema), out / "removed.parquet", compression="zstd")
    (out / "stats.json").write_text(json.dumps(stats, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
