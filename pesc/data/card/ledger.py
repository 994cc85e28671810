"""What the removal ledger (removed.parquet) tells: how many rows went for which reason, examples, and which row stands for a duplicate."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = 4
"""Rows shown of each reason, evenly spread over the ledger."""
_FIRST, _LAST = ("malformed",), ("exact", "near", "contaminated", "group_cap")
_LABELS = {
    "malformed": "not a conversation", "exact": "exact duplicate", "near": "near-duplicate", "contaminated": "in a benchmark",
    "group_cap": "over the cap of its group",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One removed row."""

    dataset: str
    file: str
    row: int
    reason: str
    score: float | None
    text: str
    kept_dataset: str = ""
    kept_text: str = ""


@dataclass
class Ledger:
    """Counts by reason; a reason is the ledger's up to the colon."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """reason -> data set -> rows."""
    details: dict[str, Counter[str]] = field(default_factory=dict)
    """reason -> what stands after the colon -> rows."""
    pairs: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    """reason -> (data set, data set of the row that was kept instead) -> rows."""
    examples: dict[str, list[Example]] = field(default_factory=dict)

    @property
    def reasons(self) -> list[str]:
        """In the order of the steps; ones that this module does not know stand among the filters."""

        def place(reason: str) -> tuple[int, int, str]:
            if reason in _FIRST:
                return 0, 0, reason
            return (2, _LAST.index(reason), "") if reason in _LAST else (1, 0, reason)

        return sorted(self.counts, key=place)


def reason_label(reason: str) -> str:
    """A reason in words."""
    return _LABELS.get(reason) or reason.removeprefix("filter_").replace("_", " ")


def read_ledger(dedup: Path) -> Ledger:
    """Counts, pairs and examples of a dedup object."""
    import pyarrow.parquet as pq

    table = pq.read_table(dedup / "removed.parquet", columns=["reason", "dataset", "kept_id", "id"], read_dictionary=["reason", "dataset"])
    ledger, places = Ledger(), {}
    reasons, names = _decode(table.column("reason")), _decode(table.column("dataset"))
    heads = {text: text.partition(":")[0] for text in reasons[1]}
    for head in sorted(set(heads.values())):
        codes = [code for code, text in enumerate(reasons[1]) if heads[text] == head]
        rows = np.flatnonzero(np.isin(reasons[0], codes))
        if not len(rows):
            continue
        ledger.counts[head] = _counter(names[0][rows], names[1])
        texts = [text.partition(":")[2].strip() for text in reasons[1]]
        details = Counter({key: n for key, n in _counter(reasons[0][rows], texts).items() if key})
        ledger.details[head] = details
        places[head] = rows[np.unique(np.linspace(0, len(rows) - 1, EXAMPLES).astype(int))]
    kept = _kept_datasets(dedup, table, names)
    for head in ledger.counts:
        codes = [code for code, text in enumerate(reasons[1]) if heads[text] == head]
        rows = np.flatnonzero(np.isin(reasons[0], codes))
        known = rows[kept[0][rows] >= 0]
        if len(known):
            width = len(kept[1])
            joint = Counter(dict(enumerate(np.bincount(names[0][known] * width + kept[0][known]).tolist())))
            ledger.pairs[head] = Counter({(names[1][key // width], kept[1][key % width]): n for key, n in joint.items() if n})
    _add_examples(ledger, dedup, places, kept)
    return ledger


def _decode(column: Any) -> tuple[np.ndarray, list[str]]:
    """A dictionary column as (codes, texts)."""
    array = column.combine_chunks()
    return array.indices.to_numpy(zero_copy_only=False).astype(np.int64), array.dictionary.to_pylist()


def _counter(codes: np.ndarray, texts: list[str]) -> Counter[str]:
    counter: Counter[str] = Counter()
    for code, number in enumerate(np.bincount(codes, minlength=len(texts)).tolist()):
        if number:
            counter[texts[code]] += number
    return counter


def _kept_datasets(dedup: Path, table: Any, names: tuple[np.ndarray, list[str]]) -> tuple[np.ndarray, list[str]]:
    """(code of the data set whose row was kept instead, or -1, for each ledger row; the data sets).

    The kept row of an early step may itself have gone in a later one, so ids are looked up among the kept rows and in the ledger.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows = pq.read_table(dedup / "rows.parquet", columns=["id", "dataset"], read_dictionary=["dataset"])
    codes, datasets = _decode(rows.column("dataset"))
    every = sorted({*datasets, *names[1]})
    recode = {name: code for code, name in enumerate(every)}
    owner = np.array([*(recode[name] for name in datasets)], dtype=np.int64)[codes] if len(codes) else np.zeros(0, dtype=np.int64)
    gone = np.array([recode[name] for name in names[1]], dtype=np.int64)[names[0]] if len(names[0]) else np.zeros(0, dtype=np.int64)
    ids = pa.chunked_array([*rows.column("id").chunks, *table.column("id").chunks], type=pa.string()).combine_chunks()
    found = (
        pc.index_in(table.column("kept_id").combine_chunks(), value_set=ids, skip_nulls=True).fill_null(-1).to_numpy(zero_copy_only=False)
    )
    owners = np.concatenate([owner, gone, [-1]])
    return owners[found], every


def _add_examples(ledger: Ledger, dedup: Path, places: dict[str, np.ndarray], kept: tuple[np.ndarray, list[str]]) -> None:
    wanted = {int(place): head for head, rows in places.items() for place in rows}
    columns = ["dataset", "file", "row", "reason", "kept_id", "score", "excerpt"]
    found = _rows_at(dedup / "removed.parquet", columns, wanted)
    texts = _first_questions(dedup, {row["kept_id"] for row in found.values() if row["kept_id"]})
    for place, head in sorted(wanted.items()):
        row = found[place]
        owner = kept[1][kept[0][place]] if kept[0][place] >= 0 else ""
        example = Example(
            dataset=row["dataset"],
            file=row["file"],
            row=row["row"],
            reason=row["reason"],
            score=row["score"],
            text=row["excerpt"] or "",
            kept_dataset=owner,
            kept_text=texts.get(row["kept_id"], ""),
        )
        ledger.examples.setdefault(head, []).append(example)


def _rows_at(path: Path, columns: list[str], places: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Rows of a Parquet file by their numbers; only the row groups that hold them are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    left, found, start = sorted(places), {}, 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if left and left[0] < end:
                for batch in file.iter_batches(batch_size=8192, row_groups=[group], columns=columns):
                    inside = [place for place in left if start <= place < start + batch.num_rows]
                    if inside:
                        taken = batch.take(pa.array([place - start for place in inside])).to_pylist()
                        found.update(zip(inside, taken, strict=True))
                        left = left[len(inside) :]
                    start += batch.num_rows
            start = end
    return found


def _first_questions(dedup: Path, ids: set[str]) -> dict[str, str]:
    """The start of the question of some kept rows."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    every = pq.read_table(dedup / "rows.parquet", columns=["id"]).column("id")
    places = np.flatnonzero(pc.is_in(every, value_set=pa.array(sorted(ids), pa.string())).to_numpy()).tolist()
    rows = _rows_at(dedup / "rows.parquet", ["id", "messages"], places)
    return {row["id"]: next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), "") for row in rows.values()}
