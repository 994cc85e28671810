"""Near-duplicates: MinHash LSH proposes pairs, the true Jaccard similarity of word n-grams decides.

Broder 1997 (resemblance of documents), Leskovec et al., Mining of Massive Datasets §3.4 (banding).  Rows are visited in survival
order and a row goes only if it is similar to a row that *stays* (star clusters): no chains through rows that are gone, exactly
one survivor a cluster, and the same result for any input order, shard size and number of workers.

    hash_shingles   texts -> one 64-bit hash for each word n-gram                       row-wise, in workers
    sketch          hashes -> MinHash values (Rust) and one key for each band           row-wise, in workers
    find_groups     band keys -> rows that share a band with another                    over all rows: sorting, no hash tables
    choose_survivors   groups -> which rows go                                          over the rows that share a band alone

Pitfalls: shingles are words of the user's and the assistant's turns, not characters and not the system prompt, or templated sets
(MetaMathQA, tool calling) collapse.  Rows with fewer words than one shingle are left to exact removal.  Similarities are those of
sets of 64-bit hashes: two different n-grams are taken for one with a probability of 2^-64.  Rows of one template that lie just below the
threshold are verified each against each: 4,000 of them take a minute.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

from pesc.data.text import words

RECALL = 0.99
"""Least probability that a pair exactly at the threshold shares a band."""
_SEED = 1
_MANY = 8
"""From so many proposals for one row on, their estimated similarity is looked at before the true one."""
_STANDARD_ERRORS = 5
"""Of more proposals, those whose estimated similarity is this many standard errors below the threshold are not verified."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_REMEMBERED = 100_000


class NearDuplicate(NamedTuple):
    """Row `removed` resembles row `kept` with this true Jaccard similarity."""

    removed: int
    kept: int
    score: float


class Hashes(NamedTuple):
    """N-gram hashes of many texts laid end to end: those of text i are flat[offsets[i]:offsets[i + 1]], with repetitions."""

    flat: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, text: int) -> np.ndarray:
        """The set of one text's hashes, sorted."""
        return np.unique(self.flat[self.offsets[text] : self.offsets[text + 1]])


class Groups(NamedTuple):
    """Rows that share a band: group ids of row places[i] are groups[bounds[i]:bounds[i + 1]]; places rise."""

    places: np.ndarray
    bounds: np.ndarray
    groups: np.ndarray


def choose_bands(permutations: int, threshold: float) -> tuple[int, int]:
    """(bands, rows in a band): the longest bands that still propose a pair at the threshold with probability RECALL.

    P(proposed | similarity s) = 1 - (1 - s^rows)^bands.
    """
    for rows in range(min(permutations, 32), 0, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return permutations, 1


@lru_cache(maxsize=1 << 18)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hash_shingles(texts: Iterable[str], size: int) -> Hashes:
    """64-bit hashes of the word n-grams of each text; a text of fewer words has none."""
    numbering: defaultdict[str, int] = defaultdict(count().__next__)
    ids: list[int] = []
    lengths: list[int] = []
    for text in texts:
        tokens = words(text)
        lengths.append(len(tokens))
        ids.extend(map(numbering.__getitem__, tokens))
    by_id = np.fromiter(map(_hash_word, numbering), dtype=np.uint64, count=len(numbering))
    hashed = by_id[np.array(ids, dtype=np.int64)] if ids else np.zeros(0, np.uint64)
    counts = np.array(lengths, dtype=np.int64)
    windows = _windows(hashed, size)
    starts = np.cumsum(counts) - counts
    usable = np.maximum(counts - size + 1, 0)
    offsets = np.concatenate(([0], np.cumsum(usable)))
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], usable) + np.repeat(starts, usable)
    return Hashes(windows[inside], offsets)


def _windows(hashed: np.ndarray, size: int) -> np.ndarray:
    """A polynomial hash of each window of `size` word hashes, mixed so that all 64 bits are good."""
    total = np.zeros(max(0, len(hashed) - size + 1), dtype=np.uint64)
    with np.errstate(over="ignore"):
        power = np.uint64(1)
        for offset in range(size):
            total += hashed[offset : offset + len(total)] * power
            power *= _BASE
        total ^= total >> np.uint64(32)
        total *= np.uint64(0xD6E8FEB86659FD93)
        total ^= total >> np.uint64(32)
    return total


def sketch(hashes: Hashes, permutations: int) -> np.ndarray:
    """MinHash values, uint32 [texts, permutations].  Those of a text without n-grams mean nothing."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  a compiled module

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes.flat, hashes.offsets.astype(np.uint64), permutations, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(hashes), permutations)


def band_keys(values: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One 64-bit key for each band of each row, uint64 [bands, N]: equal bands, equal keys."""
    wide = values[:, : bands * rows].astype(np.uint64).reshape(len(values), bands, rows)
    keys = np.zeros((len(values), bands), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(rows):
            keys = (keys ^ wide[:, :, place]) * np.uint64(0xFF51AFD7ED558CCD)
            keys ^= keys >> np.uint64(33)
    return np.ascontiguousarray(keys.T)


def find_groups(keys: Iterable[np.ndarray]) -> Groups:
    """Which rows share a band with another, from the keys of one band after the other ([N] each, in survival order)."""
    places, groups, used = [], [], 0
    for column in keys:
        order = np.argsort(column, kind="stable")
        same = column[order[1:]] == column[order[:-1]]
        shared = np.concatenate((same, [False])) | np.concatenate(([False], same))
        number = np.cumsum(np.concatenate(([True], ~same)))[shared] if len(column) else np.zeros(0, np.int64)
        places.append(order[shared])
        groups.append(number + used)
        used += len(column) + 1
    place, group = np.concatenate(places), np.concatenate(groups)
    order = np.argsort(place, kind="stable")
    unique, first = np.unique(place[order], return_index=True)
    return Groups(unique, np.append(first, len(place)), group[order])


def choose_survivors(
    found: Groups,
    threshold: float,
    shingles_of: Callable[[int], np.ndarray],
    values_of: Callable[[Sequence[int]], np.ndarray],
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[NearDuplicate]:
    """The rows that go, in survival order.  shingles_of: sorted set of a row's hashes; values_of: MinHash values of rows, [n, P]."""
    kept_in: dict[int, list[int]] = defaultdict(list)
    places, bounds = found.places.tolist(), found.bounds.tolist()
    for number, place in enumerate(places):
        groups = found.groups[bounds[number] : bounds[number + 1]].tolist()
        candidates = sorted({other for group in groups if group in kept_in for other in kept_in[group]})
        if len(candidates) > _MANY:
            equal = values_of(candidates) == values_of([place])
            alike = equal.mean(axis=1) >= threshold - _STANDARD_ERRORS * (threshold * (1 - threshold) / equal.shape[1]) ** 0.5
            candidates = [other for other, likely in zip(candidates, alike.tolist(), strict=True) if likely]
        best = _most_similar(place, candidates, threshold, shingles_of) if candidates else None
        if best:
            yield best
        else:
            for group in groups:
                kept_in[group].append(place)
        if number % 1000 == 0:
            on_progress(number, len(places))
    on_progress(len(places), len(places))


def _most_similar(
    place: int, candidates: Sequence[int], threshold: float, shingles_of: Callable[[int], np.ndarray]
) -> NearDuplicate | None:
    own = shingles_of(place)
    best: NearDuplicate | None = None
    for other in candidates:
        score = jaccard(own, shingles_of(other))
        if score >= threshold and (best is None or score > best.score):
            best = NearDuplicate(place, other, score)
    return best


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted sets of hashes; 0 when both are empty."""
    if not len(left) or not len(right):
        return 0.0
    slots = np.searchsorted(right, left)
    common = int(np.count_nonzero(right[np.minimum(slots, len(right) - 1)] == left))
    return common / (len(left) + len(right) - common)


def find_near_duplicates(texts: Sequence[str], *, threshold: float, ngram: int, permutations: int) -> list[NearDuplicate]:
    """Rows to remove, given all texts in survival order (the first of a cluster stays): the steps above, in this process."""
    hashes = hash_shingles(texts, ngram)
    usable = np.flatnonzero(np.diff(hashes.offsets))
    if len(usable) < 2:
        return []
    values = sketch(hashes, permutations)
    bands, rows = choose_bands(permutations, threshold)
    found = find_groups(band_keys(values[usable], bands, rows))
    shingles_of = lru_cache(maxsize=_REMEMBERED)(lambda place: hashes.of(int(usable[place])))
    removed = choose_survivors(found, threshold, shingles_of, lambda places: values[usable[list(places)]])
    return [NearDuplicate(int(usable[item.removed]), int(usable[item.kept]), item.score) for item in removed]
