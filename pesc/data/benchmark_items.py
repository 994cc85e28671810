"""Benchmark items as one array of word numbers, with the weight of each word in the overlap rules.

An entry is a distinct word sequence; items with the same words (MATH-500 within MATH) share one.  Legend: E entries, W words of all.

A word's weight is UNIT over the number of entries that share the least distinctive n-gram it lies in, and 0 from TEMPLATE_ENTRIES on:
what a template covers weighs nothing, in the covered sum and in the total, so a template alone covers nothing, and a whole item always
covers 1.  An entry made of nothing but templates weighs UNIT a word and must be covered whole.  Weights are integers: sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pesc.data.ngram_table import NgramTable, ragged, window_hashes

UNIT = 2520  # divisible by 1 … 10
TEMPLATE_ENTRIES = 10


class Item(NamedTuple):
    """One benchmark question."""

    benchmark: str
    text: str


@dataclass(frozen=True)
class Entries:
    """words: word numbers (W,).  offsets: entry e is `words[offsets[e]:offsets[e + 1]]` (E + 1,)."""

    words: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Words of each entry (E,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Weights:
    """sums: running sum of the words' weights (W + 1,).  whole: entries that must be covered whole (E,)."""

    sums: np.ndarray
    whole: np.ndarray


def windows_of(entries: Entries, mixed: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All n-grams within entries: (hash, entry, start in the entry), each of shape (windows,).  `mixed`: pattern of each word (W,)."""
    counts = np.maximum(entries.lengths - size + 1, 0)
    places = ragged(entries.offsets[:-1], counts)
    owner = np.repeat(np.arange(len(counts)), counts)
    return window_hashes(mixed, size)[places] if len(places) else np.zeros(0, np.uint64), owner, places - entries.offsets[owner]


def entry_counts(table: NgramTable) -> np.ndarray:
    """In how many entries each posting's n-gram occurs, shape (postings,)."""
    key = np.repeat(np.arange(len(table.keys)), np.diff(table.bounds))
    new = np.ones(len(key), dtype=bool)
    new[1:] = (key[1:] != key[:-1]) | (table.entries[1:] != table.entries[:-1])
    return np.bincount(key[new], minlength=len(table.keys))[key]


def word_weights(entries: Entries, table: NgramTable, size: int) -> Weights:
    """The weights that a table of n-grams of this size gives to the words of the entries."""
    shared = entry_counts(table)
    gram = np.where(shared < TEMPLATE_ENTRIES, UNIT // np.maximum(shared, 1), 0)
    weights = np.full(len(entries.words), UNIT, dtype=np.int64)
    first = entries.offsets[table.entries] + table.starts
    for place in range(size):
        np.minimum.at(weights, first + place, gram)
    totals = np.add.reduceat(weights, entries.offsets[:-1]) if len(weights) else np.zeros(0, np.int64)
    whole = totals == 0
    weights[np.repeat(whole, entries.lengths)] = UNIT
    return Weights(np.append(0, np.cumsum(weights)), whole)


def without_templates(table: NgramTable, weights: Weights) -> NgramTable:
    """The table without n-grams that weigh nothing: each of them would have one posting for every item of its template."""
    keep = (entry_counts(table) < TEMPLATE_ENTRIES) | weights.whole[table.entries]
    key = np.repeat(table.keys, np.diff(table.bounds))
    return NgramTable.build(key[keep], table.entries[keep], table.starts[keep])


def covered_share(weights: Weights, entries: Entries, hits: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight that n-grams cover, of sorted distinct (group, entry, start) hits, shape (3, hits): (first hit of each group and entry, share).

    A group is a row; n-grams that overlap count once.
    """
    group, entry, start = hits
    if not len(group):
        return group, np.zeros(0)
    new = np.ones(len(group), dtype=bool)
    new[1:] = (group[1:] != group[:-1]) | (entry[1:] != entry[:-1])
    end = start + size
    end[:-1] = np.where(new[1:], end[:-1], np.minimum(end[:-1], start[1:]))
    base = entries.offsets[entry]
    covered = weights.sums[base + end] - weights.sums[base + start]
    first = np.flatnonzero(new)
    total = weights.sums[entries.offsets[entry[first] + 1]] - weights.sums[base[first]]
    return first, np.add.reduceat(covered, first) / total
