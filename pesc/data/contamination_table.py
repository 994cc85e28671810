"""Which benchmark items are in which data set: counts, rates and examples, the same whatever order or shard the rows come in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pesc.data.benchmark_index import KINDS, Hit, Kind
from pesc.data.benchmark_items import Item
from pesc.data.text import excerpt

EXAMPLES = 3


class ContaminatedRow(NamedTuple):
    """A row that holds benchmark items, as a shard reports it."""

    dataset: str
    row_id: str
    excerpt: str
    hits: Sequence[Hit]


class _Example(NamedTuple):
    """Sorts by what is shown first: most covered, then smallest row id, then item."""

    uncovered: float
    row_id: str
    item: int
    kind: Kind
    row: str


@dataclass
class _Cell:
    rows: Counter[str] = field(default_factory=Counter)
    items: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    examples: dict[str, list[_Example]] = field(default_factory=lambda: defaultdict(list))


class ContaminationTable:
    """Benchmark by data set.  A row counts once for each benchmark that it touches, under the first of its kinds there."""

    def __init__(self, items: Sequence[Item], rows: Iterable[ContaminatedRow] = ()) -> None:
        self.items = items
        self.sizes = Counter(item.benchmark for item in items)
        self._cells: dict[tuple[str, str], _Cell] = defaultdict(_Cell)
        for row in rows:
            self.add(*row)

    def add(self, dataset: str, row_id: str, row_text: str, hits: Sequence[Hit]) -> None:
        """Count one row that `BenchmarkIndex.find` found something in; `row_text` is shown in examples."""
        counted: set[str] = set()
        for hit in sorted(hits, key=lambda hit: (KINDS.index(hit.kind), -hit.coverage, hit.item)):
            benchmark = self.items[hit.item].benchmark
            cell = self._cells[benchmark, dataset]
            cell.items[hit.kind].add(hit.item)
            if benchmark in counted:
                continue
            counted.add(benchmark)
            cell.rows[hit.kind] += 1
            examples = cell.examples[hit.kind]
            examples.append(_Example(-round(hit.coverage, 6), row_id, hit.item, hit.kind, row_text))
            examples.sort()
            del examples[EXAMPLES:]

    def merge(self, other: ContaminationTable) -> None:
        """Add what another shard found; both tables are over the same items."""
        if self.items != other.items:
            raise ValueError("two contamination tables over different items cannot be merged")
        for key, theirs in other._cells.items():
            ours = self._cells[key]
            ours.rows.update(theirs.rows)
            for kind, numbers in theirs.items.items():
                ours.items[kind] |= numbers
            for kind, examples in theirs.examples.items():
                ours.examples[kind] = sorted([*ours.examples[kind], *examples])[:EXAMPLES]

    def summary(self, datasets: Sequence[str] | Mapping[str, int]) -> dict[str, dict[str, object]]:
        """{benchmark: {items, datasets: {name: cell}}}, every cell present.

        A cell has `rows` and `items` (number twins not among them), `item_share` (of the benchmark's items), `kinds` ({kind: {rows, items}})
        and `examples`.  `datasets` may be a mapping name -> rows read; then a cell also has `row_share`: of the rows
        read, so rows that were removed before (filters, duplicates) count as clean.
        """
        sizes = datasets if isinstance(datasets, Mapping) else {}
        return {
            benchmark: {"items": size, "datasets": {name: self._summary(benchmark, name, size, sizes.get(name)) for name in datasets}}
            for benchmark, size in sorted(self.sizes.items())
        }

    def _summary(self, benchmark: str, dataset: str, size: int, rows_read: int | None) -> dict[str, object]:
        cell = self._cells.get((benchmark, dataset), _Cell())
        counted = [kind for kind in KINDS if kind != "number_twin"]
        rows = sum(cell.rows[kind] for kind in counted)
        found = len(set().union(*(cell.items.get(kind, ()) for kind in counted)))
        summary: dict[str, object] = {"rows": rows, "items": found, "item_share": round(found / size, 6)}
        if rows_read is not None:
            summary["row_share"] = round(rows / rows_read, 6) if rows_read else 0.0
        summary["kinds"] = {kind: {"rows": cell.rows[kind], "items": len(cell.items.get(kind, ()))} for kind in KINDS}
        summary["examples"] = [self._example(example) for kind in KINDS for example in cell.examples.get(kind, ())]
        return summary

    def _example(self, example: _Example) -> dict[str, object]:
        item = excerpt(self.items[example.item].text)
        return {"id": example.row_id, "row": example.row, "item": item, "coverage": round(-example.uncovered, 4), "kind": example.kind}
