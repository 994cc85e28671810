"""What was removed, why, and from where: one line a row, in `removed.parquet`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class Removal(NamedTuple):
    """One line of the ledger.  reason: `malformed: …`, `filter_NAME`, `exact`, `near`, `contaminated: BENCHMARK` or `group_cap`."""

    id: str
    dataset: str
    file: str
    row: int
    reason: str
    kept_id: str | None
    score: float | None
    excerpt: str


SCHEMA = pa.schema(
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


def to_table(removals: Iterable[Removal]) -> pa.Table:
    """Ledger lines as an Arrow table."""
    return pa.Table.from_pylist([removal._asdict() for removal in removals], schema=SCHEMA)


def kind_of(reason: str) -> str:
    """A reason's name in the statistics: what stands before the colon."""
    return reason.partition(":")[0]


def count_reasons(table: pa.Table) -> dict[str, Counter[str]]:
    """{data set: {kind of reason: lines}}."""
    counts: dict[str, Counter[str]] = {}
    lines = table.group_by(["dataset", "reason"]).aggregate([([], "count_all")])
    for line in lines.to_pylist():
        counts.setdefault(line["dataset"], Counter())[kind_of(line["reason"])] += line["count_all"]
    return counts


def write_ledger(path: Path, tables: Iterable[pa.Table]) -> pa.Table:
    """Write all lines in the order of their places (data set, file, row), and give them back."""
    whole = pa.concat_tables([SCHEMA.empty_table(), *tables])
    whole = whole.sort_by([("dataset", "ascending"), ("file", "ascending"), ("row", "ascending"), ("id", "ascending")])
    pq.write_table(whole.combine_chunks(), path, compression="zstd", row_group_size=1 << 17)
    return whole
