"""Benchmark questions inside training rows: the overlap rule of Tülu 3 (Lambert et al. 2024, §3.2).

A row is contaminated by an item when n-grams shared with ONE row's user turns cover more than a share of the item's words.
Items shorter than one n-gram, which n-grams cannot see, must equal a whole user turn.  Both sides are bare questions: a rendered
template ("Question: … Options: …") would match itself everywhere.

    vocabulary  word -> 1..V over all items; any other word is 0, and an n-gram that holds a 0 matches nothing
    n-grams     64-bit polynomial hashes, sorted; postings say which item and which of its words each one covers
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pesc.data.text import words

BATCH = 2048
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so powers never vanish modulo 2^64


class Item(NamedTuple):
    """One benchmark question."""

    benchmark: str
    text: str


class Hit(NamedTuple):
    """Item `item` is covered by this share by one row."""

    item: int
    coverage: float


@dataclass
class BenchmarkIndex:
    """All benchmark items, searchable by n-gram and, for the short ones, by their whole text."""

    items: Sequence[Item]
    ngram: int
    coverage: float

    def __post_init__(self) -> None:
        self._vocabulary: dict[str, int] = {}
        self._lengths: list[int] = []
        self._short: dict[tuple[str, ...], list[int]] = defaultdict(list)
        hashes: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        for number, item in enumerate(self.items):
            tokens = words(item.text)
            self._lengths.append(len(tokens))
            if len(tokens) < self.ngram:
                if tokens:
                    self._short[tuple(tokens)].append(number)
                continue
            ids = np.array([self._vocabulary.setdefault(word, len(self._vocabulary) + 1) for word in tokens], dtype=np.uint64)
            hashed = _rolling_hash(ids, self.ngram)
            hashes.append(hashed)
            owners.append(np.full(len(hashed), number, dtype=np.int64))
            starts.append(np.arange(len(hashed), dtype=np.int64))
        empty = np.zeros(0, dtype=np.int64)
        flat = np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.uint64)
        order = np.argsort(flat, kind="stable")
        self._owners = (np.concatenate(owners) if owners else empty)[order]
        self._starts = (np.concatenate(starts) if starts else empty)[order]
        self._keys, first = np.unique(flat[order], return_index=True)
        self._bounds = np.append(first, len(flat))

    def find(self, rows: Iterable[Sequence[str]]) -> Iterator[list[Hit]]:
        """For each row (its bare user turns): the items it contaminates, most covered first."""
        batch: list[Sequence[str]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH:
                yield from self._find_batch(batch)
                batch = []
        yield from self._find_batch(batch)

    def _find_batch(self, rows: Sequence[Sequence[str]]) -> list[list[Hit]]:
        """One pass over all turns of a batch, laid end to end with a 0 between turns so that no n-gram spans two."""
        covered: list[dict[int, set[int]]] = [{} for _ in rows]
        exact: list[set[int]] = [set() for _ in rows]
        ids: list[int] = []
        row_of: list[int] = []
        get = self._vocabulary.get
        for number, turns in enumerate(rows):
            for turn in turns:
                tokens = words(turn)
                if len(tokens) < self.ngram:
                    exact[number].update(self._short.get(tuple(tokens), ()))
                    continue
                ids.extend([get(word, 0) for word in tokens])
                ids.append(0)
                row_of.extend([number] * (len(tokens) + 1))
        self._cover(np.array(ids, dtype=np.uint64), row_of, covered)
        return [self._hits(spots, whole) for spots, whole in zip(covered, exact, strict=True)]

    def _cover(self, ids: np.ndarray, row_of: Sequence[int], covered: list[dict[int, set[int]]]) -> None:
        """Note, for each row, which words of which items its n-grams cover."""
        if len(ids) < self.ngram or not len(self._keys):
            return
        unknown = np.cumsum(np.append(0, ids == 0))
        known = np.flatnonzero(unknown[self.ngram :] == unknown[: -self.ngram])
        hashed = _rolling_hash(ids, self.ngram)[known]
        slots = np.minimum(np.searchsorted(self._keys, hashed), len(self._keys) - 1)
        found = np.flatnonzero(self._keys[slots] == hashed)
        for place, slot in zip(known[found].tolist(), slots[found].tolist(), strict=True):
            spots = covered[row_of[place]]
            for posting in range(self._bounds[slot], self._bounds[slot + 1]):
                start = int(self._starts[posting])
                spots.setdefault(int(self._owners[posting]), set()).update(range(start, start + self.ngram))

    def _hits(self, spots: dict[int, set[int]], whole: set[int]) -> list[Hit]:
        hits = [Hit(item, 1.0) for item in whole]
        hits += [
            Hit(item, share)
            for item, places in spots.items()
            if (share := len(places) / self._lengths[item]) > self.coverage or share == 1.0
        ]
        return sorted(hits, key=lambda hit: (-hit.coverage, hit.item))


def _rolling_hash(ids: np.ndarray, size: int) -> np.ndarray:
    """Hash of each window of `size` ids: sum of mix(id) * base^position, modulo 2^64."""
    with np.errstate(over="ignore"):
        mixed = (ids + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
        count = len(ids) - size + 1
        total = np.zeros(count, dtype=np.uint64)
        power = np.uint64(1)
        for offset in range(size):
            total += mixed[offset : offset + count] * power
            power = power * _BASE
    return total


class ContaminationTable:
    """Counts and examples, benchmark by data set."""

    EXAMPLES = 3

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.sizes: dict[str, int] = defaultdict(int)
        for item in items:
            self.sizes[item.benchmark] += 1
        self._rows: dict[tuple[str, str], int] = defaultdict(int)
        self._hit: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._examples: dict[tuple[str, str], list[dict[str, object]]] = defaultdict(list)

    def add(self, dataset: str, row_id: str, row_text: str, hits: Sequence[Hit]) -> None:
        """Count one contaminated row; it counts once for each benchmark that it touches."""
        seen: set[str] = set()
        for hit in hits:
            cell = (self.items[hit.item].benchmark, dataset)
            self._hit[cell].add(hit.item)
            if cell[0] in seen:
                continue
            seen.add(cell[0])
            self._rows[cell] += 1
            if len(self._examples[cell]) < self.EXAMPLES:
                example = {"id": row_id, "row": row_text, "item": self.items[hit.item].text[:160], "coverage": round(hit.coverage, 4)}
                self._examples[cell].append(example)

    def summary(self, datasets: Sequence[str]) -> dict[str, dict[str, object]]:
        """{benchmark: {items, datasets: {name: {rows, items, item_share, examples}}}}, every cell present."""
        table: dict[str, dict[str, object]] = {}
        for benchmark, size in sorted(self.sizes.items()):
            cells = {}
            for dataset in datasets:
                cell = (benchmark, dataset)
                hit = len(self._hit[cell])
                share = round(hit / size, 6) if size else 0.0
                cells[dataset] = {"rows": self._rows[cell], "items": hit, "item_share": share, "examples": self._examples[cell]}
            table[benchmark] = {"items": size, "datasets": cells}
        return table
