"""n-grams of numbered words as 64-bit hashes, and the table that says which items hold them.

Two different n-grams share a hash with probability 2^-64; a window with a word that no item has is hashed like any other and found
nowhere.  A bitmap of 2^24 bits answers most look-ups; only windows that pass it are searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so powers never vanish modulo 2^64
_BITS = 24
_MODULUS = 1 << 64


def mix(numbers: np.ndarray) -> np.ndarray:
    """One 64-bit pattern for each word number (splitmix64), uint64 of the same shape."""
    with np.errstate(over="ignore"):
        mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_BASE)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def window_hashes(mixed: np.ndarray, size: int) -> np.ndarray:
    """Hash of each window of `size` words, uint64, shape (words - size + 1,): sum of mixed * base^position, modulo 2^64.

    Built by doubling: windows of 2, 4, 8 … words, joined by the bits of `size`.
    """
    count = len(mixed) - size + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    total: np.ndarray | None = None
    covered, width, power = 0, 1, mixed
    with np.errstate(over="ignore"):
        while covered < size:
            if size & width:
                part = power[covered : covered + count]
                total = part.copy() if total is None else total + part * np.uint64(pow(_BASE, covered, _MODULUS))
                covered += width
            if covered < size:
                power = power[:-width] + power[width:] * np.uint64(pow(_BASE, width, _MODULUS))
                width *= 2
    assert total is not None
    return total


@dataclass(frozen=True)
class NgramTable:
    """keys: sorted distinct hashes (K,).  Postings of key k are `bounds[k]:bounds[k + 1]` of entries and starts."""

    keys: np.ndarray
    bounds: np.ndarray
    entries: np.ndarray
    starts: np.ndarray
    bitmap: np.ndarray

    @classmethod
    def build(cls, hashes: np.ndarray, entries: np.ndarray, starts: np.ndarray) -> NgramTable:
        """The table of (hash, entry, first word) triples, each of shape (postings,)."""
        order = np.lexsort((starts, entries, hashes))
        keys, first = np.unique(hashes[order], return_index=True)
        bitmap = np.zeros(1 << (_BITS - 3), dtype=np.uint8)
        slot = keys >> np.uint64(64 - _BITS)
        np.bitwise_or.at(bitmap, slot >> np.uint64(3), np.uint8(1) << (slot & np.uint64(7)).astype(np.uint8))
        bounds = np.append(first, len(order)).astype(np.int64)
        return cls(keys, bounds, entries[order].astype(np.int32), starts[order].astype(np.int32), bitmap)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All postings of some windows: (window, entry, start), each of shape (hits,), in the order of the windows."""
        slot = (hashes >> np.uint64(64 - _BITS)).astype(np.int64)
        passed = np.flatnonzero((self.bitmap[slot >> 3] >> (slot & 7).astype(np.uint8)) & 1)
        if not len(passed) or not len(self.keys):
            empty = np.zeros(0, dtype=np.int64)
            return empty, empty, empty
        wanted = hashes[passed]
        key = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        equal = self.keys[key] == wanted
        windows, key = passed[equal], key[equal]
        counts = self.bounds[key + 1] - self.bounds[key]
        postings = ragged(self.bounds[key], counts)
        return np.repeat(windows, counts), self.entries[postings].astype(np.int64), self.starts[postings].astype(np.int64)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, for saving."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> NgramTable:
        """What `arrays` gave; memory-mapped ones are read as they are needed."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def ragged(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, … (counts[0] of them), first[1], …: the places of several slices, int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(first - (ends - counts), counts)
